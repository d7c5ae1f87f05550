"""What a judge is asked about an open answer, in words of ours; scores by other judges or words are not comparable."""

import dataclasses
import json
import re
from collections.abc import Mapping

from kangaroo_jax.evaluation.benchmarks.question import Question
from kangaroo_jax.evaluation.extraction.strict import extract_letter

_JSON = re.compile(r"\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Rubric:
    """What a judge is told and asked, and how its reply is read.

    `marks` are the whole numbers that its reply must hold as JSON, each with its least and most; the score is their
    sum. Without marks the reply is the letter of the option that the answer implies, and the score 1 or 0.
    """

    name: str  # with a version, as it is part of the result
    system: str
    text: str  # with {question}, {truth}, {points} and {answer}
    marks: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def most(self) -> float:
        """The best score."""
        return float(sum(most for _, most in self.marks.values())) or 1.0

    def asked(self, question: Question, answer: str) -> str:
        """The text of a request."""
        row = question.row
        told = row.get("question") or question.text
        points = row.get("points") or "none"
        return self.text.format(question=told, truth=question.answer, points=points, answer=answer)

    def score(self, question: Question, reply: str) -> float | None:
        """The score in a judge's reply, None where it is none."""
        if not self.marks:
            letter = extract_letter(reply, "ABCDEFGHIJ")
            return float(letter == str(question.answer)[:1]) if letter or "none" in reply.lower() else None
        found = _JSON.findall(reply)
        try:
            value = json.loads(found[-1]) if found else None
        except ValueError:
            return None
        if not isinstance(value, dict) or set(value) != set(self.marks):
            return None
        for name, (least, most) in self.marks.items():
            if not isinstance(value[name], int) or isinstance(value[name], bool) or not least <= value[name] <= most:
                return None
        return float(sum(value.values()))


def _ending(marks: Mapping[str, tuple[int, int]]) -> str:
    form = ", ".join(f'"{name}": N' for name in marks)
    return f"Give your reasons in a sentence, then end with one JSON object of whole numbers: {{{{{form}}}}}"


_SIMILAR = {"score": (0, 3)}
_SCENE = {"accuracy": (1, 5), "relevance": (1, 5)}
_SUMMARY = {"completeness": (1, 5), "reliability": (1, 5)}
_ANSWERED = "Question: {question}\nTrue answer: {truth}\nAnswer to mark: {answer}\n"

RUBRICS = {
    "similarity": Rubric(
        "similarity 1",
        "You mark answers to questions about videos, which you cannot see, by the true answer. 3: it says the same, "
        "and nothing against it. 2: most of it. 1: a part of it. 0: nothing of it, the contrary, or nothing at all.",
        _ANSWERED + _ending(_SIMILAR),
        _SIMILAR,
    ),
    "sub_scene": Rubric(
        "sub_scene 1",
        "You mark answers to questions about one scene of a long video, which you cannot see. accuracy: the mean over "
        "the points to be named, each 5 if it is named, 3 if nearly, 1 if not, rounded. relevance: 5 if the answer is "
        "about nothing but the question and sure of it, 1 if it is about something else.",
        "Question: {question}\nPoints to be named: {points}\nAnswer to mark: {answer}\n" + _ending(_SCENE),
        _SCENE,
    ),
    "summary": Rubric(
        "summary 1",
        "You mark summaries of videos, which you cannot see, by a true summary. completeness: 5 if all main points of "
        "the true one are in it, 1 if hardly any. reliability: 5 if nothing in it is wrong or contradicts, 1 if much "
        "does; further details that may be true cost nothing.",
        "True summary: {truth}\nSummary to mark: {answer}\n" + _ending(_SUMMARY),
        _SUMMARY,
    ),
    "caption": Rubric(
        "caption 1",
        "You answer a multiple-choice question by a description of a video alone. Say only the letter of the option "
        "that the description supports, or None where it supports none.",
        "Description: {answer}\nQuestion: {question}\nThe letter, or None:",
    ),
}
