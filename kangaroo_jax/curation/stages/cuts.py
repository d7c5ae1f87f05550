"""Cuts between scenes, and the clips that a long video is divided into.

PySceneDetect's content detector finds the cuts in small pictures, decoded without deblocking and without the frames
that no other refers to. In a video that costs more than `full_pass_pixels`, only key frames are decoded, and the frames
between two of them only if those differ and the video is to be divided at its cuts. In a video that stays whole, cuts
only keep key frames and motion away from them, and packet sizes locate them: a packet that begins a scene is as large
as a key frame. The same pass counts the frames that can be decoded.
"""

import bisect
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.kinds import read_head
from kangaroo_jax.data.media.picker import SKIPPABLE, open_video, start_seconds
from kangaroo_jax.data.media.video import is_pictures
from kangaroo_jax.errors import UserError

_TICKS = 1000.0  # ticks a second of the detector's clock
_MOST_BAD = 10_000  # undecodable packets, after which reading stops
_OUT_OF_TURN = 0.9  # a key frame is out of turn below this share of the usual distance
_USUAL_SHARE = 0.1  # the usual distance occurs in at least this share of all: the encoder's own interval
_BYTE_PIXELS = 100  # pixels that take as long to decode as a byte, as measured
_SCENE_SIZE = 0.8  # a packet of this share of the larger adjacent key frame may begin a scene
_SCENE_RISE = 3.0  # it must also be this many times the median of the packets around it
_AROUND = 12  # packets before and after
_TAIL = 0.01  # seconds added to a span, so that it includes the key frame at its end


def cuts(row: Row, settings: Settings, root: Path) -> Outcome:
    """Times of cuts, and the clips. An image is one clip, as is a video of up to `whole_seconds`."""
    if row["kind"] == "image":
        return Outcome({}, clips=((0.0, 0.0),))
    length = row["probe"]["seconds"]
    begin, end = row["start"] or 0.0, min(row["end"] if row["end"] is not None else math.inf, length)
    if begin >= end:
        raise UserError(f"no video between {begin:g} and {end:g} s; it is {length:g} s long")
    if is_pictures(row["path"], read_head(row["path"])):
        found, decodable = list[float](), 1.0
    else:
        found, decodable = _find(row["path"], begin, end, row["probe"], settings)
    spans: tuple[tuple[float, float], ...] = ((begin, end),)
    if end - begin > settings["whole_seconds"]:
        spans = clips_between(found, begin, end, settings["min_clip_seconds"], settings["max_clip_seconds"])
    return Outcome({"times": [rounded(t, 3) for t in found], "decodable": rounded(decodable)}, clips=spans)


def clips_between(
    cut_times: Sequence[float], begin: float, end: float, shortest: float, longest: float
) -> tuple[tuple[float, float], ...]:
    """Scenes joined until a clip has `shortest` seconds; a clip longer than `longest` is divided evenly."""
    edges = [begin]
    for time in cut_times:
        if time - edges[-1] >= shortest and end - time >= shortest:
            edges.append(time)
    clips: list[tuple[float, float]] = []
    for first, last in zip(edges, [*edges[1:], end], strict=True):
        parts = max(1, math.ceil((last - first) / longest))
        inner = np.linspace(first, last, parts + 1)
        clips += [(rounded(a, 3), rounded(b, 3)) for a, b in zip(inner[:-1], inner[1:], strict=True)]
    return tuple(clips)


def _find(path: str, begin: float, end: float, probe: Row, settings: Settings) -> tuple[list[float], float]:
    """The times of the cuts between `begin` and `end`, and the share of frames that could be decoded."""
    counts = {"whole": 0, "lost": 0}
    pixels = probe["width"] * probe["height"] * probe["frames"]
    with open_video(path) as (container, stream):
        shrink = _Shrink(settings["side"] / max(probe["width"], probe["height"]))
        cost = (pixels + _BYTE_PIXELS * max(0, container.size)) * (end - begin) / probe["seconds"]
        found, spans = list[float](), [(begin, end, False)]
        if cost > settings["full_pass_pixels"]:
            packets, keys = _key_pictures(container, stream, begin, end, counts, shrink)
            found, spans = _between_keys(keys, end, settings["threshold"])
            if end - begin <= settings["whole_seconds"]:
                found, spans = found + [time for span in spans for time in cuts_by_size(packets, *span)], []
        for first, last, _ in spans:
            found += _scan(container, stream, first, last, counts, shrink, settings)
        if not counts["whole"]:
            raise UserError(f"{short(path)}: no frame can be decoded")
    apart: list[float] = []
    for time in sorted(found):
        if not apart or time - apart[-1] >= settings["min_scene_seconds"]:
            apart.append(time)
    return apart, counts["whole"] / (counts["whole"] + counts["lost"])


class _Shrink:
    """Converts frames to small BGR pictures."""

    def __init__(self, scale: float) -> None:
        self._scale, self._reformatter = min(1.0, scale), VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        width, height = (max(16, round(side * self._scale)) for side in (frame.width, frame.height))
        options: dict[str, Any] = {"format": "bgr24", "interpolation": Interpolation.FAST_BILINEAR, "threads": 1}
        return self._reformatter.reformat(frame, width, height, **options).to_ndarray()


