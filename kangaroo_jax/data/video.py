"""Video files: which moments to look at, and the frames that are on display at those moments.

Time is in seconds from the first frame on display (a file's own clock may start anywhere), or from the
start of a clip. The frame at time t is the one on display then: the last whose presentation time is not
after t. Frames keep the presentation time that they were decoded with, whatever was asked for.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data.image import check_file, letterbox, load_image

MAX_FRAME_PIXELS = 8192 * 4608  # 8K; anything larger is refused before it is decoded
MAX_SECONDS = 24 * 3600.0
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means
_USUAL_RATE = 25  # frames a second of a file that does not say
_SEEK_GAIN = 12  # frames that a seek must save to be worth its own cost (measured: about 0.3 ms)


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

    def narrowed(self, fps: float | None = None, max_frames: int | None = None) -> "FramePolicy":
        """This policy with another rate and no more than `max_frames`, for one video; None keeps a value."""
        most = self.max_frames if max_frames is None else min(max_frames, self.max_frames)
        long_most = self.long_max_frames if max_frames is None else min(max_frames, self.long_max_frames)
        return dataclasses.replace(
            self,
            fps=self.fps if fps is None else fps,
            min_frames=min(self.min_frames, most),
            max_frames=most,
            long_min_frames=min(self.long_min_frames, long_most),
            long_max_frames=long_most,
        )


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file says of itself: pixels as stored (before any rotation), seconds, mean frames a second."""

    kind: str  # "image" or "video"
    width: int
    height: int
    seconds: float  # 0 for an image
    fps: float  # 0 where unknown
    codec: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """Decoded frames: pixels uint8[n, S, S, 3] (RGB, letterboxed), times float64[n] (seconds, clip clock).

    The frame that is already on display when a clip starts has time 0.
    """

    pixels: np.ndarray
    times: np.ndarray


# --------------------------------------------------------------------------------- sampling


def sample_times(duration_s: float, policy: FramePolicy) -> np.ndarray:
    """The moments to look at in a video of `duration_s` seconds: float64[n], ascending.

    The video is cut into n equal segments and each is seen at its middle. n is one a second (`fps`),
    clipped to the policy's range for that length, rounded up to a multiple of `policy.multiple`.
    """
    is_long = duration_s > policy.long_seconds
    least = policy.long_min_frames if is_long else policy.min_frames
    most = policy.long_max_frames if is_long else policy.max_frames
    count = round(min(max(duration_s * policy.fps, least), most))
    count = max(1, math.ceil(count / policy.multiple)) * policy.multiple
    if count > most:  # a range whose end is no multiple
        count = max(count - policy.multiple, policy.multiple)
    return (np.arange(count) + 0.5) * (duration_s / count)


# ------------------------------------------------------------------------------ public readers


