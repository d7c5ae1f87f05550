"""Video files: which moments to sample, and the frames that are on display at those moments.

Time is in seconds from the first frame on display (a file's own clock may start anywhere), or from the
start of a clip. The frame at time t is the one on display then: the last whose presentation time is not
after t. Frames keep their own presentation time, not the requested one.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kangaroo_jax.data.media import animation, picker
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.containers import member_suffix
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES, image_size_of, load_image
from kangaroo_jax.data.media.kinds import is_picture_file, kind_of, read_head
from kangaroo_jax.data.media.picker import FramePicker, open_video, rate_of, stream_seconds
from kangaroo_jax.data.media.storage import local
from kangaroo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FramePolicy:
    """How many frames of a video to take: `fps` a second, within a range that depends on its length.

    Kangaroo takes 16 to 64 frames of a short video and 64 to 160 of one over 64 seconds (section 2 of
    the paper's notes); one a second and the rounding are inferred.
    """

    fps: float = 1.0
    min_frames: int = 16
    max_frames: int = 64
    long_seconds: float = 64.0  # a video longer than this takes the long range
    long_min_frames: int = 64
    long_max_frames: int = 160
    multiple: int = 2  # counts are a multiple of this: the frames that the patchify joins

    def narrowed(
        self,
        fps: float | None = None,
        max_frames: int | None = None,
        min_frames: int | None = None,
        nframes: int | None = None,
    ) -> "FramePolicy":
        """This policy for one video that asks for another rate or number of frames; None keeps a value.

        No video gets more frames than the policy's own range allows. `nframes` replaces the rate and the range.
        """
        if nframes is not None:
            nframes = min(nframes, max(self.max_frames, self.long_max_frames))
            same = dict.fromkeys(("min_frames", "max_frames", "long_min_frames", "long_max_frames"), nframes)
            return dataclasses.replace(self, **same)
        most = self.max_frames if max_frames is None else min(max_frames, self.max_frames)
        long_most = self.long_max_frames if max_frames is None else min(max_frames, self.long_max_frames)
        return dataclasses.replace(
            self,
            fps=self.fps if fps is None else fps,
            min_frames=min(min_frames or self.min_frames, most),
            max_frames=most,
            long_min_frames=min(min_frames or self.long_min_frames, long_most),
            long_max_frames=long_most,
        )


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file states about itself: pixels as stored (before rotation), seconds, mean frames a second."""

    kind: str  # "image" or "video"
    width: int
    height: int
    seconds: float  # 0 for an image
    fps: float  # 0 where unknown
    codec: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """Decoded frames: pixels uint8[n, S, S, 3] (RGB, letterboxed), times float64[n] (seconds, clip clock).

    The frame that is already on display when a clip starts has time 0. Where some moments alone were asked for, there
    are pixels of those alone, and times are NaN at moments that were not decoded.
    """

    pixels: np.ndarray
    times: np.ndarray
    zero: float = 0.0  # time 0 on the file's own clock, which `ffprobe` uses
    missed: int = 0  # moments whose own frame was damaged; they get an earlier one, with its own time
    damaged: bool = False  # whether a packet up to the last frame could not be decoded
    certain: bool = True  # whether these frames are the same for all who decode them with other moments of the file
    moments: tuple[int, ...] | None = None  # those that the pixels are of; None is all


# --------------------------------------------------------------------------------- sampling


def sample_times(duration_s: float, policy: FramePolicy) -> np.ndarray:
    """The moments to sample in a video of `duration_s` seconds: float64[n], ascending.

    The video is cut into n equal segments, and each is sampled at its middle. n is `policy.fps` times the duration,
    clipped to the policy's range for that length and rounded up to a multiple of `policy.multiple`.
    """
    is_long = duration_s > policy.long_seconds
    least = policy.long_min_frames if is_long else policy.min_frames
    most = policy.long_max_frames if is_long else policy.max_frames
    count = round(min(max(duration_s * policy.fps, least), most))
    count = max(1, math.ceil(count / policy.multiple)) * policy.multiple
    if count > most:  # the range's end is not a multiple
        count = max(count - policy.multiple, policy.multiple)
    return (np.arange(count) + 0.5) * (duration_s / count)


def clip_range(path: str | Path, duration_s: float, start: float | None, end: float | None) -> tuple[float, float]:
    """The range from `start` to `end` in seconds; an end after the last frame is moved to it.

    Raises:
        UserError: nothing is left, or more than a day.
    """
    begin = start or 0.0
    finish = duration_s if end is None else min(end, duration_s)
    if not 0 <= begin < finish:  # also true for NaN
        raise UserError(
            f"{short(path)}: no video between start {begin:g} s and end {duration_s if end is None else end:g} s; "
            f"it is {duration_s:.2f} s long"
        )
    if finish - begin > picker.MAX_SECONDS:
        raise UserError(f"{short(path)}: {(finish - begin) / 3600:.0f} hours is too long; give a clip (start, end)")
    return begin, finish


# ------------------------------------------------------------------------------ public readers


def probe(path: str | Path, kind: str | None = None, seconds: float | None = None) -> MediaInfo:
    """Size and length of an image or video, from its header.

    Args:
        path: a file, address or member of a container (`storage`).
        kind: "image" or "video"; by default decided by the first bytes. A GIF, WebP or PNG that moves may be
            either: by default its ending decides.
        seconds: give up on an animation after so many.

    Raises:
        UserError: the file is missing, empty, unreadable, too large or without a video stream.
    """
    head = read_head(path)
    if (kind or _kind_by_default(path, head)) == "image":
        width, height, codec = image_size_of(path)
        return MediaInfo("image", width, height, 0.0, 0.0, codec)
    if is_pictures(path, head):
        ends, width, height, codec = animation.frame_ends(path, seconds)
        return MediaInfo("video", width, height, ends[-1], len(ends) / ends[-1], codec)
    with open_video(path) as (container, stream):
        codec = stream.codec_context
        return MediaInfo(
            kind="video",
            width=codec.width,
            height=codec.height,
            seconds=stream_seconds(path, container, stream),
            fps=rate_of(container, stream),
            codec=codec.name,
        )


def _kind_by_default(path: str | Path, head: bytes) -> str:
    kind = kind_of(head)
    if kind in ("image", "video"):
        return kind
    return "image" if member_suffix(path) in IMAGE_SUFFIXES else "video"


def is_pictures(path: str | Path, head: bytes) -> bool:
    """Whether Pillow reads a video: WebP and PNG by their bytes, another still image by its ending."""
    return is_picture_file(head) or (member_suffix(path) in animation.SUFFIXES and kind_of(head) == "image")


def load_video(
    path: str | Path,
    *,
    image_size: int,
    policy: FramePolicy | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    start: float | None = None,
    end: float | None = None,
    seconds: float | None = None,
) -> Clip:
    """Decode the frames on display at `times`, or at the moments that `policy` chooses.

    Args:
        path: anything that FFmpeg reads, or an animated WebP or PNG; a file, address or member of a container.
        image_size: S, pixels.
        policy: how to sample; give this or `times`.
        times: seconds from `start`, ascending.
        start, end: seconds of the file's clip to use; the whole file where None.
        seconds: give up after so many.

    Raises:
        UserError: the file cannot be opened, the clip lies outside it, or its frames at more than a tenth
            of the times are damaged or missing.
    """
    if (policy is None) == (times is None):
        raise ValueError("load_video takes either policy or times")
    offset = start or 0.0
    if is_pictures(path, read_head(path)):
        length = animation.frame_ends(path, seconds)[0][-1] if policy is not None else math.inf
        wanted = _wanted(path, length, policy, times, start, end)
        pixels, seen = animation.pick(path, wanted + offset, image_size, seconds)
        return Clip(pixels, np.maximum(seen - offset, 0.0), offset)
    with open_video(path) as (container, stream):
        length = stream_seconds(path, container, stream) if policy is not None else math.inf
        wanted = _wanted(path, length, policy, times, start, end)
        picker = FramePicker(path, container, stream, image_size, seconds)
        pixels, seen = picker.pick(wanted + offset)
        return _clip(picker, pixels, np.maximum(seen - offset, 0.0), offset)


def load_moments(
    path: str | Path,
    moments: tuple[int, ...],
    *,
    image_size: int,
    times: Sequence[float] | np.ndarray,
    start: float | None = None,
    seconds: float | None = None,
) -> Clip:
    """The pixels of some `moments` (numbers of `times`, ascending), the very ones that `load_video` gives them.

    The others are decoded only where the whole video decides what these get: where something is damaged, or where a
    seek does not lead to the same frames. Otherwise as `load_video`.
    """
    offset = start or 0.0
    wanted = _wanted(path, math.inf, None, times, start, None)
    kept = np.isin(np.arange(len(wanted)), moments)
    seen = np.full(len(wanted), np.nan)
    if is_pictures(path, read_head(path)):
        pixels, seen[kept] = animation.pick(path, wanted[kept] + offset, image_size, seconds)
        return Clip(pixels, np.maximum(seen - offset, 0.0), offset, moments=moments)
    with contextlib.suppress(Exception), open_video(path) as (container, stream):
        picker = FramePicker(path, container, stream, image_size, seconds)
        if picker.divisible and not kept.all():
            # Each moment is reached from the one before it, so that what lies between is seen as in the whole video.
            visited = kept | np.append(kept[1:], False)
            pixels, seen[visited] = picker.pick(wanted[visited] + offset, kept[visited], len(wanted))
            seen[~kept] = np.nan
            return _clip(picker, pixels, np.maximum(seen - offset, 0.0), offset, moments)
    with open_video(path) as (container, stream):
        picker = FramePicker(path, container, stream, image_size, seconds)
        pixels, seen = picker.pick(wanted + offset, kept)
        return _clip(picker, pixels, np.maximum(seen - offset, 0.0), offset, moments)


def _clip(
    picker: FramePicker, pixels: np.ndarray, times: np.ndarray, offset: float, moments: tuple[int, ...] | None = None
) -> Clip:
    return Clip(pixels, times, picker.zero + offset, picker.missed, picker.damaged, picker.certain, moments)


def _wanted(
    path: str | Path,
    length: float,
    policy: FramePolicy | None,
    times: Sequence[float] | np.ndarray | None,
    start: float | None,
    end: float | None,
) -> np.ndarray:
    """Seconds from `start`, float64[n]."""
    if policy is not None:
        begin, finish = clip_range(path, length, start, end)
        times = sample_times(finish - begin, policy)
    wanted = np.asarray(times, np.float64)
    if wanted.ndim != 1 or not wanted.size or (np.diff(wanted) < 0).any() or wanted[0] + (start or 0.0) < 0:
        raise ValueError("times must be a list of ascending seconds, none before the start of the file")
    return wanted


def load_frames(
    frames: Sequence[str], times: Sequence[float], image_size: int, moments: tuple[int, ...] | None = None
) -> Clip:
    """Images as the frames of a video, one time for each; `moments` as of `Clip`. Raises UserError."""
    frames = frames if moments is None else [frames[moment] for moment in moments]
    pixels = np.empty((len(frames), image_size, image_size, 3), np.uint8)
    for i, path in enumerate(frames):
        pixels[i] = pixels[i - 1] if i and path == frames[i - 1] else load_image(path, image_size)
    return Clip(pixels, np.array(times, np.float64), moments=moments)


def load_media(
    path: str | Path,
    kind: str,
    *,
    image_size: int,
    times: Sequence[float],
    start: float | None,
    seconds: float | None = None,
    moments: tuple[int, ...] | None = None,
) -> Clip:
    """An image repeated for every time asked for, or the video frames at those times (see `load_video`).

    Where `moments` are given, the pixels are of those alone (see `load_moments`).
    """
    if kind == "image":
        pixels = np.repeat(load_image(path, image_size)[None], len(times if moments is None else moments), axis=0)
        return Clip(pixels, np.zeros(len(times)), moments=moments)
    if moments is None:
        return load_video(path, image_size=image_size, times=times, start=start, seconds=seconds)
    return load_moments(path, moments, image_size=image_size, times=times, start=start, seconds=seconds)


def folder_of_frames(path: str | Path) -> tuple[str, ...]:
    """The images in a folder, numbers in their names in numerical order. Raises UserError where there are none."""
    folder = local(path)
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    if not names:
        raise UserError(f"{short(path)}: a folder without images; a video's folder holds its frames")
    return tuple(str(folder / name) for name in sorted(names, key=animation.natural))


@dataclasses.dataclass(frozen=True)
class MediaRef:
    """Frames to decode: those of `path` on display `times` seconds after `start`; an image has time 0.

    A video given as images has one path in `frames` for each of `times`.
    """

    kind: str  # "image" or "video"
    path: str
    times: tuple[float, ...]  # seconds; their number is a multiple of the frames a group
    start: float | None = None  # seconds
    frames: tuple[str, ...] = ()
    moments: tuple[int, ...] | None = None  # numbers of the times whose pixels are wanted; None is all

    @property
    def wanted(self) -> int:
        """How many frames' pixels are wanted."""
        return len(self.times if self.moments is None else self.moments)


def probe_cached(path: str, kind: str | None = None, seconds: float | None = None) -> MediaInfo:
    """`probe`, remembered for the last 65,536 files while they stay unchanged. Raises UserError."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return probe(path, kind, seconds)  # an address, a container's member, or a missing file
    return _probe_version(path, kind, seconds, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=65_536)
def _probe_version(path: str, kind: str | None, seconds: float | None, _modified: int, _size: int) -> MediaInfo:
    return probe(path, kind, seconds)
