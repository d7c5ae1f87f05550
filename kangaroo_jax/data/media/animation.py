"""Moving pictures in image files: WebP and PNG animations, which FFmpeg does not read in full.

(GIF goes through FFmpeg as any other video.)
"""

import math
import re
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.image import MAX_PIXELS, letterbox, opened_image, to_rgb
from kangaroo_jax.errors import UserError

SUFFIXES = (".webp", ".png", ".apng")
MAX_FRAMES = 100_000
MAX_FRAME_PIXELS = 1 << 35  # pixels of all frames together: about a minute of decoding
_USUAL_MS = 100.0  # duration of a frame that states none, as in browsers
_ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means


def frame_ends(path: str | Path, seconds: float | None = None) -> tuple[list[float], int, int, str]:
    """When each frame leaves the display (seconds), width, height, format.

    Args:
        path: a file, address or member of a container.
        seconds: give up after so many.

    Raises UserError.
    """
    ends: list[float] = []
    with opened_image(path) as image:
        size, codec = image.size, (image.format or "").lower()
        for frame in _frames(path, image, seconds):
            image.load()  # WebP gives the time on display only once the frame is loaded
            ends.append((ends[-1] if ends else 0.0) + _seconds(frame))
    return ends, *size, codec


def pick(path: str | Path, times: np.ndarray, side: int, seconds: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The frames on display at ascending `times`: uint8[n, S, S, 3] and their own times, float64[n].

    After so many `seconds` it gives up.

    Raises UserError: an unreadable frame, or times after the end.
    """
    pixels, seen = np.empty((len(times), side, side, 3), np.uint8), np.empty(len(times))
    begin, i = 0.0, 0
    with opened_image(path) as image:
        for frame in _frames(path, image, seconds):
            image.load()
            end = begin + _seconds(frame)
            shown = None
            while i < len(times) and times[i] < end - _ROUNDING:
                if shown is None:
                    shown = letterbox(to_rgb(frame), side)
                pixels[i], seen[i] = shown, begin
                i += 1
            last, begin = frame, end
            if i == len(times):
                return pixels, seen
        if times[-1] <= begin + _ROUNDING:
            pixels[i:], seen[i:] = letterbox(to_rgb(last), side), begin - _seconds(last)
            return pixels, seen
    raise UserError(f"{short(path)}: its frames end at {begin:.2f} s, before {times[-1]:.2f} s")


def _frames(path: str | Path, image: Any, seconds: float | None) -> Iterator[Any]:
    deadline = math.inf if seconds is None else clock.monotonic() + seconds
    count, pixels = getattr(image, "n_frames", 1), image.width * image.height
    if count > MAX_FRAMES or pixels > MAX_PIXELS or count * pixels > MAX_FRAME_PIXELS:
        raise UserError(f"{short(path)}: {count} frames of {image.width}x{image.height} pixels are too many")
    for i in range(count):
        if clock.monotonic() > deadline:
            raise UserError(f"{short(path)}: not decoded within {seconds:g} s")
        image.seek(i)
        yield image


def _seconds(frame: Any) -> float:
    return float(frame.info.get("duration") or _USUAL_MS) / 1000


def natural(name: str) -> list[Any]:
    """A key that sorts numbers in names by their value."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