def probe(path: str | Path) -> MediaInfo:
    """Size and length of an image or video, from its header.

    Raises:
        UserError: the file is missing, empty, unreadable, too large or without a video stream.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _probe_image(path)
    with _open(path) as (container, stream):
        codec = stream.codec_context
        return MediaInfo(
            kind="video",
            width=codec.width,
            height=codec.height,
            seconds=_duration(path, container, stream),
            fps=float(stream.average_rate or 0),
            codec=codec.name,
        )


def load_video(
    path: str | Path,
    *,
    image_size: int,
    policy: FramePolicy | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Clip:
    """Decode the frames on display at `times`, or at the moments that `policy` chooses.

    Args:
        path: anything that FFmpeg reads.
        image_size: S, pixels.
        policy: how to sample; give this or `times`.
        times: seconds from `start`, ascending.
        start, end: seconds of the file's clip to use; the whole file where None.

    Raises:
        UserError: the file cannot be opened, the clip lies outside it, it is damaged, or its frames end
            before the last time asked for.
    """
    if (policy is None) == (times is None):
        raise ValueError("load_video takes either policy or times")
    path = Path(path)
    with _open(path) as (container, stream):
        if policy is not None:
            begin, finish = clip_range(path, _duration(path, container, stream), start, end)
            times = sample_times(finish - begin, policy)
        offset = start or 0.0
        wanted = np.asarray(times, np.float64)
        if wanted.ndim != 1 or not wanted.size or (np.diff(wanted) < 0).any() or wanted[0] + offset < 0:
            raise ValueError("times must be a list of ascending seconds, none before the start of the file")
        picker = _Picker(path, container, stream, image_size)
        pixels, seen = picker.pick(wanted + offset)
    return Clip(pixels, np.maximum(seen - offset, 0.0))


def load_media(path: str | Path, kind: str, *, image_size: int, times: Sequence[float], start: float | None) -> Clip:
    """An image repeated for every time asked for, or the video frames at those times (see `load_video`)."""
    if kind == "image":
        pixels = load_image(path, image_size)
        return Clip(np.repeat(pixels[None], len(times), axis=0), np.zeros(len(times)))
    return load_video(path, image_size=image_size, times=times, start=start)


def clip_range(path: str | Path, duration_s: float, start: float | None, end: float | None) -> tuple[float, float]:
    """The seconds of a file that `start` and `end` leave; an end after the last frame is moved to it.

    Raises:
        UserError: nothing is left.
    """
    begin = start or 0.0
    finish = duration_s if end is None else min(end, duration_s)
    if begin < 0 or begin >= finish:
        raise UserError(
            f"{path}: no video between start {begin:g} s and end {duration_s if end is None else end:g} s; "
            f"it is {duration_s:.2f} s long"
        )
    return begin, finish


# ---------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a local file; what libav or PyAV raises becomes a UserError."""
    check_file(path)
    try:
        # "file:" and the whitelist keep names with colons, and playlists, away from the network.
        with av.open(f"file:{path}", options=_OPEN, metadata_errors="ignore") as container:
            streams = [s for s in container.streams.video if not int(s.disposition) & int(_COVER)]
            if not streams:
                raise UserError(f"{path}: no video stream in this file")
            stream = streams[0]
            codec = stream.codec_context
            if codec is None or not codec.width or not codec.height:
                raise UserError(f"{path}: the video stream cannot be decoded (unknown codec or no frame size)")
            if codec.width * codec.height > MAX_FRAME_PIXELS:
                raise UserError(f"{path}: {codec.width}x{codec.height} pixels is too large; resize it below 8K")
            codec.thread_count = 1  # one thread a video, many videos at a time
            codec.thread_type = "NONE"
            yield container, stream
    except av.error.FFmpegError as error:
        detail = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: not a readable video, or damaged or cut short ({detail})") from None


_OPEN = {"protocol_whitelist": "file"}
_COVER = av.stream.Disposition.attached_pic


def _duration(path: Path, container: Any, stream: Any) -> float:
    """Length of the video stream in seconds: the header's, or counted where it says nothing."""
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    elif tag := stream.metadata.get("DURATION"):  # Matroska and WebM: 00:00:10.040000000, from the file's zero
        hours, minutes, rest = tag.split(":")
        seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest) - _start_seconds(stream)
    elif container.duration:
        seconds = container.duration / av.time_base
    else:
        seconds = _counted_duration(path)
    if seconds <= 0:
        raise UserError(f"{path}: no frames in the video stream")
    if seconds > MAX_SECONDS:
        raise UserError(f"{path}: {seconds / 3600:.0f} hours is too long; give a clip of it (start, end)")
    return seconds


def _start_seconds(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _counted_duration(path: Path) -> float:
    """Read every packet of a file whose header gives no length (raw streams)."""
    first, last, packets = None, None, 0
    with _open(path) as (container, stream):
        for packet in container.demux(stream):
            packets += packet.size > 0
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = max(last or 0, packet.pts + (packet.duration or 0))
        if first is not None and last is not None and last > first:
            return float((last - first) * stream.time_base)
        return packets / float(stream.average_rate or _USUAL_RATE)


def _probe_image(path: Path) -> MediaInfo:
    from PIL import Image, UnidentifiedImageError

    check_file(path)
    try:
        with Image.open(path) as image:
            return MediaInfo("image", image.width, image.height, 0.0, 0.0, (image.format or "").lower())
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read; give a JPEG, PNG or WebP file") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot read the image ({' '.join(str(error).split())})") from None


# --------------------------------------------------------------------------------- decoding


