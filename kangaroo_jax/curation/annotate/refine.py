"""Refinement of a caption: which sentences are dropped, and a score of its reliability.

The paper drops repeated sentences by IoU. The use of word sets for it, and all else here, is our choice.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

from ml_collections import ConfigDict

from kangaroo_jax.llm_client.text import (
    content_words,
    iou,
    is_refusal,
    joined,
    language_share,
    length,
    repeats,
    sentences,
)

FrameTexts = Sequence[Sequence[str]]  # the captioners' texts for each frame


@dataclasses.dataclass(frozen=True)
class Refined:
    """A refined caption. `dropped` are (sentence, rule); `reason` says why the caption is unusable, or is empty."""

    text: str
    dropped: tuple[tuple[str, str], ...]
    reason: str


def refine(text: str, language: str, frames: FrameTexts | None, rules: ConfigDict) -> Refined:
    """Drop sentences that refuse, are in another language, are unsupported or repeated, or exceed the length.

    `frames` are captions of the frames in the same language, None if there are none. A sentence is dropped for the
    first rule that it breaks, in the order refusal, language, unsupported, repeated, length.
    """
    seen = frozenset[str]().union(*(content_words(t) for frame in frames for t in frame)) if frames else None
    kept: list[str] = []
    dropped: list[tuple[str, str]] = []
    for sentence in sentences(text):
        rule = _broken(sentence, kept, language, seen, rules)
        if rule:
            dropped.append((sentence, rule))
        else:
            kept.append(sentence)
    result = joined(kept, language)
    return Refined(result, tuple(dropped), _no_good(result, dropped, rules))


def _broken(sentence: str, kept: list[str], language: str, seen: frozenset[str] | None, rules: ConfigDict) -> str:
    """The first rule that a sentence breaks, or ""."""
    if is_refusal(sentence):
        return "refusal"
    if language_share(sentence, language) < rules.min_language:
        return "language"
    if seen is not None and (said := content_words(sentence)):
        if len(said & seen) < rules.min_sentence_support * len(said):
            return "unsupported"
    if any(repeats(sentence, earlier, rules.repeat_iou) for earlier in kept):
        return "repeated"
    if length(joined([*kept, sentence], language)) > rules.max_words:
        return "length"
    return ""


def _no_good(result: str, dropped: list[tuple[str, str]], rules: ConfigDict) -> str:
    if length(result) >= rules.min_words:
        return ""
    broken = [rule for _, rule in dropped if rule in ("refusal", "language", "unsupported")]
    cause = max(sorted(set(broken)), key=broken.count) if broken else "length"
    return f"{cause}: {length(result):g} words are left of {rules.min_words:g}"


def support(text: str, frames: FrameTexts) -> float:
    """The share of the content words that some frame caption also has, from 0 to 1."""
    said, seen = content_words(text), set().union(*(content_words(t) for frame in frames for t in frame))
    return len(said & seen) / len(said) if said else 0.0


def consensus(frames: FrameTexts) -> float | None:
    """Mean word-set IoU of two captions of a frame, over pairs and frames; None if no frame has two."""
    values = []
    for frame in frames:
        sets = [content_words(text) for text in frame]
        values += [iou(a, b) for a, b in itertools.combinations(sets, 2)]
    return statistics.fmean(values) if values else None


def score(text: str, supported: float | None, agreed: float | None, rules: ConfigDict) -> dict[str, float | None]:
    """Scores from 0 to 1: support, consensus, length, and the weighted mean of the known ones."""
    long_enough = min(length(text) / rules.full_length, 1.0)
    parts = (
        (supported, rules.support_weight),
        (agreed, rules.consensus_weight),
        (long_enough, rules.length_weight),
    )
    known = [(value, weight) for value, weight in parts if value is not None]
    total = sum(weight for _, weight in known)
    mean = sum(value * weight for value, weight in known) / total if total else 0.0
    return {
        "score": round(mean, 4),
        "support": None if supported is None else round(supported, 4),
        "consensus": None if agreed is None else round(agreed, 4),
        "length": round(long_enough, 4),
    }
