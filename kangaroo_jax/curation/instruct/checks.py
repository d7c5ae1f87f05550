"""Checks of a question's wording that show it is unfit to test whether a model sees the video."""

import re
import unicodedata
from collections.abc import Sequence

from kangaroo_jax.llm_client.text import content_words, iou, is_refusal, language_share, length, words

_CATCH_ALL = re.compile(
    r"\b(all|none|both|neither) of (the )?(above|these|them)\b|以上(都|皆|全)|都(不)?(是|对)$", re.I
)
_SAME = 0.9  # word-set IoU from which two options count as the same
_LONGER = 2.0  # an answer this many times longer than the longest distractor gives itself away


def flaw_of_question(question: str, answer: str, language: str) -> str:
    """The flaw of a question and its answer, or ""."""
    if not question.strip() or not answer.strip():
        return "empty"
    if is_refusal(answer) or is_refusal(question):
        return "refusal"
    if language_share(question, language) < 0.5:
        return "language"
    return ""


def flaw_of_options(question: str, answer: str, distractors: Sequence[str]) -> str:
    """The flaw of the options, or "": empty, alike, catch-all, or giving the answer away."""
    options = [answer, *distractors]
    if any(not option.strip() or "\n" in option.strip() for option in options):
        return "empty option"
    if any(_CATCH_ALL.search(option) for option in options):
        return "catch-all option"
    for i, one in enumerate(options):
        for other in options[:i]:
            if normal(one) == normal(other) or iou(set(words(one)), set(words(other))) >= _SAME:
                return "options alike"
    said = content_words(question)
    inside = [bool(content_words(option)) and content_words(option) <= said for option in options]
    if inside[0] and not any(inside[1:]):
        return "answer in the question"
    if length(answer) >= 6 and length(answer) > _LONGER * max(length(option) for option in distractors):
        return "answer longest by far"
    return ""


def normal(text: str) -> str:
    """A text in lower case and without width variants, punctuation and spaces, for comparison."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if letter.isalnum())


def says_the_same(guess: str, answer: str, threshold: float) -> bool:
    """Whether a blind guess matches the true answer: equal, or with a content-word IoU of at least `threshold`."""
    if normal(guess) == normal(answer):
        return True
    a, b = (content_words(text) or set(words(text)) for text in (guess, answer))
    return iou(a, b) >= threshold