class _Picker:
    """Decodes forward through one file and keeps the frames on display at ascending times.

    It seeks only where a later key frame precedes the next time wanted, so that no stretch is decoded
    twice, however the key frames lie.
    """

    def __init__(self, path: Path, container: Any, stream: Any, image_size: int) -> None:
        self._path, self._container, self._stream, self._side = path, container, stream, image_size
        self._tick = float(stream.time_base)
        self._interval = 1 / float(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
        self._zero: float | None = None if stream.start_time is None else _start_seconds(stream)
        self._reformatter = VideoReformatter()
        self._frames = self._decode()

    def pick(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames on display at `times` (ascending seconds of the file): uint8[n, S, S, 3], float64[n]."""
        slack = min(_ROUNDING, self._interval / 4)
        pixels = np.empty((len(times), self._side, self._side, 3), np.uint8)
        seen = np.empty(len(times))
        shown, shown_at = next(self._frames, (None, 0.0))
        ahead: tuple[Any, float] | None = next(self._frames, None)
        last: Any = None
        for i, time in enumerate(times):
            if ahead is not None and self._should_seek(time, ahead[1]):
                shown, shown_at, ahead = self._jump(time, slack)
            while ahead is not None and ahead[1] <= time + slack:
                shown, shown_at = ahead
                ahead = next(self._frames, None)
            if shown is None or (ahead is None and time > self._on_display_until(shown, shown_at) + slack):
                at = "no frame can be decoded" if shown is None else f"its frames end at {shown_at:.2f} s"
                raise UserError(f"{self._path}: {at}, before {time:.2f} s; the file is damaged or cut short")
            if last is shown:
                pixels[i] = pixels[i - 1]
            else:
                pixels[i] = self._to_pixels(shown)
            last, seen[i] = shown, max(shown_at, 0.0)
        return pixels, seen

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """When the key frames that the file's index names are decoded, in seconds of the file's own clock."""
        stamps = [entry.timestamp for entry in self._stream.index_entries if entry.is_keyframe]
        return np.array(stamps, np.float64) * self._tick

    def _decode(self) -> Iterator[tuple[Any, float]]:
        """Frames with their seconds from the first one, in display order, from the present position."""
        last = -self._interval
        for frame in self._container.decode(self._stream):
            stamp = frame.pts if frame.pts is not None else frame.dts
            absolute = last + self._interval if stamp is None else stamp * float(frame.time_base or self._tick)
            if self._zero is None:
                self._zero = absolute
            last = absolute
            yield frame, absolute - self._zero

    def _on_display_until(self, frame: Any, begin: float) -> float:
        """When the last frame leaves the display; two mean intervals where the file says nothing better."""
        stated = (frame.duration or 0) * float(frame.time_base or self._tick)
        return begin + max(stated, 2 * self._interval)

    def _should_seek(self, time: float, position: float) -> bool:
        """Whether a key frame worth jumping to lies between the decoder's position and `time`."""
        if time - position < _SEEK_GAIN * self._interval or not self._keys.size:
            return False
        zero = self._zero or 0.0
        last = np.searchsorted(self._keys, time + zero, side="right") - 1
        return bool(last >= 0 and self._keys[last] - zero - position >= _SEEK_GAIN * self._interval)

    def _jump(self, time: float, slack: float) -> tuple[Any, float, tuple[Any, float] | None]:
        """Seek to the last key frame not after `time`; further back if frames come out too late."""
        back = 0.0
        while True:
            target = max(time - back, 0.0) + (self._zero or 0.0)
            self._container.seek(math.floor(target / self._tick), stream=self._stream)
            self._frames = self._decode()
            shown, shown_at = next(self._frames, (None, math.inf))
            if shown_at <= time + slack or back >= time:
                return shown, shown_at, next(self._frames, None)
            back = min(max(2 * back, 16 * self._interval), time)

    def _to_pixels(self, frame: Any) -> np.ndarray:
        """uint8[S, S, 3]: RGB, turned as the file says, letterboxed."""
        rgb: np.ndarray = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        ratio = float(self._stream.sample_aspect_ratio or 1) or 1.0
        aspect = rgb.shape[1] * ratio / rgb.shape[0]
        if quarter_turns := round(frame.rotation / 90) % 4:
            rgb = np.ascontiguousarray(np.rot90(rgb, quarter_turns))
            aspect = 1 / aspect if quarter_turns % 2 else aspect
        return letterbox(rgb, self._side, aspect=aspect)
