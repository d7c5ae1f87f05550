"""Subtitles as text: the lines that are on display with the frames that are looked at."""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files

NONE = "No subtitles available"

_TIME = re.compile(r"(\d+):(\d+):(\d+(?:[.,]\d+)?)")
_TAGS = re.compile(r"<[^<>]*>")
_SHORT = 1.0  # seconds; shorter lines of LongVideoBench count as that long


class Line(NamedTuple):
    """A line, on display from `start` up to but not at `end`, seconds of the video."""

    start: float
    end: float
    text: str


def on_display(path: str, times: Iterable[float], begins: float = 0.0) -> str:
    """The lines of a file that are on display at any of `times`, in their order; `NONE` where there is no file.

    `begins` is the second of the file at which the video begins. Raises UserError where it cannot be read.
    """
    return "\n".join(line.text for line in lines_on_display(path, times, begins)) or NONE


def lines_on_display(path: str, times: Iterable[float], begins: float = 0.0) -> list[Line]:
    """The same as lines, none where there is no file."""
    if not os.path.exists(path):
        return []
    seconds = sorted(times)
    lines = _lines(Path(path), begins, max(seconds, default=0.0) + 1.0)
    return [line for line in lines if any(line.start <= second < line.end for second in seconds)]


def _lines(path: Path, begins: float, last: float) -> list[Line]:
    if path.suffix == ".srt":
        return [Line(start - begins, end - begins, text) for start, end, text in _srt(path)]
    lines = []
    for where, row in files.rows(path):
        try:
            if "timestamp" in row:
                start, end = row["timestamp"]
                end, text = last + begins if end is None else end, row["text"]
            else:
                start, end, text = _seconds(row["start"]), _seconds(row["end"]), row["line"]
            start, end = float(start) - begins, float(end) - begins
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: no line of subtitles (timestamp and text, or start, end and line)") from None
        if end - start < _SHORT:
            middle = (start + end) / 2
            start, end = middle - _SHORT / 2, middle + _SHORT / 2
        lines.append(Line(math.nextafter(start, math.inf), end, str(text)))
    return lines


def _srt(path: Path) -> Iterable[Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable subtitles ({getattr(error, 'strerror', None) or error})") from None
    for block in re.split(r"\r?\n\s*\r?\n", text):
        rows = block.strip().splitlines()
        if len(rows) > 2 and (times := _TIME.findall(rows[1])) and len(times) == 2:
            start, end = (int(h) * 3600 + int(m) * 60 + float(s.replace(",", ".")) for h, m, s in times)
            yield Line(start, end, " ".join(_TAGS.sub("", row).strip() for row in rows[2:]))


def _seconds(text: str) -> float:
    found = _TIME.fullmatch(text.strip())
    if not found:
        raise ValueError(text)
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3].replace(",", "."))
