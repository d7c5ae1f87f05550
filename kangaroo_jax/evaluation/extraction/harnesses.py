"""How public harnesses and official scripts read an answer, faults included, so that one answer can be read by all.

Each function returns what its harness compares with the true letter. That may be a character that is no letter, or
several letters where the harness would accept each of them. `GUESS` stands where a harness draws a letter at random:
ours never draws, and credits the chance of such a draw. What each reads is measured on recorded outputs of the harness.
"""

import re
from collections.abc import Callable, Sequence

GUESS = "?"

# (text of the answer, letters of the question's options, the options' texts) -> see above
Reader = Callable[[str, str, Sequence[str]], str]

# lmms-eval: words before a letter, in several languages
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_MARKS = ((".", 5), (":", 4), (")", 3), (" ", 2))  # what follows a letter, and how much that counts

# LongVideoBench: texts that are cut out of an answer before the first capital is read
_LEADS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
# Video-MME's own script lacks two commas, so that four of the texts are two that no answer has.
_GLUED_LEADS = (*_LEADS[:4], _LEADS[4] + _LEADS[5], _LEADS[6] + _LEADS[7])


def lmms_shared(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """lmms-eval's shared reader: candidates by form, the form that counts most, in it the last one."""
    plain = text.strip()
    for mark in ",.!?;:'\"":
        plain = plain.strip(mark)
    inner = plain.strip()
    plain, found = f" {plain} ", list[tuple[int, int, str]]()  # how much it counts, where, the letter
    for letter in letters:
        if f"({letter})" in plain:
            found.append((6, plain.rfind(f"({letter})"), letter))
        found += [(worth, plain.rfind(letter + mark), letter) for mark, worth in _MARKS if letter + mark in plain]
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((10, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((9, len(plain) - 1, letter))
        lowered = plain.lower()
        for phrase in _PHRASES:
            begin = lowered.find(phrase)
            place = plain.find(letter, begin + len(phrase)) if begin >= 0 else -1
            if place >= 0:
                found.append((7, place, letter))
    found = found or [(0, plain.rfind(letter), letter) for letter in letters if letter in plain]
    return max(found, key=lambda one: one[:2])[2] if found else ""


def lmms_mvbench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """lmms-eval's MVBench: `B. text`, else the first word of one letter from A to E, of either case."""
    lead = re.match(r"([A-E])\.\s*.+$", text.strip(), re.IGNORECASE)
    if lead:
        return _among(letters, lead[1])
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", plain) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in plain or " " + mark in plain
        plain = plain.replace(mark, "" if beside_space or number else " ")
    alone = re.search(r"\b([A-E])\b", re.sub(r"\.(?!\d)", "", plain).strip("'\""), re.IGNORECASE)
    return _among(letters, alone[1]) if alone else ""


def _among(letters: str, letter: str) -> str:
    return letter.upper() if letter.upper() in letters else ""


def _first_capital(text: str, leads: Sequence[str], capitals: str) -> str:
    plain = text.strip()
    for lead in leads:
        plain = plain.replace(lead, "")
    return next((char for char in plain if char in capitals), "")


def lmms_longvideobench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """LongVideoBench, official and in lmms-eval: the first capital from A to E, else a random letter."""
    return _first_capital(text, _LEADS, "ABCDE") or GUESS


def official_videomme(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """Video-MME's own script: the first capital from A to D, even of a word."""
    return _first_capital(text, _GLUED_LEADS, "ABCD")


def vlmevalkit_videomme(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VLMEvalKit's Video-MME: the same, with two more leads."""
    return _first_capital(text, (*_GLUED_LEADS, "Answer:", "Option:"), "ABCD")


def first_character(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """SEED-Bench in lmms-eval, VideoVista's and CulturalLingo's scripts: the first character, whatever it is."""
    return text.strip()[:1]


def official_lvbench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """LVBench's own script: before `)`, after `(`, of that the first character."""
    words = text.split(")")[0].split("(")[-1].split()
    return words[0][0] if words else ""


def official_mlvu(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """MLVU's own script: the character before the first `)`, else the whole answer must be the letter."""
    head, bracket, _ = text.partition(")")
    return head[-1:] if bracket else text


def official_mvbench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """MVBench's own script: each option of which the first word is a part, or which is a part of the first word."""
    word = text.lower().split(" ")[0].replace(".", "")
    return "".join(letter for letter in letters if word in f"({letter.lower()})" or f"({letter.lower()})" in word)


def official_vnbench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VNBench's own script: the first of A to D that occurs before the first full stop, so that `Answer B` is A."""
    return next((letter for letter in "ABCD" if letter in text.split(".")[0]), "")


def vlmevalkit_inferred(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VLMEvalKit without a judge: the only letter among the last five words, else the only option's text."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if len(text) > 2 * sum(map(len, options)):
        return ""
    quoted = [x for x, option in zip(letters, options, strict=False) if option.lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else ""


def vlmevalkit_mvbench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VLMEvalKit's MVBench without a judge: what the official script accepts, or what is inferred."""
    return official_mvbench(text, letters, options) + vlmevalkit_inferred(text, letters, options)


def vlmevalkit_mlvu(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VLMEvalKit's MLVU without a judge: what the official script reads, or what is inferred."""
    read = official_mlvu(text, letters, options)
    return (read if read in letters else "") + vlmevalkit_inferred(text, letters, options)


def vlmevalkit_longvideobench(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VLMEvalKit's LongVideoBench without a judge: the first capital from A to E, and no guess."""
    return _first_capital(text, _LEADS, "ABCDE")


def lmms_egoschema(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """lmms-eval's EgoSchema: the earliest of `(A)`, `A ` and `A.`, else an option's text, else a random letter."""
    plain = text
    for mark in ",.!?;:'":
        plain = plain.strip(mark)
    plain = f" {plain} "
    found = [(plain.rfind(form), order, letter) for order, letter, form in _forms(letters) if form in plain]
    if not found and len(plain.split()) > 5:
        lowered = plain.lower()
        whole = zip(letters, options, strict=False)
        found = [(lowered.rfind(o.lower()), n, x) for n, (x, o) in enumerate(whole) if o.lower() in lowered]
    return min(found)[2] if found else GUESS


def _forms(letters: str) -> list[tuple[int, str, str]]:
    forms = [
        (letter, before + letter + after) for before, after in (("(", ")"), ("", " "), ("", ".")) for letter in letters
    ]
    return [(order, letter, form) for order, (letter, form) in enumerate(forms)]


def official_tempcompass(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """TempCompass' own rules for options: the letter, or an answer that begins `B.` or `B)`; else a judge decides."""
    plain = text.strip()
    for letter, option in zip(letters, options, strict=False):
        if plain in (letter, f"{letter}. {option}") or plain[:2] in (letter + ".", letter + ")"):
            return letter
    return ""


def official_yes_no(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """TempCompass' own rule: the answer begins with yes or no, in either case."""
    lowered = text.strip().lower()
    return next((x for x, option in zip(letters, options, strict=False) if lowered.startswith(option)), "")


def official_matching(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """TempCompass' own rule for captions: the line of an option, its sentence, or its mark (`Caption A`, `A`)."""
    plain = text.strip()
    for letter, option in zip(letters, options, strict=False):
        mark, _, sentence = option.partition(": ")
        if (
            plain in (option, sentence)
            or plain.partition(") ")[2] == sentence
            or plain.replace(".", "") in (mark, mark.split(" ")[-1])
        ):
            return letter
    return ""
