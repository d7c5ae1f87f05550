"""The words of published benchmarks in the quickstart: a share of its instruction data speaks them."""

from kangaroo_jax.corpus.text import Phrasing
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS


def phrasings() -> tuple[Phrasing, ...]:
    """How benchmarks put a question with lettered options, each in its first style; no two are alike."""
    found = []
    for styles in WORDINGS.values():
        kinds = next(iter(styles.values()))
        wording = kinds.get("choice", kinds.get(""))
        if wording is None or wording.likelihood or "{letter}" not in wording.option or "{subtitles}" in wording.text:
            continue
        if "{question}" in wording.text and "{options}" in wording.text:
            found.append(Phrasing(wording.text, wording.option, wording.system, wording.prefill))
    return tuple(dict.fromkeys(found))
