"""Pictures for the stages: frames of a clip in their own shape, and the key frames that were written."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from av.video.reformatter import Interpolation

from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.data import animation
from kangaroo_jax.data.image import load_image
from kangaroo_jax.data.picker import FramePicker, open_video
from kangaroo_jax.data.storage import member_suffix
from kangaroo_jax.data.video import load_video
from kangaroo_jax.errors import UserError


def frames_at(row: Row, times: Sequence[float] | np.ndarray, side: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames on display at ascending `times` (seconds of the clip), longest side at most `side`, and their times.

    RGB, uint8[height, width, 3], contiguous. Raises UserError.
    """
    width, height = row["probe"]["width"], row["probe"]["height"]
    side = min(side, max(width, height))
    if row["kind"] == "image":
        return [_without_bars(load_image(row["path"], side), width, height)], np.zeros(1)
    start = row["start"] or 0.0
    if member_suffix(row["path"]) in animation.SUFFIXES:
        clip = load_video(row["path"], image_size=side, times=times, start=start)
        pixels, seen = clip.pixels, clip.times
    else:
        with open_video(row["path"]) as (container, stream):
            pixels, seen = _Picker(row["path"], container, stream, side).pick(np.asarray(times, np.float64) + start)
        seen = np.maximum(seen - start, 0.0)
    return [_without_bars(picture, width, height) for picture in pixels], seen


class _Picker(FramePicker):
    """Resizes as it converts to RGB (FFmpeg's bicubic): a third of the cost of doing one after the other."""

    def _to_pixels(self, frame: Any) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        ratio = float(self._stream.sample_aspect_ratio or 1) or 1.0
        aspect = frame.width * ratio / frame.height
        wide = self._side if aspect >= 1 else max(1, round(self._side * aspect))
        high = self._side if aspect < 1 else max(1, round(self._side / aspect))
        options: dict[str, Any] = {"format": "rgb24", "interpolation": Interpolation.BICUBIC, "threads": 1}
        rgb = np.rot90(self._reformatter.reformat(frame, wide, high, **options).to_ndarray(), turns)
        square = np.zeros((self._side, self._side, 3), np.uint8)
        top, left = (self._side - rgb.shape[0]) // 2, (self._side - rgb.shape[1]) // 2
        square[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
        return square


def times_within(row: Row, times: Sequence[float]) -> list[float]:
    """Those of the file's seconds that lie in the clip, as seconds of the clip."""
    return [time - row["start"] for time in times if row["start"] <= time < row["end"]]


def _without_bars(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """What a letterbox of a picture of that shape holds, without its bars."""
    side = picture.shape[0]
    wide, high = (side, max(1, round(side * height / width))) if width >= height else (0, side)
    wide = wide or max(1, round(side * width / height))
    top, left = (side - high) // 2, (side - wide) // 2
    return np.ascontiguousarray(picture[top : top + high, left : left + wide])


def key_frame_paths(row: Row, root: Path) -> list[Path]:
    """The JPEG files of a clip's key frames."""
    folder = root / "keyframes" / row["id"]
    return [folder / f"{k}.jpg" for k in range(len(row["keyframes"]["times"]))]


def key_frames(row: Row, root: Path) -> list[np.ndarray]:
    """The key frames, BGR as OpenCV has it: uint8[height, width, 3]. Raises UserError."""
    return list(_read(tuple(map(str, key_frame_paths(row, root))), row["keyframes"]["digest"]))


@functools.lru_cache(maxsize=2)  # several stages look at the same frames, one after the other
def _read(paths: tuple[str, ...], digest: str) -> tuple[np.ndarray, ...]:
    pictures = []
    for path in paths:
        picture = cv2.imread(path)
        if picture is None:
            raise UserError(f"{path}: this key frame is gone; remove its folder's stages/keyframes and run again")
        pictures.append(picture)
    return tuple(pictures)
