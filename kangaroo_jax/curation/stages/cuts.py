"""Cuts between scenes, and the clips that a long video is divided into.

One pass over the video, with what makes decoding cheap: small pictures, frames that no other refers to passed over,
no deblocking. PySceneDetect's content detector decides. The same pass counts the frames that can be decoded.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.data import animation
from kangaroo_jax.data.picker import open_video, start_seconds
from kangaroo_jax.data.storage import member_suffix, short
from kangaroo_jax.errors import UserError

_TICKS = 1000.0  # a second, of the detector's clock
_MOST_BAD = 10_000  # packets


def cuts(row: Row, settings: Settings, root: Path) -> Outcome:
    """Times of cuts, and the clips. An image is one clip, and so is a video up to `whole_seconds`."""
    if row["kind"] == "image":
        return Outcome({}, clips=((0.0, 0.0),))
    length = row["probe"]["seconds"]
    begin, end = row["start"] or 0.0, min(row["end"] if row["end"] is not None else math.inf, length)
    if begin >= end:
        raise UserError(f"no video between {begin:g} and {end:g} s; it is {length:g} s long")
    if member_suffix(row["path"]) in animation.SUFFIXES:
        found, decodable = [], 1.0
    else:
        found, decodable = _find(row["path"], begin, end, row["probe"], settings)
    spans = ((begin, end),)
    if end - begin > settings["whole_seconds"]:
        spans = clips_between(found, begin, end, settings["min_clip_seconds"], settings["max_clip_seconds"])
    return Outcome({"times": [rounded(t, 3) for t in found], "decodable": rounded(decodable)}, clips=spans)


def clips_between(
    cut_times: Sequence[float], begin: float, end: float, shortest: float, longest: float
) -> tuple[tuple[float, float], ...]:
    """Scenes joined until a clip has `shortest` seconds; a longer one than `longest` is divided evenly."""
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
    """Seconds of the cuts between `begin` and `end`, and the share of frames that could be decoded."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import ContentDetector

    detector = ContentDetector(settings["threshold"], float(settings["min_scene_seconds"]))
    scale = min(1.0, settings["side"] / max(probe["width"], probe["height"]))
    counts = {"whole": 0, "lost": 0}
    found: list[int] = []
    with open_video(path) as (container, stream):
        _hurry(stream)
        if begin > 0:
            container.seek(int((begin + start_seconds(stream)) / float(stream.time_base)), stream=stream)
        small = VideoReformatter()
        last = -1
        for frame, time in _frames(container, stream, end, counts):
            tick = round((time - begin) * _TICKS)
            if tick < 0 or tick <= last:
                continue
            last = tick
            size = {"width": max(16, round(frame.width * scale)), "height": max(16, round(frame.height * scale))}
            picture = small.reformat(frame, format="bgr24", interpolation=Interpolation.FAST_BILINEAR, threads=1, **size)
            code = FrameTimecode(tick, _TICKS)
            found += [cut.frame_num for cut in detector.process_frame(code, picture.to_ndarray())]
        if not counts["whole"]:
            raise UserError(f"{short(path)}: no frame can be decoded")
    return [begin + tick / _TICKS for tick in found], counts["whole"] / (counts["whole"] + counts["lost"])


def _hurry(stream: Any) -> None:
    codec = stream.codec_context
    codec.options = {"err_detect": "explode", "skip_loop_filter": "all"}  # damage is an error, as in training
    if codec.name in ("h264", "hevc", "mpeg4", "mpeg2video"):
        codec.skip_frame = "NONREF"


def _frames(container: Any, stream: Any, end: float, counts: dict[str, int]) -> Iterator[tuple[Any, float]]:
    """Whole frames with their seconds from the first one. Those from damage to the next key frame are lost."""
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
