"""What a benchmark is and what it asks: the types that every benchmark's file fills in."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.evaluation.extraction.harnesses import Reader
from kangaroo_jax.evaluation.extraction.strict import LETTERS

PROTOCOLS = ("strict", "official", "lmms-eval", "vlmevalkit")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one medium, as its benchmark's files have it."""

    id: str  # in its benchmark
    media: tuple[Media, ...]
    text: str
    options: tuple[str, ...] = ()  # without their letters
    answer: str | None = ""  # an option's letter, or the text that is expected; None where it is not public
    kind: str = "choice"  # choice, yes_no, matching: there are options; exact: a text; open: for a judge
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # "task" -> its names
    unit: str = ""  # questions of a unit count as one, right only if all are
    subtitles: str = ""  # their file, "" where there are none
    subtitles_from: float = 0.0  # second of the subtitles at which the video begins
    prompt: str = ""  # in full, where the files have it
    rubric: str = ""  # of open ones: how a judge marks the answer, see `rubrics`
    fault: str = ""  # what is wrong with the question itself
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what a submission needs of its row

    @property
    def letters(self) -> str:
        """Those of its options."""
        return LETTERS[: len(self.options)]

    @property
    def video(self) -> str:
        """What names the video among others, for statistics; "" where there is none."""
        if not self.media or not self.media[0].frames:
            return self.media[0].path if self.media else ""
        frames = hashlib.sha256("\0".join(self.media[0].frames).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self.media[0].path}#{frames[:12]}"


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a question is put: texts with {question}, {options} and {subtitles} in them."""

    text: str
    option: str = "{letter}. {text}"
    system: str = ""
    prefill: str = ""  # how the answer begins
    likelihood: bool = False  # the likeliest option's text is the answer, in place of a generated one
    interleaved: bool = False  # subtitles stand between the frames, in place of {subtitles}

    def prompt(self, question: Question, subtitles: str = "") -> str:
        """The user's text."""
        pairs = zip(question.letters, question.options, strict=False)
        options = "\n".join(self.option.format(letter=letter, text=text) for letter, text in pairs)
        return question.prompt or self.text.format(question=question.text, options=options, subtitles=subtitles)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a protocol reads an answer of one kind of question, and what it leaves out."""

    read: Reader
    letters: str = ""  # those that it knows, where they are not the question's
    leaves_out: str = ""  # answers that leave its denominator: "unread" or "empty" ones
    several: bool = False  # whether it reads several letters, each of which it accepts


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: its files, what is asked, how it is read, and how its score is made."""

    name: str
    title: str
    read: Callable[[Path], Iterable[Question]]  # from the folder of its files
    fetch: str  # what to fetch and where it goes
    licence: str
    size: str  # on disk
    questions: int  # that it has, 0 where the number is open
    wordings: Mapping[str, Mapping[str, Wording]]  # style -> kind of question ("" for all) -> wording
    readings: Mapping[str, Mapping[str, Reading]]  # protocol but strict -> kind of question -> reading
    average: str = ""  # the groups whose scores are averaged; "" averages over questions
    frames: int | None = None  # of a video, where it is published
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)  # Kangaroo's row, percent or as it stands
    note: str = ""  # what is inferred or not public, printed with the result
    counts_judged: bool = False  # whether what a judge says of open answers is part of the score
    submission: Callable[[Iterable[tuple[Question, str]]], tuple[str, Any]] | None = None  # (name, JSON) of letters
    max_new_tokens: int = 16

    def wording(self, style: str, kind: str) -> Wording:
        """How a question of a kind is put in a style."""
        words = self.wordings[style]
        return words[kind] if kind in words else words[""]

    def reading(self, protocol: str, kind: str) -> Reading | None:
        """How a protocol reads answers; None where it has no rule for them."""
        return self.readings.get(protocol, {}).get(kind)
