"""Decoding a video forward through its packets, and keeping the frames on display at given moments.

Of the frames between two moments only those are decoded that a kept frame needs: later key frames are
sought where that is cheaper, and frames that no other refers to are passed over. Neither changes what is
kept: the frame on display is decided by the presentation times of all packets.
"""

import collections
import contextlib
import errno
import functools
import math
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from kangaroo_jax.data.image import centre, check_file, fitted
from kangaroo_jax.data.storage import local, member_of, short
from kangaroo_jax.errors import UserError

MAX_FRAME_PIXELS = 8192 * 4608  # 8K; anything larger is refused before it is decoded
MAX_SECONDS = 24 * 3600.0
_ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means
_USUAL_RATE = 25  # frames a second of a file that does not say
# What decides whether to seek, as measured (`kangaroo bench data --costs`): a seek costs a fixed time and the frames
# that the decoder holds back, each as much as a frame decoded on the way. Constants, so that the same file is read
# in the same way everywhere.
_SEEK_SECONDS = 2e-3
_SEEK_FRAMES = 6
_SECONDS_PER_PIXEL = 2.5e-9
_BLIND_GAIN = 300  # frames, in a file without an index
_MISSED_SHARE = 0.1  # of the moments, that may have lost their own frame to damage
_HOLE = 1.0  # seconds without a frame, in a damaged file, that are damage and not a still picture
_LEAST_SIDE, _MOST_SHRINKING = 16, 32  # pixels, and times: beyond these a picture is scaled by PIL, not FFmpeg
SKIPPABLE = ("h264", "hevc", "mpeg4", "mpeg2video")  # codecs that know frames that no other refers to
_READ_AHEAD = 8  # packets, in which to find what is on display next
_MOST_ERRORS = 10_000  # packets that cannot be decoded, after which a file is given up
# Playlists and scripts make a reader open other files, again and again, or itself without end.
_PLAYLISTS = {"concat", "concatf", "dash", "hls", "imf", "rtsp", "sap", "sdp", "webm_dash_manifest"}
_OPEN = {
    "protocol_whitelist": "file,subfile",
    "format_whitelist": ",".join(sorted(av.formats_available - _PLAYLISTS)),
}
# Since PyAV 19 text that is not UTF-8 is no error anyhow.
_METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
_COVER = av.stream.Disposition.attached_pic.value


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a file, address or member; what libav or PyAV raises becomes a UserError."""
    name = short(path)
    member = member_of(path)
    if member is None:
        file = local(path)
        check_file(file, name)
        # "file:" and the whitelist keep names with colons, and playlists, away from the network.
        source: Any = f"file:{file}"
    else:
        source = member.ffmpeg_input()
    try:
        with av.open(source, options=_OPEN, **_METADATA) as container:
            streams = [s for s in container.streams.video if not s.disposition.value & _COVER]
            if not streams:
                raise UserError(f"{name}: no video stream in this file")
            stream = streams[0]
            codec = stream.codec_context
            if codec is None or not codec.width or not codec.height:
                raise UserError(f"{name}: the video stream cannot be decoded (unknown codec or no frame size)")
            if codec.width * codec.height > MAX_FRAME_PIXELS:
                raise UserError(f"{name}: {codec.width}x{codec.height} pixels is too large; resize it below 8K")
            codec.thread_count = 1  # one thread a video, many videos at a time
            codec.thread_type = "NONE"
            codec.options = {"err_detect": "explode"}  # damage is an error, and no guess at a picture
            yield container, stream
    except (av.error.FFmpegError, OverflowError) as error:
        if getattr(error, "errno", 0) == errno.EINVAL:  # of a format that is not allowed, and of some damage
            raise UserError(f"{name}: not a readable video: damaged, or a playlist, which is not followed") from None
        detail = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(f"{name}: not a readable video, or damaged or cut short ({detail})") from None


def stream_seconds(path: str | Path, container: Any, stream: Any) -> float:
    """Length of the video stream in seconds: the header's, or counted where it says nothing. Raises UserError."""
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    elif tag := stream.metadata.get("DURATION"):  # Matroska and WebM: 00:00:10.040000000, from the file's zero
        hours, minutes, rest = tag.split(":")
        seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest) - start_seconds(stream)
    elif container.duration:
        seconds = container.duration / av.time_base
    else:
        seconds = _counted_seconds(path)
    if seconds <= 0:
        raise UserError(f"{short(path)}: no frames in the video stream")
    if seconds > MAX_SECONDS:
        raise UserError(f"{short(path)}: {seconds / 3600:.0f} hours is too long; give a clip of it (start, end)")
    return seconds


def start_seconds(stream: Any) -> float:
    """When the first frame is on display, by the file's own clock; 0 where it does not say."""
    return float((stream.start_time or 0) * stream.time_base)


def _counted_seconds(path: str | Path) -> float:
    """Read every packet of a file whose header gives no length (raw streams, GIF)."""
    first, last, packets = None, None, 0
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            packets += packet.size > 0
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = max(last or 0, packet.pts + (packet.duration or 0))
        if first is not None and last is not None and last > first:
            return float((last - first) * stream.time_base)
        return packets / float(stream.average_rate or _USUAL_RATE)