def _scan(
    container: Any,
    stream: Any,
    begin: float,
    end: float,
    counts: dict[str, int],
    shrink: _Shrink,
    settings: Settings,
) -> list[float]:
    """The cuts that PySceneDetect finds from `begin` to `end`."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import ContentDetector

    detector = ContentDetector(settings["threshold"], float(settings["min_scene_seconds"]))
    _hurry(stream, "NONREF")
    _seek(container, stream, begin)
    found: list[int] = []
    last = -1
    for frame, time in _frames(container, stream, end, counts):
        tick = round((time - begin) * _TICKS)
        if tick > last:
            last = tick
            code = FrameTimecode(tick, _TICKS)
            found += [cut.frame_num for cut in detector.process_frame(code, shrink(frame))]
    return [begin + tick / _TICKS for tick in found]


_Packet = tuple[float, int, bool]  # seconds, bytes, whether it is a key frame
_Span = tuple[float, float, bool]  # seconds; whether the key frames at its ends differ as much as two scenes


def _key_pictures(
    container: Any, stream: Any, begin: float, end: float, counts: dict[str, int], shrink: _Shrink
) -> tuple[list[_Packet], list[tuple[float, np.ndarray]]]:
    """All packets in display order, and small pictures of the key frames with their times."""
    _hurry(stream, "NONKEY")
    _seek(container, stream, begin)
    packets: list[_Packet] = []
    keys = [(time, shrink(frame)) for frame, time in _frames(container, stream, end, counts, packets)]
    return sorted(packets), keys


def _between_keys(
    keys: Sequence[tuple[float, np.ndarray]], end: float, threshold: float
) -> tuple[list[float], list[_Span]]:
    """Cuts that the key frames alone show, and the spans that may have others.

    Frames between two similar key frames are not decoded. An encoder places a key frame out of turn where the picture
    changes: if the two differ, the cut is there. If they differ and the later one came in turn, the cut is between
    them.
    """
    gaps = np.diff([time for time, _ in keys])
    turn = usual_gap(gaps) * _OUT_OF_TURN
    found, spans = list[float](), list[_Span]()
    for k, gap in enumerate(gaps):
        difference = _difference(keys[k][1], keys[k + 1][1])
        if difference >= threshold and gap < turn:
            found.append(keys[k + 1][0])
        elif difference >= threshold / 2:
            spans.append((keys[k][0], keys[k + 1][0] + _TAIL, difference >= threshold))
    if keys:
        spans.append((keys[-1][0], end, False))
    return found, spans


def usual_gap(gaps: np.ndarray) -> float:
    """The longest frequent gap of float[n] seconds, else the longest one; 0 without any."""
    for gap in np.sort(gaps)[::-1]:
        if (np.abs(gaps - gap) < 0.02 * gap).sum() >= max(2, _USUAL_SHARE * len(gaps)):
            return float(gap)
    return float(gaps.max(initial=0.0))


def cuts_by_size(packets: Sequence[_Packet], begin: float, end: float, differ: bool) -> list[float]:
    """The times of packets (seconds, bytes, whether a key frame; ascending) that are large enough to begin a scene.

    If there is none and the key frames differ, the later key frame begins the scene.
    """
    times = [time for time, _, _ in packets]
    first, last = bisect.bisect_right(times, begin + _TAIL), bisect.bisect_left(times, end)
    beside = max((size for time, size, is_key in packets if is_key and begin - _TAIL <= time <= end), default=0)
    found = []
    for k in range(first, last):
        around = [size for _, size, _ in (*packets[max(0, k - _AROUND) : k], *packets[k + 1 : k + 1 + _AROUND])]
        if not packets[k][2] and packets[k][1] >= max(
            _SCENE_SIZE * beside, _SCENE_RISE * statistics.median(around or [0])
        ):
            found.append(times[k])
    return found or ([end - _TAIL] if differ else [])


def _difference(one: np.ndarray, two: np.ndarray) -> float:
    """Mean absolute difference of hue, saturation and value, as in the content detector."""
    return float(cv2.absdiff(cv2.cvtColor(one, cv2.COLOR_BGR2HSV), cv2.cvtColor(two, cv2.COLOR_BGR2HSV)).mean())


def _seek(container: Any, stream: Any, time: float) -> None:
    container.seek(int((time + start_seconds(stream)) / float(stream.time_base)), stream=stream)


def _hurry(stream: Any, skip: str) -> None:
    """Skip deblocking, and frames that no other refers to ("NONREF") or all but key frames ("NONKEY")."""
    codec = stream.codec_context
    codec.options = {"err_detect": "explode", "skip_loop_filter": "all"}  # damage is an error, as in training
    if skip == "NONKEY" or codec.name in SKIPPABLE:
        codec.skip_frame = skip


def _frames(
    container: Any, stream: Any, end: float, counts: dict[str, int], read: list[_Packet] | None = None
) -> Iterator[tuple[Any, float]]:
    """Undamaged frames with their times from the first one. Frames between damage and the next key frame are lost.

    The packets are appended to `read`.
    """
    zero = start_seconds(stream)
    whole = True
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None or counts["lost"] > _MOST_BAD:
            return
        if read is not None and packet.size and packet.pts is not None:
            read.append((float(packet.pts * packet.time_base) - zero, packet.size, packet.is_keyframe))
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            counts["lost"] += 1
            whole = False
            continue
        for frame in frames:
            whole = (whole or frame.key_frame) and not frame.is_corrupt
            counts["whole" if whole else "lost"] += 1
            if whole and frame.pts is not None:
                time = float(frame.pts * frame.time_base) - zero
                if time >= end:
                    return
                yield frame, time
