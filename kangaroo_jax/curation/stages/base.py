"""The stage type: a pure function of one row, its settings and the files that earlier stages wrote."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

Row = dict[str, Any]  # an item, with `ROW[stage]` for each stage that scored it
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A stage's result: scores as plain JSON, the clips of an item if it divides it, key frames as JPEG bytes."""

    scores: Row
    clips: tuple[tuple[float, float], ...] | None = None  # (start, end), seconds of the file
    files: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the pipeline. It runs again when its version, its settings or a stage that it follows changes."""

    name: str  # also the name of its section in the config
    version: int  # version of the code: raise it when the scores change
    after: tuple[str, ...]  # stages whose scores it reads; it skips rows that one of them could not score
    score: Callable[[Row, Settings, Path], Outcome]  # the row, the settings, the output folder
    kinds: tuple[str, ...] = ("video", "image")
    needs: tuple[str, ...] = ()  # packages that it imports
    score_many: Callable[[Sequence[Row], Settings, Path], list[Outcome]] | None = None  # scores `batch` rows at a time


def rounded(value: SupportsFloat, digits: int = 5) -> float:
    """The value rounded to `digits` decimal places, for JSON."""
    return round(float(value), digits)
