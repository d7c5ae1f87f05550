"""Words about scenes of the generated corpus: captions, questions, and written notes, in English and Chinese.

Phrases are few and fixed, because a decoder of a million weights must learn them in minutes. A *note* is a scene
written out moment by moment, in the order of its video's tokens; in the text warm-up it takes the place of the video.
"""

import dataclasses
import random
from collections.abc import Sequence

from kangaroo_jax.corpus.scenes import (
    BEFORE_MARK,
    CANVAS,
    COLOURS,
    DIRECTIONS,
    LONG_SECONDS,
    MARK,
    PLACES,
    SHAPES,
    SHORT_SECONDS,
    THINGS,
    Event,
    Scene,
)

LANGUAGES = ("en", "zh")
LETTERS = "ABCD"
COUNTS = ("one", "two", "three", "four")

CHINESE = {
    **dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "白色", "紫色"), strict=True)),
    **dict(circle="圆形", triangle="三角形", cross="十字形", ring="环形", bar="条形"),
    **dict(left="左", right="右", up="上", down="下", top="顶", bottom="底"),
    **dict(one="一个", two="两个", three="三个", four="四个"),
    **dict(appears="出现", disappears="消失", moves="移动"),
}

# "|" cuts Chinese phrases into words for the tokenizer; it is never shown.
_QUESTIONS = {
    "what": ("What is it?", "这|是|什么|？"),
    "colour": ("What colour is it?", "它|是|什么|颜色|？"),
    "direction": ("Which way does it move?", "它|向|哪边|移动|？"),
    "where": ("Where is it?", "它|在|哪边|？"),
    "count": ("How many are there?", "有|几个|？"),
    "first": ("What comes first?", "先|出现|什么|？"),
    "last": ("What comes last?", "最后|出现|什么|？"),
    "first_colour": ("What colour comes first?", "先|出现|什么|颜色|？"),
    "last_colour": ("What colour comes last?", "最后|出现|什么|颜色|？"),
    "second_t": ("What is seen at {0} seconds?", "第| {0} |秒|看到|什么|？"),
    "duration": ("How many seconds are there?", "视频|有|几|秒|？"),
    "which": ("Which is {0}?", "哪个|是|{0}|？"),
    "every": ("Name them.", "都|说|。"),
}
_REQUESTS = {
    "image": ("Describe the image.", "描述|图片|。"),
    "video": ("Describe the video.", "描述|视频|。"),
    "dense": ("Describe the video with times.", "按|时间|描述|视频|。"),
}
_OTHER_CHINESE = ("结束", "没有", "然后", "变成", "秒", "向", "，", "：", "。", "、")
QUESTIONS = {key: (en, zh.replace("|", "")) for key, (en, zh) in _QUESTIONS.items()}
REQUESTS = {key: (en, zh.replace("|", "")) for key, (en, zh) in _REQUESTS.items()}


def chinese_words() -> list[str]:
    """Every Chinese word of the corpus, once."""
    phrases = (zh for _, zh in (*_QUESTIONS.values(), *_REQUESTS.values()))
    found = {w for phrase in phrases for w in phrase.split("|") if "{0}" not in w}
    return sorted(found.union(CHINESE.values(), _OTHER_CHINESE))


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact about a scene that can be asked.

    Results are counted by `kind`; `question` is the key of the wording, `about` its subject. `answer` and `others`
    (at least three wrong answers, the first ones preferred) are words in English or whole seconds.
    """

    kind: str
    question: str
    about: str | int
    answer: str | int
    others: tuple[str | int, ...]
    preferred: int = 0  # this many of `others` are always among the options


@dataclasses.dataclass(frozen=True)
class Question:
    """One question as put to the model. `answer` is the letter where there are `options`, else the words."""

    kind: str
    language: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    said: str = ""  # the assistant's answer where it is more than the words and the letter of an option

    @property
    def told(self) -> str:
        """The assistant's answer: the words, followed by the letter of the option."""
        if self.said:
            return self.said
        return _chosen(self.options[LETTERS.index(self.answer)], self.answer) if self.options else self.answer


