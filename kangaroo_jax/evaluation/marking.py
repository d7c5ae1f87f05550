"""Marks answers under every protocol: which option was read, what it is worth, and what could not be marked and why."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kangaroo_jax.evaluation.benchmarks.question import PROTOCOLS, Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.rubrics import RUBRICS
from kangaroo_jax.evaluation.extraction.harnesses import GUESS
from kangaroo_jax.evaluation.extraction.strict import extract_letter, extract_line, extract_word
from kangaroo_jax.evaluation.scoring import exact_match
from kangaroo_jax.evaluation.statistics import Estimate, estimate

# Why an answer has no mark of its own. All count as wrong, but for those that nobody could mark.
UNREAD, MEDIA, REQUEST, UNASKED = "unread", "media", "request", "unasked"
HIDDEN, UNJUDGED = "hidden", "unjudged"
FAILURES = (UNREAD, MEDIA, REQUEST, UNASKED)

_STRICT: Mapping[str, Callable[[str, str, Sequence[str]], str]] = {
    "choice": extract_letter,
    "yes_no": extract_word,
    "matching": extract_line,
}


@dataclasses.dataclass(frozen=True)
class Mark:
    """What one protocol makes of an answer."""

    credit: float = 0.0  # of 1
    read: str = ""  # the option, or options, that it reads
    failure: str = ""  # one of those above, "" where it was read
    counted: bool = True  # in the protocol's denominator


def mark(
    benchmark: Benchmark,
    question: Question,
    row: Mapping[str, Any] | None,
    protocol: str,
    judged: Mapping[str, Any] | None = None,
) -> Mark | None:
    """The mark of a stored answer (None where there is none); None where the protocol has no rule for it.

    `judged` is what a judge said of an open answer.
    """
    reading = benchmark.reading(protocol, question.kind)
    if protocol != "strict" and reading is None:
        return None
    if question.kind == "open":
        if judged is None or judged["score"] is None:
            return Mark(failure=UNJUDGED, counted=False)
        credit = judged["score"] / RUBRICS[question.rubric].most
        return Mark(credit, str(judged["score"]), counted=benchmark.counts_judged)
    if row is None or row.get("failure"):
        failure = UNASKED if row is None else str(row["failure"]["kind"])
        return Mark(failure=failure, counted=question.answer is not None)
    read = _read(question, row, protocol, reading.read if reading else None, reading.letters if reading else "")
    if question.answer is None:
        return Mark(read=read, failure=HIDDEN, counted=False)
    if question.kind == "exact":
        return Mark(float(exact_match(row["text"], question.answer)), row["text"])
    several = reading is not None and reading.several
    unread = not (set(read) if several else {read}) & set(question.letters)
    left_out = reading.leaves_out if reading else ""
    counted = not (left_out == "unread" and unread) and not (left_out == "empty" and not row["text"])
    if read == GUESS:
        return Mark(1 / len(question.options), failure=UNREAD, counted=counted)
    right = bool(question.answer) and (question.answer in read if several else question.answer == read)
    return Mark(float(right), read, UNREAD if unread else "", counted)


def _read(question: Question, row: Mapping[str, Any], protocol: str, read: Any, letters: str) -> str:
    if row.get("losses"):  # the likeliest option
        losses = row["losses"]
        return question.letters[min(range(len(losses)), key=losses.__getitem__)]
    text = row["text"]
    if protocol != "strict":
        return str(read(text, letters or question.letters, question.options))
    if question.kind == "exact":
        return text
    return _STRICT[question.kind](text, question.letters, question.options)


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a set of questions under a protocol, from 0 to 1."""

    estimate: Estimate
    questions: int  # in the denominator
    failures: Mapping[str, int]  # by kind; those of `FAILURES` count as wrong


@dataclasses.dataclass(frozen=True)
class Marked:
    """A question, its stored answer, and its marks by protocol."""

    question: Question
    row: Mapping[str, Any] | None
    marks: Mapping[str, Mark]


def mark_all(
    benchmark: Benchmark,
    questions: Iterable[Question],
    rows: Mapping[str, Mapping[str, Any]],
    judged: Mapping[str, Mapping[str, Any]],
) -> list[Marked]:
    """Every question with its marks under every protocol that has rules for it.

    `rows` are answers, and `judged` what a judge said of them, by question.
    """
    marked = []
    for question in questions:
        row = rows.get(question.id)
        said = judged.get(question.id)
        marks = {name: mark(benchmark, question, row, name, said) for name in PROTOCOLS}
        marked.append(Marked(question, row, {name: one for name, one in marks.items() if one is not None}))
    return marked


def score(benchmark: Benchmark, marked: Iterable[Marked], protocol: str) -> Score | None:
    """The benchmark's score under a protocol; None where it has no rule for any of the questions.

    Questions of a unit count as one, right as far as the worst of them is; the average is the benchmark's own.
    """
    chosen = [(one.question, one.marks[protocol]) for one in marked if protocol in one.marks]
    if not chosen:
        return None
    units: dict[str, tuple[Question, float]] = {}
    for question, found in chosen:
        if found.counted:
            name = question.unit or f"\0{question.id}"
            credit = min(found.credit, units[name][1]) if name in units else found.credit
            units[name] = question, credit
    strata = [question.groups[benchmark.average][0] for question, _ in units.values()] if benchmark.average else []
    made = estimate([c for _, c in units.values()], [q.video or q.id for q, _ in units.values()], strata)
    failures = collections.Counter(found.failure for _, found in chosen if found.failure)
    return Score(made, len(units), dict(failures))


def by_group(benchmark: Benchmark, marked: Sequence[Marked], protocol: str) -> dict[str, dict[str, Score]]:
    """axis -> name -> the score of its questions, which may stand in several groups of an axis."""
    plain = dataclasses.replace(benchmark, average="")
    names: dict[str, dict[str, list[Marked]]] = {}
    for one in marked:
        for axis, values in one.question.groups.items():
            for value in values:
                names.setdefault(axis, {}).setdefault(value, []).append(one)
    found = {
        axis: {name: score(plain, some, protocol) for name, some in groups.items()} for axis, groups in names.items()
    }
    return {axis: {name: made for name, made in groups.items() if made is not None} for axis, groups in found.items()}


def chance(benchmark: Benchmark, questions: Iterable[Question]) -> float:
    """The score of guesses, by the benchmark's own average."""
    units: dict[str, tuple[Question, float]] = {}
    for question in questions:
        if question.options and question.answer is not None:
            name = question.unit or f"\0{question.id}"
            units[name] = question, 1 / len(question.options) * (units[name][1] if name in units else 1.0)
    strata = [question.groups[benchmark.average][0] for question, _ in units.values()] if benchmark.average else []
    return estimate([share for _, share in units.values()], list(units), strata).mean
