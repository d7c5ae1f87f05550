"""Pictures for the stages: frames of a clip in their own shape, and the key frames that were written.

Key frames and motion use the same moments where their settings allow (`places`). The engine scores them one after the
other for each clip, and `greys_at` gives the second stage the pictures that the first has decoded in this process. That
changes only the cost: the frame on display at a time does not depend on who decodes it.
"""

import dataclasses
import functools
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.kinds import read_head
from kangaroo_jax.data.media.picker import FramePicker, open_video
from kangaroo_jax.data.media.pixels import display_matrix, is_turned, upright
from kangaroo_jax.data.media.video import is_pictures, load_video
from kangaroo_jax.errors import UserError

_AFTER_KEY = 0.15  # seconds after a key frame, away from a cut there
_DIGITS = 6  # decimals of a time, so that two stages ask for the same moment by the same number


# ------------------------------------------------------------------------- where to look


def places(seconds: float, count: int, reach: float, keys: Sequence[float]) -> np.ndarray:
    """The times at which to begin a span of `reach` seconds, one in each of `count` equal parts: float64[count].

    A span lies around the middle of its part, or begins after the nearest frame from which decoding can start (`keys`)
    within a quarter of the part. It goes no further, because copies have other key frames and are recognised by what
    they show at the same times. `reach` is at most half of a part.
    """
    part = seconds / count
    found = np.empty(count)
    for k in range(count):
        found[k] = after_key((k + 0.5) * part - reach / 2, keys, _AFTER_KEY, part / 4)
    return found.round(_DIGITS)


def after_key(middle: float, keys: Sequence[float], margin: float, reach: float) -> float:
    """The time `margin` seconds after a key frame that is nearest to `middle`, within `reach`; else `middle`."""
    near = [key + margin for key in keys if abs(key + margin - middle) <= reach]
    return min(near, key=lambda time: abs(time - middle), default=middle)


def times_within(row: Row, times: Sequence[float]) -> list[float]:
    """The times (seconds of the file) that lie in the clip, as seconds of the clip."""
    return [time - row["start"] for time in times if row["start"] <= time < row["end"]]


# ------------------------------------------------------------------------------ decoding


@dataclasses.dataclass(frozen=True)
class Picture:
    """The picture on display at a time, converted on demand; it keeps the decoder's frame in memory."""

    time: float  # when it came on display, seconds of the clip
    _source: Any  # a decoder's frame, or RGB as uint8[height, width, 3]
    _shape: tuple[int, int]  # width and height on display
    _reformatter: VideoReformatter | None = None

    def grey(self, short_side: int) -> np.ndarray:
        """Luma, uint8[height, width], shorter side at most `short_side`."""
        scale = min(1.0, short_side / min(self._shape))
        return self._converted("gray", scale, Interpolation.AREA)

    def colour(self, side: int) -> np.ndarray:
        """RGB, uint8[height, width, 3], longer side at most `side`."""
        return self._converted("rgb24", min(1.0, side / max(self._shape)), Interpolation.BICUBIC)

    def _converted(self, form: str, scale: float, interpolation: Interpolation) -> np.ndarray:
        width, height = (max(1, round(side * scale)) for side in self._shape)
        if self._reformatter is None:
            small = cv2.resize(self._source, (width, height), interpolation=cv2.INTER_AREA)
            return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY) if form == "gray" else small
        matrix = display_matrix(self._source)
        size = (height, width) if is_turned(matrix) else (width, height)
        options: dict[str, Any] = {"format": form, "interpolation": interpolation, "threads": 1}
        # Resizing during conversion takes a third of the time of doing one after the other.
        return np.ascontiguousarray(
            upright(self._reformatter.reformat(self._source, *size, **options).to_ndarray(), matrix)
        )


def pictures_at(row: Row, times: Sequence[float] | np.ndarray, side: int) -> Generator[Picture]:
    """The pictures on display at ascending `times` (seconds of the clip), one after the other.

    Args:
        side: pixels of the longer side; images and animations are read no larger.

    Raises UserError.
    """
    shape = row["probe"]["width"], row["probe"]["height"]
    start = row["start"] or 0.0
    if row["kind"] == "image":
        yield _from_array(load_image(row["path"], min(side, max(shape))), shape, 0.0)
    elif is_pictures(row["path"], read_head(row["path"])):
        clip = load_video(row["path"], image_size=min(side, max(shape)), times=times, start=start)
        for pixels, time in zip(clip.pixels, clip.times, strict=True):
            yield _from_array(pixels, shape, float(time))
    else:
        reformatter = VideoReformatter()
        with open_video(row["path"]) as (container, stream):
            picker = FramePicker(row["path"], container, stream, side)
            for frame, time in picker.frames(np.asarray(times, np.float64) + start):
                yield Picture(max(time - start, 0.0), frame, shape, reformatter)


def _from_array(square: np.ndarray, shape: tuple[int, int], time: float) -> Picture:
    """The picture of that shape in a letterboxed uint8[S, S, 3], without the bars."""
    scale = square.shape[0] / max(shape)
    width, height = (max(1, round(side * scale)) for side in shape)
    top, left = (square.shape[0] - height) // 2, (square.shape[0] - width) // 2
    inner = np.ascontiguousarray(square[top : top + height, left : left + width])
    return Picture(time, inner, (width, height))


# ---------------------------------------------------------------- what was decoded before

_Clip = tuple[Any, ...]
_remembered: tuple[_Clip, Mapping[float, np.ndarray]] = ((), {})


def remember_greys(row: Row, short_side: int, greys: Mapping[float, np.ndarray]) -> None:
    """Keep the pictures that `greys_at` would decode for this clip, instead of those of the last one."""
    global _remembered
    _remembered = _clip(row, short_side), dict(greys)


def greys_at(row: Row, times: np.ndarray, short_side: int) -> list[np.ndarray]:
    """Luma at ascending `times` (seconds of the clip): uint8[height, width], shorter side at most `short_side`.

    Raises UserError.
    """
    clip, known = _remembered
    found = dict(known) if clip == _clip(row, short_side) else {}
    times = np.round(times, _DIGITS)
    missing = [time for time in dict.fromkeys(times.tolist()) if time not in found]
    if missing:
        shape = row["probe"]["width"], row["probe"]["height"]
        side = math.ceil(short_side * max(shape) / min(shape))
        pictures = pictures_at(row, missing, side)
        found |= {time: picture.grey(short_side) for time, picture in zip(missing, pictures, strict=True)}
    return [found[time] for time in times.tolist()]


def _clip(row: Row, short_side: int) -> _Clip:
    return row["path"], row["probe"]["sha256"], row["start"], row["end"], short_side


# ---------------------------------------------------------------------------- key frames


def key_frame_paths(row: Row, root: Path) -> list[Path]:
    """The JPEG files of a clip's key frames."""
    folder = root / "keyframes" / row["id"]
    return [folder / f"{k}.jpg" for k in range(len(row["keyframes"]["times"]))]


def key_frames(row: Row, root: Path) -> list[np.ndarray]:
    """The key frames in OpenCV's BGR: uint8[height, width, 3]. Raises UserError."""
    return list(_read(tuple(map(str, key_frame_paths(row, root))), row["keyframes"]["digest"]))


@functools.lru_cache(maxsize=2)  # several stages read the same frames, one after the other
def _read(paths: tuple[str, ...], digest: str) -> tuple[np.ndarray, ...]:
    pictures = []
    for path in paths:
        picture = cv2.imread(path)
        if picture is None:
            raise UserError(f"{path}: this key frame is gone; remove its folder's stages/keyframes and run again")
        pictures.append(picture)
    return tuple(pictures)