@dataclasses.dataclass(frozen=True)
class Phrasing:
    """The words in which others put a multiple-choice question: {question} and {options} stand in the text."""

    text: str
    option: str = "{letter}. {text}"
    system: str = ""
    prefill: str = ""  # how the answer begins
    when: str = ""  # the only question that is put so: when the one shape of a video appears; "" puts any question so

    def turn(self, question: Question) -> tuple[str, str]:
        """(what the user says, what the assistant answers) for a question with options."""
        lines = [
            self.option.format(letter=letter, text=option)
            for letter, option in zip(LETTERS, question.options, strict=False)
        ]
        asked = question.text.split("\n", 1)[0]
        return self.text.format(question=asked, options="\n".join(lines)), self.prefill + question.told

    def open_turn(self, question: Question) -> tuple[str, str]:
        """The same for a question without options: the words as far as the question."""
        return self.text.partition("{question}")[0] + question.text, question.told


def word(key: str | int, language: str) -> str:
    """A word of the corpus in a language; a whole number is a number of seconds."""
    if isinstance(key, int):
        return str(key)
    return key if language == "en" else CHINESE.get(key, key)


# ---------------------------------------------------------------------------------------------- facts


def _fact(
    kind: str,
    answer: str | int,
    pool: Sequence[str | int],
    *,
    near: Sequence[str] = (),
    question: str = "",
    about: str | int = "",
) -> Fact:
    others = [key for key in near if key != answer]
    rest = [key for key in pool if key != answer and key not in others]
    return Fact(kind, question or kind, about, answer, (*others, *rest), len(others))


def _duration(scene: Scene) -> Fact:
    """The scene's duration, with options at least 4 seconds apart for short videos, 20 for long ones."""
    short = [s for s in SHORT_SECONDS if (s - scene.seconds) % 4 == 0]
    return _fact("duration", scene.seconds, LONG_SECONDS if scene.kind == "long" else short)


def _one_thing(event: Event) -> list[Fact]:
    return [_fact("what", event.thing.name, THINGS), _fact("colour", event.thing.colour, COLOURS)]


def _many_things(scene: Scene) -> list[Fact]:
    """Facts of a scene whose things come one after another."""
    names = [e.thing.name for e in scene.events]
    facts = [_fact("first", names[0], THINGS, near=names), _fact("last", names[-1], THINGS, near=names)]
    for event in scene.events:
        facts.append(_fact("second_t", event.thing.name, THINGS, near=names, about=middle_second(scene, event)))
    return facts


def _many_colours(scene: Scene) -> list[Fact]:
    """Facts of a scene whose colours come one after another."""
    colours = [e.thing.colour for e in scene.events]
    return [
        _fact("colour", colours[at], COLOURS, near=colours, question=question)
        for question, at in (("first_colour", 0), ("last_colour", -1))
    ]


