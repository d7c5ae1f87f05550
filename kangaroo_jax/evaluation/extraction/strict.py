"""Our rules: the letter that an answer states, or none. Nothing is guessed."""

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"

_THOUGHT = re.compile(r"<(think|thinking|thought)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"^.*</think(?:ing)?>|<(?:think|thinking|thought)>.*$", re.DOTALL | re.IGNORECASE)
# "A red ring" and "I see": an article or pronoun, not a letter; "A or B" and "A is right" are letters.
_WORD_NOT_LETTER = r"(?!(?<=[AI])\s+(?!or\b|and\b|is\b|because\b)[a-z])"
_STATED = (
    r"(?:(?i:\b(?:answer|option|choice))\s*(?i:is\b|would\s+be\b)?|答案\s*(?:是|为)?|选项?|选择)\s*:?\s*[(\[*\"']*"
)


def without_thoughts(text: str) -> str:
    """The answer after what a model thought aloud in a `<think>` block; a block without an end has no answer."""
    return _OPEN_THOUGHT.sub("", _THOUGHT.sub("", text)).strip()


def extract_letter(text: str, choices: str = "ABCD", options: Sequence[str] = ()) -> str:
    """The option letter in an answer, upper case, or "" if there is none or more than one.

    What stands in `<think>` is no answer. The first of these rules that finds a letter decides:

    1. the answer is the letter, or begins with it and a mark: `B`, `(b)`, `B. blue`, `B、蓝色`, full width too;
    2. the letter follows words like `the answer is`, `option`, `答案是`, `选`; the last such letter counts;
    3. the answer ends with a letter in brackets, and has no other in brackets: `It is vitamin A (C)`;
    4. exactly one of the letters stands alone, in upper case, somewhere outside the quoted text of an option.

    The article in `A red ring` is no letter, nor is the `A` of an option `B is heavier than A` that is repeated.
    Raises ValueError if `choices` is empty or has other characters.
    """
    if not choices.isalpha() or not choices.isascii():
        raise ValueError(f"choices must be letters, not {choices!r}")
    plain = unicodedata.normalize("NFKC", without_thoughts(text)).strip()
    upper, lower = choices.upper(), choices.lower()
    other = rf"(?!\s*(?:or|and|/|&|或者?|和)\s*[(\[*\"']*[{upper}{lower}](?![A-Za-z]))"
    first = re.match(rf"[(\[*\"'`\s]*([{upper}{lower}])[*\"'`]*\s*(?:[)\].,:;!?。、\n]{other}|$)", plain)
    if first:
        return first[1].upper()
    letter = rf"(?:([{upper}])(?![A-Za-z']){_WORD_NOT_LETTER}|([{lower}])(?=\s*(?:[)\].,;!?。、]|$)))"
    stated = re.findall(_STATED + letter, plain)
    if stated:
        return "".join(stated[-1]).upper()
    bracketed = re.findall(r"[(\[]([A-Za-z])[)\]]", plain)
    if len(bracketed) == 1 and re.search(r"[)\]][\s.*\"'`。]*$", plain) and bracketed[0] in upper + lower:
        return bracketed[0].upper()
    for option in sorted(filter(None, map(_plain, options)), key=len, reverse=True):
        if len(option) > 1:
            plain = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", " ", plain, flags=re.IGNORECASE)
    alone = set(re.findall(rf"(?<![A-Za-z0-9'])([{upper}])(?![A-Za-z0-9']){_WORD_NOT_LETTER}", plain))
    return alone.pop() if len(alone) == 1 else ""


def _plain(option: str) -> str:
    return unicodedata.normalize("NFKC", option).strip().rstrip(".。")


def extract_word(text: str, choices: str, options: Sequence[str]) -> str:
    """The letter of the option whose word (`yes`, `no`) begins the answer or is the only one in it, else ""."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", without_thoughts(text)).casefold())
    named = [letter for letter, option in zip(choices, options, strict=False) if option.casefold() in words]
    if words and (first := [x for x, o in zip(choices, options, strict=False) if o.casefold() == words[0]]):
        return first[0]
    return named[0] if len(named) == 1 else ""


def extract_line(text: str, choices: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer is, where options are lines with marks of their own (`Caption A: ...`).

    The answer is the line, its sentence or its mark; or exactly one mark, or one sentence, stands in it; else "".
    """
    plain = _plain(without_thoughts(text)).casefold()
    parts = [(x, *_plain(o).casefold().partition(": ")[::2]) for x, o in zip(choices, options, strict=False)]
    for letter, mark, sentence in parts:
        if plain.strip("()[]*\"' ") in (f"{mark}: {sentence}", sentence, mark, mark.split(" ")[-1]):
            return letter
    for form in (1, 2):
        named = [part[0] for part in parts if re.search(rf"(?<!\w){re.escape(part[form])}(?!\w)", plain)]
        if len(named) == 1:
            return named[0]
    return ""
