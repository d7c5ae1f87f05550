"""Probe: what a file is, whether it is whole, and the hash of its bytes.

All packets are read, and only a few frames are decoded, at some positions: enough to tell a damaged file from a whole
one at a fraction of the cost of decoding it.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import av
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.data.media import animation
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.image import image_size_of, load_image
from kangaroo_jax.data.media.kinds import read_head
from kangaroo_jax.data.media.picker import open_video, rate_of, start_seconds, stream_seconds
from kangaroo_jax.data.media.pixels import display_matrix, is_turned
from kangaroo_jax.data.media.storage import check_file, local
from kangaroo_jax.data.media.video import is_pictures
from kangaroo_jax.errors import UserError

_MOST_BAD = 1000  # undecodable packets, after which a position is given up


def probe(row: Row, settings: Settings, root: Path) -> Outcome:
    """Container, codec, size as displayed, seconds, frames a second, decodable share, sha256 of the file,
    `keys` (seconds of the key frames; none where every frame is one).

    Raises UserError: the file is missing, unreadable or too large.
    """
    path = row["path"]
    if not path:
        raise UserError(row.get("missing") or "no such file")
    scores: Row = {"sha256": _file_hash(path)}
    if row["kind"] == "image":
        width, height, codec = image_size_of(path)
        load_image(path, 32)  # decodes the whole image
        scores |= _shape(width, height, codec, codec, 0.0, 0.0, 1, 1.0)
    elif is_pictures(path, read_head(path)):
        ends, width, height, codec = animation.frame_ends(path)
        scores |= _shape(width, height, codec, codec, ends[-1], len(ends) / ends[-1], len(ends), 1.0)
    else:
        scores |= _video(path, settings)
    return Outcome(scores)


def _shape(
    width: int, height: int, container: str, codec: str, seconds: float, fps: float, frames: int, decodable: float
) -> Row:
    return {
        "container": container,
        "codec": codec,
        "width": width,
        "height": height,
        "seconds": rounded(seconds, 3),
        "fps": rounded(fps, 3),
        "frames": frames,
        "decodable": rounded(decodable),
    }


def _file_hash(path: str) -> str:
    member = member_of(path)
    place = local(path) if member is None else member.file
    check_file(place, short(path))  # reading a pipe or a device would not end
    if member is not None:
        return hashlib.sha256(member.read()).hexdigest()
    try:
        with open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{short(path)}: {error.strerror or error}") from None


def _video(path: str, settings: Settings) -> Row:
    with open_video(path) as (container, stream):
        codec = stream.codec_context
        if codec.width * codec.height > settings["max_pixels"]:
            raise UserError(f"{short(path)}: {codec.width}x{codec.height} pixels is too large")
        seconds = stream_seconds(path, container, stream)
        frames, present, keys = _packets(container, stream, seconds)
        whole, tried, turned = _sample(container, stream, seconds, settings)
        if not tried:
            raise UserError(f"{short(path)}: no frame can be decoded")
        width, height = codec.width * float(stream.sample_aspect_ratio or 1) or codec.width, codec.height
        width, height = (height, width) if turned else (width, height)
        fps = rate_of(container, stream) or frames / seconds
        shape = _shape(round(width), round(height), container.format.name, codec.name, seconds, fps, frames, 0.0)
        decodable = rounded(min(present, whole / tried))
        return shape | {"present": rounded(present), "decodable": decodable, "keys": keys}


def _packets(container: Any, stream: Any, seconds: float) -> tuple[int, float, list[float]]:
    """The number of packets, the share of the stated length that they cover, the times of key frames in seconds."""
    count, end, zero = 0, -math.inf, start_seconds(stream)
    keys: list[float] = []
    try:
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.is_keyframe:
                    keys.append(rounded(float(packet.pts * packet.time_base) - zero, 3))
            count += packet.size > 0
    except av.error.FFmpegError:
        pass  # the file ends at an unreadable packet
    return count, min(1.0, max(0.0, (end - zero) / seconds)) if count else 0.0, keys if len(keys) < count else []


def _sample(container: Any, stream: Any, seconds: float, settings: Settings) -> tuple[int, int, bool]:
    """The numbers of undamaged and tried frames, at positions spread over the file; whether width and height swap."""
    whole = tried = 0
    turned = False
    for place in np.linspace(0.0, seconds, settings["spans"], endpoint=False):
        try:
            offset = int((place + start_seconds(stream)) / float(stream.time_base))
            container.seek(offset, stream=stream)
            good, bad, lies = _decode_some(container, stream, settings["span_frames"])
        except av.error.FFmpegError:
            good, bad, lies = 0, settings["span_frames"], False
        whole, tried = whole + good, tried + good + bad
        turned |= lies
    return whole, tried, turned


def _decode_some(container: Any, stream: Any, count: int) -> tuple[int, int, bool]:
    good = bad = 0
    turned = False
    for packet in container.demux(stream):
        try:
            for frame in packet.decode():
                good, bad = good + (not frame.is_corrupt), bad + frame.is_corrupt
                turned = is_turned(display_matrix(frame))
        except av.error.FFmpegError:
            bad += 1
        if good >= count or bad >= min(count * 4, _MOST_BAD):
            break
    return good, bad, turned