def middle_second(scene: Scene, event: Event) -> int:
    """A whole second well inside an event; the mark of an event of a long video."""
    if scene.kind == "long":
        return -int(-event.start // MARK) * MARK
    return int(event.start + event.end) // 2


def facts(scene: Scene) -> list[Fact]:
    """All that may be asked about a scene."""
    first = scene.events[0]
    found: list[Fact] = []
    if scene.kind in ("order", "transform") or (scene.kind == "long" and len(scene.events) > 1):
        found += _many_things(scene) + _many_colours(scene)
    elif scene.kind == "recolour":
        found += [_fact("what", first.thing.name, THINGS), *_many_colours(scene)]
    elif scene.kind == "count":
        found += [_fact("colour", first.thing.colour, COLOURS)]
    else:
        found += _one_thing(first)
    if scene.kind == "aside":
        found += [_fact("where", scene.direction, PLACES)]
    if scene.kind == "count":
        found += [_fact("count", COUNTS[len(scene.events) - 1], COUNTS)]
    if scene.kind == "move":
        found += [_fact("direction", scene.direction, DIRECTIONS)]
    if scene.seconds:
        found += [_duration(scene)]
    return found


def appearance(scene: Scene) -> Fact | None:
    """When the one shape of a long video appears, in English; None of other scenes.

    Others are seconds at which a thing may appear, too, so that the numbers alone give nothing away.
    """
    if scene.kind != "long" or len(scene.events) > 1 or scene.events[0].thing.name not in SHAPES:
        return None
    start = int(scene.events[0].start)
    others = (mark - before for mark in range(MARK, scene.seconds, MARK) for before in BEFORE_MARK)
    told = tuple(f"{second} seconds" for second in others if abs(second - start) >= MARK)
    return Fact("when", "when", "", f"{start} seconds", told)


# The share of these questions that is asked: they are learnt from few examples.
EASY = dict(duration=0.35, what=0.8, colour=0.5, first=0.75, last=0.75, first_colour=0.4, last_colour=0.4)


TIMED = ("duration", "second_t")  # questions


def some_facts(scene: Scene, count: int, rng: random.Random, every: bool = False, times: bool = True) -> list[Fact]:
    """Up to `count` different facts, in random order; the easy ones, which all short scenes have, are rarer.

    With `every` none is rarer than another. Without `times` none is about a moment or a duration.
    """
    found, easy = facts(scene), {} if every or scene.kind == "long" else EASY
    found = found if times else [fact for fact in found if fact.question not in TIMED]
    rng.shuffle(found)
    return [fact for fact in found if rng.random() < easy.get(fact.question, 1.0)][:count] or found[:1]


def ask(fact: Fact, language: str, rng: random.Random, letter: str = "") -> Question:
    """Ask a fact by multiple choice with the answer `letter` (one of "ABCD", "?" for any), or openly for ""."""
    about = str(fact.about) if isinstance(fact.about, int) else word(fact.about, language)
    return ask_in(QUESTIONS[fact.question][LANGUAGES.index(language)].format(about), fact, language, rng, letter)


def ask_in(text: str, fact: Fact, language: str, rng: random.Random, letter: str = "") -> Question:
    """`ask` in words that the caller gives."""
    if not letter:
        return Question(fact.kind, language, text, word(fact.answer, language))
    near, far = fact.others[: fact.preferred][:3], fact.others[fact.preferred :]
    keys = [*near, *rng.sample(far, 3 - len(near))]
    rng.shuffle(keys)
    place = rng.randrange(4) if letter == "?" else LETTERS.index(letter)
    keys.insert(place, fact.answer)
    options = tuple(word(key, language) for key in keys)
    text = "\n".join([text, *_option_lines(options, language)])
    return Question(fact.kind, language, text, LETTERS[place], options)


Turn = tuple[str, str]  # what the user says, what the assistant answers
SECONDS = (*SHORT_SECONDS, *LONG_SECONDS)
# Pools of one sort each, as in questions, and one of all sorts, which teaches finding any word, not certain words.
SORTS: tuple[Sequence[str | int], ...] = (THINGS, COLOURS, DIRECTIONS, PLACES, COUNTS, SECONDS)
WORDS = (*SORTS, tuple({str(key): key for sort in SORTS for key in sort}.values()))


def _chosen(option: str, letter: str) -> str:
    """An option in full. The words come first, so that the letter is only looked up."""
    return f"{option} {letter}"


def drill(
    language: str, rng: random.Random, pool: Sequence[str | int] = (), options: int = 4, every: bool = False
) -> Turn:
    """(question, answer) about options alone: `Which is red?` with 2 to 4 of them -> `red B`.

    With `every`, all of them in random order: `Name them.` -> `red B. 7 D. blue A. ring C`.

    Drills teach the link between a letter and its option, which a tiny decoder takes very long to learn from scenes.
    `pool` is by default one of WORDS.
    """
    pool = pool or rng.choices(WORDS, weights=(4, 3, 1, 1, 1, 2, 4))[0]
    keys = rng.sample(list(pool), min(options, len(pool)))
    said = [word(key, language) for key in keys]
    full = [_chosen(option, letter) for option, letter in zip(said, LETTERS, strict=False)]
    lines, at = _option_lines(said, language), LANGUAGES.index(language)
    if every:
        rng.shuffle(full)
        return "\n".join([QUESTIONS["every"][at], *lines]), (". ", "。")[at].join(full)
    place = rng.randrange(len(keys))
    return "\n".join([QUESTIONS["which"][at].format(said[place]), *lines]), full[place]


def _option_lines(options: Sequence[str], language: str) -> list[str]:
    dot = ". " if language == "en" else "、"
    return [f"{mark}{dot}{option}" for mark, option in zip(LETTERS, options, strict=False)]


# ---------------------------------------------------------------------------------------------- captions


def _named(event: Event, language: str, article: bool = True) -> str:
    thing, colour = word(event.thing.name, language), word(event.thing.colour, language)
    if language == "en":
        return f"a {colour} {thing}" if article else f"{colour} {thing}"
    return f"一个{colour}{thing}" if article else f"{colour}{thing}"


def _counted(scene: Scene, language: str, plural: bool = True) -> str:
    """Several equal things: `three red circles`."""
    event, count = scene.events[0], word(COUNTS[len(scene.events) - 1], language)
    name = _named(event, language, article=False)
    if language == "zh":
        return count + name
    ending = "" if len(scene.events) == 1 or not plural else "es" if name.endswith("cross") else "s"
    return f"{count} {name}{ending}"


def caption(scene: Scene, language: str) -> str:
    """One sentence on what is visible or happens, without times."""
    first, last = scene.events[0], scene.events[-1]
    en = language == "en"
    if scene.kind == "count":
        return _counted(scene, language)
    if scene.kind in ("order", "long"):
        return (", then " if en else "，然后").join(_named(e, language) for e in scene.events)
    phrase = _named(first, language)
    if scene.kind == "aside":
        return f"{phrase}, {scene.direction}" if en else f"{phrase}，{word(scene.direction, language)}"
    if scene.kind == "move":
        return f"{phrase} moves {scene.direction}" if en else f"{phrase}向{word(scene.direction, language)}移动"
    if scene.kind == "recolour":
        return f"{phrase} becomes {last.thing.colour}" if en else f"{phrase}变成{word(last.thing.colour, language)}"
    if scene.kind == "transform":
        return f"{phrase} becomes {_named(last, language)}" if en else f"{phrase}变成{_named(last, language)}"
    if scene.kind in ("appear", "disappear"):
        return f"{phrase} {scene.kind}s" if en else phrase + word(scene.kind + "s", language)
    return phrase


def dense_caption(scene: Scene, language: str) -> str:
    """What is visible from which second on, and the length: `0s: red 7. 4s: blue circle. 8s: end.`

    A long video has its marks: `40s: red 7. 90s: blue ring. 110s: end.`
    """
    en = language == "en"
    comma = ", " if en else "，"
    parts: list[tuple[int, str]] = []
    if scene.kind == "count":
        parts.append((0, _counted(scene, language, plural=False)))
    elif scene.kind == "long":
        parts += [(middle_second(scene, e), _named(e, language, False)) for e in scene.events]
    else:
        nothing = "nothing" if en else "没有"
        if scene.events[0].start > 0:
            parts.append((0, nothing))
        parts += [(int(e.start), _named(e, language, False)) for e in scene.events]
        if scene.direction:
            event, way = scene.events[0], word(scene.direction, language)
            phrase = (*place(event, 0, language), f"moves {way}" if en else f"向{way}移动")
            parts[-1] = (0, comma.join((parts[-1][1], *phrase)))
        if scene.events[-1].end < scene.seconds:
            parts.append((int(scene.events[-1].end), nothing))
    parts.append((scene.seconds, "end" if en else "结束"))
    return " ".join(f"{t}s: {what}." for t, what in parts) if en else "".join(f"{t}秒：{w}。" for t, w in parts)


def describe(scene: Scene, language: str, dense: bool) -> Turn:
    """A request for a description and the description; with `dense` it has times."""
    request = "dense" if dense else "video" if scene.seconds else "image"
    description = dense_caption(scene, language) if dense else caption(scene, language)
    return REQUESTS[request][LANGUAGES.index(language)], description


# ---------------------------------------------------------------------------------------------- notes


def place(event: Event, seconds: float, language: str) -> tuple[str, ...]:
    """A thing's place at a time, as words: none for the middle, else its row, its column or both."""
    x, y = event.at(seconds)
    column = ("left", "", "right")[min(int(3 * x / CANVAS), 2)]
    row = ("top", "", "bottom")[min(int(3 * y / CANVAS), 2)]
    return tuple(word(w, language) for w in (row, column) if w)


def moments(scene: Scene) -> list[int]:
    """The whole seconds that a note covers: the middle of every part, both ends of a motion, marks of a long video."""
    if not scene.seconds:
        return [0]
    if scene.kind == "long":
        return [middle_second(scene, event) for event in scene.events]
    if scene.direction:
        return [0, scene.seconds - 1]
    cuts = sorted({0, scene.seconds, *(int(t) for e in scene.events for t in (e.start, e.end))})
    return [(a + b) // 2 for a, b in zip(cuts, cuts[1:], strict=False)]


def note(scene: Scene, language: str) -> str:
    """The scene at some moments, one line each: second, colour, thing, place; then the second of its end.

    An image is one line with no second.
    """
    en = language == "en"
    comma = ", " if en else "，"
    lines = []
    for second in moments(scene):
        seen = [comma.join((_named(e, language, False), *place(e, second, language))) for e in scene.seen(second)]
        phrase = comma.join(seen) or ("nothing" if en else "没有")
        lines.append(phrase if not scene.seconds else f"{second}s: {phrase}" if en else f"{second}秒：{phrase}")
    if scene.seconds:
        lines.append(f"{scene.seconds}s: end" if en else f"{scene.seconds}秒：结束")
    return "\n".join(lines)
