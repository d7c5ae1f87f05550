"""What makes a question unfit for a test of seeing, as far as its words alone tell."""

import re
import unicodedata
from collections.abc import Sequence

from kangaroo_jax.llm_client.text import content_words, iou, is_refusal, language_share, length, words

_CATCH_ALL = re.compile(
    r"\b(all|none|both|neither) of (the )?(above|these|them)\b|以上(都|皆|全)|都(不)?(是|对)$", re.I
)
_SAME = 0.9  # word-set IoU from which two options say the same
_LONGER = 2.0  # times the longest distractor, from which the answer's length gives it away


def flaw_of_question(question: str, answer: str, language: str) -> str:
    """What is wrong with a question and its answer, or nothing."""
    if not question.strip() or not answer.strip():
        return "empty"
    if is_refusal(answer) or is_refusal(question):
        return "refusal"
    if language_share(question, language) < 0.5:
        return "language"
    return ""


def flaw_of_options(question: str, answer: str, distractors: Sequence[str]) -> str:
    """What is wrong with options, or nothing: empty, alike, catch-all, or telling which of them is right."""
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
    """A text without case, accents of width, marks and spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if letter.isalnum())


def says_the_same(guess: str, answer: str, threshold: float) -> bool:
    """Whether a blind guess is about the true answer: equal, or with that overlap of words that say something."""
    if normal(guess) == normal(answer):
        return True
    a, b = (content_words(text) or set(words(text)) for text in (guess, answer))
    return iou(a, b) >= threshold