class FramePicker:
    """Decodes forward through one file and keeps the frames on display at ascending times.

    A damaged stretch costs its own frames only: packets that cannot be decoded, and frames that the decoder
    had to make up, are left out; a moment that has lost its frame takes the one before it, with that frame's
    own time. More than a tenth of such moments is an error.
    """

    def __init__(
        self, path: str | Path, container: Any, stream: Any, image_size: int, seconds: float | None = None
    ) -> None:
        """`seconds` after which to give up."""
        self._path, self._container, self._stream, self._side = short(path), container, stream, image_size
        self._tick = float(stream.time_base)
        self._interval = 1 / float(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
        self._zero: float | None = None if stream.start_time is None else start_seconds(stream)
        self._deadline, self._limit = math.inf if seconds is None else clock.monotonic() + seconds, seconds
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()
        codec = stream.codec_context
        self._gain = _SEEK_FRAMES + _SEEK_SECONDS / (_SECONDS_PER_PIXEL * codec.width * codec.height)
        # Without an index: containers whose seeks end at key frames, decoders that say which frames are whole.
        self._blind = codec.name in ("h264", "hevc") or "matroska" in container.format.name
        self._may_skip = codec.name in SKIPPABLE
        self._near: collections.deque[float] = collections.deque(maxlen=3 * _READ_AHEAD)  # times of packets just read
        self._limit_time = -math.inf  # seconds: of the frames up to here only the last is wanted
        self._skipping = False
        self._errors = 0
        self._indexed = 0  # entries of the file's index that `_keys` are from
        self._frames = self._decode()
        self.missed = 0

    @property
    def zero(self) -> float:
        """The time of the first frame by the file's own clock, seconds."""
        return self._zero or 0.0

    def pick(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames on display at `times` (ascending seconds of the file): uint8[n, S, S, 3], float64[n].

        Raises UserError: too many of them are damaged or missing.
        """
        pixels = np.zeros((len(times), self._side, self._side, 3), np.uint8)
        seen = np.empty(len(times))
        last: Any = None
        for i, (frame, shown_at) in enumerate(self.frames(times)):
            if last is frame:
                pixels[i] = pixels[i - 1]
            else:
                self._write_pixels(frame, pixels[i])
            last, seen[i] = frame, shown_at
        return pixels, seen

    def frames(self, times: np.ndarray) -> Iterator[tuple[Any, float]]:
        """The decoder's own frame at each of `times` (ascending seconds of the file), and its time. See `pick`."""
        slack = min(_ROUNDING, self._interval / 4)
        self._limit_time = times[0] + slack
        shown, shown_at = next(self._frames, (None, 0.0))
        ahead: tuple[Any, float] | None = next(self._frames, None)
        for time in times:
            self._limit_time = time + slack
            if ahead is not None and self._should_seek(time, ahead[1]):
                shown, shown_at, ahead = self._jump(time, slack)
            shown, shown_at, ahead = self._forward(time + slack, shown, shown_at, ahead)
            self._judge(time, slack, shown, shown_at, ahead, len(times))
            yield shown, max(shown_at, 0.0)

    def _forward(
        self, time: float, shown: Any, shown_at: float, ahead: tuple[Any, float] | None
    ) -> tuple[Any, float, tuple[Any, float] | None]:
        while ahead is not None and ahead[1] <= time:
            shown, shown_at = ahead
            ahead = next(self._frames, None)
        return shown, shown_at, ahead

    def _judge(
        self, time: float, slack: float, shown: Any, shown_at: float, ahead: tuple[Any, float] | None, count: int
    ) -> None:
        """Count a moment without its own frame. Raises UserError once they are too many."""
        if shown is None:
            raise UserError(f"{self._path}: no frame can be decoded; the file is damaged or cut short")
        over = ahead is None and time > self._on_display_until(shown, shown_at) + slack
        hole = self._errors and abs(time - shown_at) > max(_HOLE, 4 * self._interval)
        if over or hole:
            self.missed += 1
            if self.missed > int(_MISSED_SHARE * count):
                if shown_at > time:
                    what = f"no frame can be decoded before {shown_at:.2f} s, for {time:.2f} s"
                else:
                    end = "its frames end at" if over else "no frame can be decoded after"
                    what = f"{end} {shown_at:.2f} s, before {time:.2f} s"
                raise UserError(f"{self._path}: {what}; the file is damaged or cut short")

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """When the key frames that the file's index names are decoded, in seconds of the file's own clock."""
        entries = self._stream.index_entries
        self._indexed = len(entries)
        stamps = [entry.timestamp for entry in entries if entry.is_keyframe]
        return np.array(stamps, np.float64) * self._tick

    # --------------------------------------------------------------------------- packets

    def _decode(self) -> Iterator[tuple[Any, float]]:
        """Frames with their seconds from the first one, in display order, from the present position."""
        last = -self._interval
        for frame in self._whole_frames():
            stamp = frame.pts if frame.pts is not None else frame.dts
            absolute = last + self._interval if stamp is None else stamp * float(frame.time_base or self._tick)
            if self._zero is None:
                self._zero = absolute
            last = absolute
            yield frame, absolute - self._zero

    def _whole_frames(self) -> Iterator[Any]:
        """Frames that the decoder gives, but for those from damage to the next key frame, which may refer to it."""
        codec, whole = self._stream.codec_context, True
        for packet in self._packets():
            if clock.monotonic() > self._deadline:
                raise UserError(f"{self._path}: not decoded within {self._limit:g} s")
            self._set_skip(codec, packet)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self._errors += 1
                if self._errors > _MOST_ERRORS:
                    raise
                whole = False
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._errors += 1
                whole = (whole or frame.key_frame) and not frame.is_corrupt
                if whole:
                    yield frame

    def _packets(self) -> Iterator[Any]:
        """The stream's packets, some of which were read ahead; the file ends where it cannot be read any further."""
        packets = self._container.demux(self._stream)
        waiting: collections.deque[Any] = collections.deque()
        self._near.clear()
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                self._errors += 1
                packet = None
            if packet is None:
                break
            if packet.pts is not None and packet.size and not packet.is_discard:
                self._near.append(packet.pts * self._tick)
            waiting.append(packet)
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _set_skip(self, codec: Any, packet: Any) -> None:
        """Pass over a frame that no other refers to, where another comes on display after it, not after the moment."""
        skip = False
        if packet.size and packet.pts is None:
            self._may_skip = False
        elif packet.size and self._may_skip:
            seconds, limit = packet.pts * self._tick, self._limit_time + self.zero
            skip = seconds < limit and any(seconds < other <= limit for other in self._near)
        if skip != self._skipping:
            self._skipping = skip
            codec.skip_frame = "NONREF" if skip else "DEFAULT"

    # ----------------------------------------------------------------------------- seeks

    def _on_display_until(self, frame: Any, begin: float) -> float:
        """When the last frame leaves the display; two mean intervals where the file says nothing better."""
        stated = (frame.duration or 0) * float(frame.time_base or self._tick)
        return begin + max(stated, 2 * self._interval)

    def _should_seek(self, time: float, position: float) -> bool:
        """Whether a key frame worth jumping to lies between the decoder's position and `time`."""
        if not self._keys.size:
            return self._blind and time - position >= _BLIND_GAIN * self._interval
        if time - position < self._gain * self._interval:
            return False
        last = np.searchsorted(self._keys, time + self.zero, side="right") - 1
        return bool(last >= 0 and self._keys[last] - self.zero - position >= self._gain * self._interval)

    def _jump(self, time: float, slack: float) -> tuple[Any, float, tuple[Any, float] | None]:
        """Seek to the last key frame not after `time`; further back if frames come out too late."""
        back = 0.0
        while True:
            target = max(time - back, 0.0) + self.zero
            self._container.seek(math.floor(target / self._tick), stream=self._stream)
            if len(self._stream.index_entries) != self._indexed:  # read at the first seek, or as far as packets were
                self.__dict__.pop("_keys", None)
            self._frames = self._decode()
            shown, shown_at = next(self._frames, (None, math.inf))
            if shown_at <= time + slack or back >= time:
                return shown, shown_at, next(self._frames, None)
            back = min(max(2 * back, 16 * self._interval), time)

    # ---------------------------------------------------------------------------- pixels

    def _write_pixels(self, frame: Any, canvas: np.ndarray) -> None:
        """Into uint8[S, S, 3], which is black: RGB, turned as the file says, its longest side S, centred."""
        ratio = float(self._stream.sample_aspect_ratio or 1) or 1.0
        aspect = frame.width * ratio / frame.height
        quarter_turns = round(frame.rotation / 90) % 4
        if quarter_turns % 2:
            height, width = fitted(1 / aspect, self._side)
        else:
            width, height = fitted(aspect, self._side)
        centre(np.rot90(self._scaled(frame, width, height), quarter_turns), canvas)

    def _scaled(self, frame: Any, width: int, height: int) -> np.ndarray:
        """uint8[height, width, 3], RGB; bicubic, antialiased.

        Brightness and colour differences are scaled before they become RGB: a sixth of the work of scaling RGB, and
        nearer to the picture, for the colours are kept at half the size and would be doubled pixel by pixel.
        """
        form = frame.format
        shrink = max(frame.width / width, frame.height / height)
        if form.is_rgb or len(form.components) != 3 or min(width, height) < _LEAST_SIDE or shrink > _MOST_SHRINKING:
            rgb = self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
        full = "yuvj444p" if form.name.startswith("yuvj") else "yuv444p"  # the j: brightness from 0 to 255
        small = self._scaler.reformat(
            frame, width=width, height=height, format=full, interpolation=Interpolation.BICUBIC, threads=1
        )
        return np.asarray(self._converter.reformat(small, format="rgb24", threads=1).to_ndarray())
