"""Decoding a video forward through its packets, and keeping the frames on display at given moments.

Between two moments only the frames that a kept frame needs are decoded: the picker seeks to a later key frame where
that is cheaper, and skips frames that no other refers to. Neither changes which frames are kept: the presentation
times of all packets decide which frame is on display.
"""

import collections
import contextlib
import errno
import functools
import math
import re
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.pixels import FrameScaler
from kangaroo_jax.data.media.stamps import BestEffort
from kangaroo_jax.data.media.storage import check_file, local
from kangaroo_jax.errors import UserError

MAX_FRAME_PIXELS = 8192 * 4608  # 8K; anything larger is refused before it is decoded
MAX_SECONDS = 24 * 3600.0
_ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means
_USUAL_RATE = 25  # frames a second, assumed where a file states none
# The cost of a seek, as measured (`kangaroo bench data --costs`): a fixed time, and as many decoded frames as the
# decoder holds back. These are constants, so that the same file is read in the same way everywhere.
_SEEK_SECONDS = 2e-3
_SEEK_FRAMES = 6
_SECONDS_PER_PIXEL = 2.5e-9
_BLIND_GAIN = 300  # frames to jump over that are worth a seek in a file without an index
MISSED_SHARE = 0.1  # the share of the moments that may lack their own frame because of damage
_HOLE = 1.0  # a gap of more seconds in a damaged file counts as damage, not as a still picture
SKIPPABLE = ("h264", "hevc", "mpeg4", "mpeg2video")  # codecs that mark frames that no other refers to
_READ_AHEAD = 8  # packets, in which to find what is on display next
_MOST_ERRORS = 10_000  # undecodable packets after which reading a file fails
# Playlists and scripts make a reader open other files, or the same file without end.
_PLAYLISTS = {"concat", "concatf", "dash", "hls", "imf", "rtsp", "sap", "sdp", "webm_dash_manifest"}
_OPEN = {
    "protocol_whitelist": "file,subfile",
    "format_whitelist": ",".join(sorted(av.formats_available - _PLAYLISTS)),
}
# PyAV 19 and later ignore text that is not UTF-8 by default.
_METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
_COVER, _DEFAULT = av.stream.Disposition.attached_pic.value, av.stream.Disposition.default.value
_TAG = re.compile(r"(\d+):(\d+):(\d+(?:[.,]\d*)?)")
_LENGTHS_DIFFER = 0.02  # the file's length may differ from the picture's by this share of it
_ONE_LENGTH = ("asf", "flv", "matroska,webm", "nut")  # formats that state only the whole file's length
_NO_TIMESTAMPS = 0x80  # FFmpeg's flag for raw streams, in which seeking is impossible
_RUN_UP = 1.0  # seconds to seek before a moment in an MPEG program stream: its first times after a seek are guesses


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a file, address or member; what libav or PyAV raises becomes a UserError."""
    name = short(path)
    member = member_of(path)
    file = local(path) if member is None else member.file
    check_file(file, name)
    if member is None:
        # "file:" and the whitelist keep names with colons and playlists from reaching the network.
        source: Any = f"file:{file}"
    else:
        source = member.ffmpeg_input()
    try:
        with av.open(source, options=_OPEN, **_METADATA) as container:
            stream = _best(name, container)
            codec = stream.codec_context
            if codec.width * codec.height > MAX_FRAME_PIXELS:
                raise UserError(f"{name}: {codec.width}x{codec.height} pixels is too large; resize it below 8K")
            codec.thread_count = 1  # one thread a video, many videos at a time
            codec.thread_type = "NONE"
            codec.options = {"err_detect": "explode"}  # report damage as an error instead of guessing a picture
            yield container, stream
    except (av.error.FFmpegError, OverflowError) as error:
        if getattr(error, "errno", 0) == errno.EINVAL:  # the format is not allowed, or the file is damaged
            raise UserError(f"{name}: not a readable video: damaged, or a playlist, which is not followed") from None
        detail = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(f"{name}: not a readable video, or damaged or cut short ({detail})") from None


def video_streams(container: Any) -> list[Any]:
    """The video streams, without cover pictures."""
    return [stream for stream in container.streams.video if not stream.disposition.value & _COVER]


def _best(name: str, container: Any) -> Any:
    """The decodable stream that FFmpeg would play. Raises UserError."""
    streams = video_streams(container)
    if not streams:
        raise UserError(f"{name}: no video stream in this file")
    known = [s for s in streams if s.codec_context is not None and s.codec_context.width and s.codec_context.height]
    if not known:
        raise UserError(f"{name}: the video stream cannot be decoded (unknown codec or no frame size)")
    best = container.streams.best("video")
    for stream in known:
        if stream.index == best.index:
            return stream
    return max(known, key=lambda s: (s.disposition.value & _DEFAULT, s.codec_context.width * s.codec_context.height))


def stream_seconds(path: str | Path, container: Any, stream: Any) -> float:
    """Length of the video stream in seconds, from the header, else counted from the packets. Raises UserError."""
    raw = container.format.flags & _NO_TIMESTAMPS  # FFmpeg guesses their length from a bit rate
    whole = container.duration / av.time_base if container.duration and not raw else 0.0
    stated = float(stream.duration * stream.time_base) if stream.duration and not raw else 0.0
    seconds = stated if container.format.name not in _ONE_LENGTH else 0.0
    seconds = seconds or _tagged_seconds(stream, whole)
    if not seconds:
        seconds = stated or whole
        if not seconds:
            seconds = _counted_seconds(path)
        elif len(container.streams) > 1 or not stream.average_rate or start_seconds(stream) > _LENGTHS_DIFFER * seconds:
            own = _picture_seconds(path, seconds)  # it may be the sound's, or the end by the file's clock
            seconds = own if own and abs(seconds - own) > _LENGTHS_DIFFER * own else seconds
    if seconds <= 0:
        raise UserError(f"{short(path)}: no frames in the video stream")
    return seconds


def _tagged_seconds(stream: Any, whole: float) -> float:
    """The length in the DURATION tag of Matroska and WebM ("00:00:10.040000000", counted from the file's zero).

    It is 0 if the tag is not a time, or is longer than the `whole` file.
    """
    match = _TAG.fullmatch(stream.metadata.get("DURATION", "").strip())
    if match is None:
        return 0.0
    end = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3].replace(",", "."))
    if whole and end > (1 + _LENGTHS_DIFFER) * whole + start_seconds(stream):
        return 0.0
    return max(end - start_seconds(stream), 0.0)


def rate_of(container: Any, stream: Any) -> float:
    """Mean frames a second; for a raw stream the rate in the pictures' own headers; 0 if unknown."""
    stated = stream.guessed_rate if container.format.flags & _NO_TIMESTAMPS else stream.average_rate
    return float(stated or 0)


def start_seconds(stream: Any) -> float:
    """The time of the first frame, in seconds of the file's own clock; 0 if the file does not state it."""
    return float((stream.start_time or 0) * stream.time_base)


def _picture_seconds(path: str | Path, seconds: float) -> float | None:
    """Length of the picture in a file of `seconds`, from its last packets, or counted if none are found there."""
    with open_video(path) as (container, stream):
        tick, begin = float(stream.time_base), start_seconds(stream)
        usual, ends = round(1 / float(stream.average_rate or _USUAL_RATE) / tick), []
        with contextlib.suppress(av.error.FFmpegError):
            container.seek(math.floor((begin + seconds) / tick), stream=stream)
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    shown = packet.duration if stream.average_rate else None  # without a rate it is only a tick
                    ends.append((packet.pts + (shown or usual)) * tick)
    return max(ends) - begin if ends else _counted_seconds(path)


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
        return packets / (rate_of(container, stream) or _USUAL_RATE)


def guesses_times(container: Any, stream: Any) -> bool:
    """Whether presentation times are guesses that step back: AVI with B-frames, which has decoding times only."""
    return container.format.name == "avi" and bool(stream.codec_context.has_b_frames)


class FramePicker:
    """Decodes forward through one file and keeps the frames on display at ascending times.

    A damaged stretch costs only its own frames: packets that cannot be decoded, and frames that the decoder
    made up, are left out. A moment whose frame is lost takes the frame before it, with that frame's own time.
    More than a tenth of such moments is an error.
    """

    def __init__(
        self, path: str | Path, container: Any, stream: Any, image_size: int, seconds: float | None = None
    ) -> None:
        """`seconds` is the time limit of decoding."""
        self._path, self._container, self._stream, self._side = short(path), container, stream, image_size
        self._tick = float(stream.time_base)
        self._interval = 1 / (rate_of(container, stream) or _USUAL_RATE)
        self._guessed = guesses_times(container, stream)
        known = stream.start_time is not None and not self._guessed
        self._zero: float | None = start_seconds(stream) if known else None
        self._stamps = BestEffort()
        self._stated = float((stream.duration or 0) * stream.time_base)
        self._deadline, self._limit = math.inf if seconds is None else clock.monotonic() + seconds, seconds
        self._pixels = FrameScaler(image_size, float(stream.sample_aspect_ratio or 1) or 1.0)
        codec = stream.codec_context
        self._gain = _SEEK_FRAMES + _SEEK_SECONDS / (_SECONDS_PER_PIXEL * codec.width * codec.height)
        # Seeking without an index needs a container that seeks to key frames, or a decoder that marks whole frames.
        self._blind = codec.name in ("h264", "hevc") or "matroska" in container.format.name
        self._may_seek = not container.format.flags & _NO_TIMESTAMPS
        self._run_up = _RUN_UP if container.format.name == "mpeg" else 0.0
        self._may_skip = codec.name in SKIPPABLE and not self._guessed
        self._near: collections.deque[float] = collections.deque(maxlen=3 * _READ_AHEAD)  # times of packets just read
        self._limit_time = -math.inf  # seconds; only the last frame up to here is wanted
        self._skipping = False
        self._errors = 0
        self._jumped = self._doubtful = False
        self._indexed = 0  # number of index entries that `_keys` was made from
        self._before = -self._interval  # time of the previous frame, by the file's own clock
        self._frames = self._decode()
        self.missed = 0

    @property
    def zero(self) -> float:
        """The time of the first frame by the file's own clock, seconds."""
        return self._zero or 0.0

    @property
    def damaged(self) -> bool:
        """Whether something read so far could not be decoded."""
        return self._errors > 0

    @property
    def divisible(self) -> bool:
        """Whether a seek may be relied on to lead to the frames that decoding from the start would."""
        return not self._guessed and not self._run_up

    @property
    def certain(self) -> bool:
        """Whether the frames so far follow from the file alone: a picker of other moments of it would agree."""
        return self.divisible and not self._errors and not self._doubtful and (self._stamps.plain or not self._jumped)

    def pick(
        self, times: np.ndarray, kept: np.ndarray | None = None, part_of: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames on display at `times` (ascending seconds of the file): uint8[k, S, S, 3], float64[n].

        Args:
            times: seconds, float64[n].
            kept: bool[n], the k moments whose pixels are wanted, and that count as missed; all of them where None.
            part_of: where these are a part, which must be `certain`: how many moments there are in all.

        Raises UserError: too many of them are damaged or missing, or a part is not certain.
        """
        kept = np.ones(len(times), bool) if kept is None else kept
        pixels = np.zeros((int(kept.sum()), self._side, self._side, 3), np.uint8)
        seen, k, missed, before = np.empty(len(times)), 0, 0, 0
        last: Any = None
        for i, (frame, shown_at) in enumerate(self.frames(times, part_of)):
            if part_of and not self.certain:
                raise UserError(f"{self._path}: some frames of it depend on others")
            seen[i] = shown_at
            if kept[i]:
                if last is frame:
                    pixels[k] = pixels[k - 1]
                else:
                    self._write_pixels(frame, pixels[k])
                last, k, missed = frame, k + 1, missed + self.missed - before
            before = self.missed
        self.missed = missed
        return pixels, seen

    def frames(self, times: np.ndarray, part_of: int | None = None) -> Iterator[tuple[Any, float]]:
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
            self._judge(time, slack, shown, shown_at, ahead, part_of or len(times))
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
        gap = abs(time - shown_at) > max(_HOLE, 4 * self._interval)
        self._doubtful |= gap and self._jumped  # Matroska's reader passes over damage without an error
        hole = self._errors and gap
        if over or hole:
            self.missed += 1
            if self.missed > int(MISSED_SHARE * count):
                if shown_at > time:
                    what = f"no frame can be decoded before {shown_at:.2f} s, for {time:.2f} s"
                else:
                    end = "its frames end at" if over else "no frame can be decoded after"
                    what = f"{end} {shown_at:.2f} s, before {time:.2f} s"
                lost = self._errors or hole or shown_at > time or time < self._stated
                raise UserError(f"{self._path}: {what}" + ("; the file is damaged or cut short" if lost else ""))

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """Decoding times of the key frames in the file's index, in seconds of the file's own clock."""
        entries = self._stream.index_entries
        self._indexed = len(entries)
        stamps = [entry.timestamp for entry in entries if entry.is_keyframe]
        return np.array(stamps, np.float64) * self._tick

    # --------------------------------------------------------------------------- packets

    def _decode(self) -> Iterator[tuple[Any, float]]:
        """Frames with their seconds from the first one, in display order, from the present position."""
        last = self._before
        self._stamps.flush()
        for frame, stamp in self._whole_frames():
            absolute = last + self._interval if stamp is None else stamp * float(frame.time_base or self._tick)
            if self._zero is None:
                self._zero = absolute
            last = absolute
            yield frame, absolute - self._zero

    def _whole_frames(self) -> Iterator[tuple[Any, int | None]]:
        """The decoder's frames and their stamps, without those between damage and the next key frame."""
        codec, whole = self._stream.codec_context, True
        for packet in self._packets():
            if clock.monotonic() > self._deadline:
                raise UserError(f"{self._path}: not decoded within {self._limit:g} s")
            self._set_skip(codec, packet)
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                if packet.has_sidedata("encryption_info"):
                    raise UserError(f"{self._path}: the video is encrypted") from None
                self._errors += 1
                if self._errors > _MOST_ERRORS:
                    raise
                whole = False
                continue
            for frame in frames:
                stamp = self._stamps.of(None if self._guessed else frame.pts, frame.dts)
                if frame.is_corrupt:
                    self._errors += 1
                whole = (whole or frame.key_frame) and not frame.is_corrupt
                if whole:
                    yield frame, stamp

    def _packets(self) -> Iterator[Any]:
        """The stream's packets, read a few ahead; an unreadable packet ends the file."""
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
        """Skip a frame that no other refers to if a later frame is on display by the moment."""
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
        """When the last frame leaves the display: by its stated duration, or after two mean intervals if that is later.

        AVI with B-frames has two more: its length counts the frames that the decoder holds back at the beginning.
        """
        stated = (frame.duration or 0) * float(frame.time_base or self._tick)
        return begin + max(stated, (4 if self._guessed else 2) * self._interval)

    def _should_seek(self, time: float, position: float) -> bool:
        """Whether a key frame worth jumping to lies between the decoder's position and `time`."""
        if not self._may_seek:
            return False
        if not self._keys.size:
            return self._blind and time - position >= _BLIND_GAIN * self._interval
        if time - position < self._gain * self._interval:
            return False
        last = np.searchsorted(self._keys, time + self.zero, side="right") - 1
        return bool(last >= 0 and self._keys[last] - self.zero - position >= self._gain * self._interval)

    def _jump(self, time: float, slack: float) -> tuple[Any, float, tuple[Any, float] | None]:
        """Seek to the last key frame not after `time`; further back if frames come out too late."""
        self._jumped, back = True, self._run_up
        while True:
            target = max(time - back, 0.0) + self.zero
            self._container.seek(math.floor(target / self._tick), stream=self._stream)
            if len(self._stream.index_entries) != self._indexed:  # a seek or packets extended the index
                self.__dict__.pop("_keys", None)
            self._before = math.inf if back < time else -self._interval  # a frame without a time does not help
            self._frames = self._decode()
            shown, shown_at = next(self._frames, (None, math.inf))
            if shown_at <= time + slack or back >= time:
                return shown, shown_at, next(self._frames, None)
            back = min(max(2 * back, 16 * self._interval), time)

    def _write_pixels(self, frame: Any, canvas: np.ndarray) -> None:
        self._pixels.write(frame, canvas)
