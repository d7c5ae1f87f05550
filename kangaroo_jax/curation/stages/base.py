"""What a stage is: a pure function of one row, its settings and the files that earlier stages wrote."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

Row = dict[str, Any]  # an item, with `ROW[stage]` for each stage that scored it
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Scores, which are plain JSON; the clips of an item, where the stage divides it; key frames as JPEG bytes."""

    scores: Row
    clips: tuple[tuple[float, float], ...] | None = None  # (start, end), seconds of the file
    files: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the pipeline. What it wrote is made anew when its version, its settings or what it follows change."""

    name: str  # also of its section in the config
    version: int  # of its code: raise it when it gives other scores
    after: tuple[str, ...]  # stages whose scores it reads; it skips rows that one of them could not score
    score: Callable[[Row, Settings, Path], Outcome]  # the row, the settings, the output folder
    kinds: tuple[str, ...] = ("video", "image")
    needs: tuple[str, ...] = ()  # packages
    score_many: Callable[[Sequence[Row], Settings, Path], list[Outcome]] | None = None  # of `batch` rows at a time


def rounded(value: SupportsFloat, digits: int = 5) -> float:
    """Rounded to the significant digits, for JSON."""
    return round(float(value), digits)
