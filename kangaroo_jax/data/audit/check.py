"""Checks media files: each is decoded from end to end, in worker processes that a file may crash."""

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.containers import member_suffix
from kangaroo_jax.data.media.decode import media_pool
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES, load_image, opened_image
from kangaroo_jax.data.media.kinds import kind_of, read_head
from kangaroo_jax.data.media.picker import (
    guesses_times,
    open_video,
    rate_of,
    start_seconds,
    stream_seconds,
    video_streams,
)
from kangaroo_jax.data.media.pixels import HDR, has_alpha
from kangaroo_jax.data.media.stamps import BestEffort
from kangaroo_jax.data.media.storage import current_cache, use_cache
from kangaroo_jax.data.media.video import folder_of_frames, is_pictures, probe
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.json_text import json_line
from kangaroo_jax.system.progress import Progress, Tell

Media = dict[tuple[str, str], str]  # (path, kind) -> a sample that uses it
_GLITCHES = 0.01  # the share of a video's frames that may step back a little
_STEP = 0.5  # a longer step back, in seconds, is more than a glitch: two files joined
_TRANSPARENT = "transparent: laid on white"
_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".m2ts", ".3gp")


@dataclasses.dataclass
class MediumReport:
    """One medium. `frames` and `seconds` are as decoded; `stated_seconds` is what the header says."""

    path: str
    kind: str
    sample: str = ""
    container: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    stated_seconds: float = 0.0
    seconds: float = 0.0
    start: float = 0.0
    frames: int = 0
    monotonic: bool = True
    problems: list[str] = dataclasses.field(default_factory=list)  # any of these makes it unfit for training as it is
    notes: list[str] = dataclasses.field(default_factory=list)


def media_of(conversations: Iterable[Conversation]) -> Media:
    """Every medium once, with the first sample that uses it."""
    media: Media = {}
    for conversation in conversations:
        for medium in conversation.media:
            for path in medium.frames or (medium.path,):
                media.setdefault((path, "image" if medium.frames else medium.kind), conversation.id)
    return media


def media_in(paths: Sequence[str], tell: Tell = print) -> Media:
    """Files, and all media in folders. Hidden files, and files that are no media by bytes or ending, are only counted.

    Raises UserError for a path that does not exist.
    """
    media: Media = {}
    for path in paths:
        if os.path.isdir(path):
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
            found = {str(file): _kind_in_folder(file, Path(path)) for file in files}
            if passed := sum(kind is None for kind in found.values()):
                tell(f"{short(path)}: {passed:,} hidden files and files of other kinds are passed over")
            media |= {(file, kind): "" for file, kind in found.items() if kind is not None}
        elif os.path.exists(path):
            media[path, _kind_of_file(path)] = ""
        else:
            raise UserError(f"{short(path)}: no such file or folder")
    return media


def _kind_in_folder(file: Path, folder: Path) -> str | None:
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return None
    if file.suffix.lower() not in (*IMAGE_SUFFIXES, *_ENDINGS):
        try:
            if kind_of(read_head(file)) is None:
                return None
        except UserError:
            return None
    return _kind_of_file(str(file))


def _kind_of_file(path: str) -> str:
    """The kind by the file's bytes; where they are ambiguous, by its ending."""
    try:
        kind = kind_of(read_head(path))
    except UserError:
        kind = None
    if kind in ("image", "video"):
        return kind
    return "image" if member_suffix(path) in IMAGE_SUFFIXES else "video"


def check_media(
    media: Media,
    report: Path,
    *,
    workers: int,
    seconds: float,
    tell: Tell = print,
) -> int:
    """Check all media, write a JSONL report, print the bad ones and a summary; returns the number of bad ones.

    Raises UserError where the report cannot be written.
    """
    pool = media_pool(check_one, max(1, workers), seconds, functools.partial(use_cache, current_cache()))
    start, bad, problems = time.perf_counter(), 0, collections.Counter[str]()
    progress = Progress("", len(media), "files", tell)
    temporary = report.with_name(report.name + ".tmp")
    total = {"image": 0, "video": 0, "frames": 0, "seconds": 0.0}
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            futures = [(path, kind, sample, pool.submit(path, kind)) for (path, kind), sample in media.items()]
            for path, kind, sample, future in futures:
                found = future.result()
                if isinstance(found, UserError):
                    found = MediumReport(path, kind, problems=[str(found)])
                found.sample = sample
                total[kind] += 1
                total["frames"] += found.frames
                total["seconds"] += found.seconds
                file.write(json_line(dataclasses.asdict(found)))
                if found.problems:
                    bad += 1
                    said = [problem.removeprefix(f"{short(path)}: ") for problem in found.problems]
                    problems[said[0].split(" (")[0][:60]] += 1
                    progress.say(f"BAD {short(path)}: {'; '.join(said)}")
                progress.add()
    except OSError as error:
        raise UserError(f"{report}: cannot write the report ({error.strerror or error})") from None
    finally:
        pool.close()
    temporary.replace(report)
    progress.say(
        f"{len(media):,} media ({total['image']:,} images, {total['video']:,} videos of "
        f"{total['seconds'] / 3600:.1f} h, {total['frames']:,} frames decoded) in "
        f"{time.perf_counter() - start:.1f} s: {bad:,} bad; see {report}"
    )
    for problem, count in problems.most_common(10):
        tell(f"  {count:6,}  {problem}")
    return bad


def check_one(path: str, kind: str) -> MediumReport:
    """Decode a whole medium. Problems are in the report; nothing is raised."""
    report = MediumReport(path, kind)
    try:
        if kind == "image":
            info = probe(path, "image")
            report.codec, report.width, report.height, report.frames = info.codec, info.width, info.height, 1
            load_image(path, 64)
            _note_alpha([path], report)
        elif os.path.isdir(path):
            frames = folder_of_frames(path)
            for frame in frames:
                load_image(frame, 64)
                report.frames += 1
            _note_alpha(frames, report)
        elif is_pictures(path, read_head(path)):
            info = probe(path, "video")
            report.codec, report.width, report.height, report.fps = info.codec, info.width, info.height, info.fps
            report.seconds = report.stated_seconds = info.seconds
            report.frames = round(info.fps * info.seconds)
            _note_alpha([path], report)
        else:
            _check_video(path, report)
    except UserError as error:
        report.problems.append(str(error))
    except Exception as error:  # a library fails on a broken file
        report.problems.append(f"cannot be read ({type(error).__name__}: {one_line(error)})")
    return report


def _check_video(path: str, report: MediumReport) -> None:
    with open_video(path) as (container, stream):
        codec = stream.codec_context
        report.container, report.codec = container.format.name, codec.name
        report.width, report.height = codec.width, codec.height
        report.fps, report.start = rate_of(container, stream), start_seconds(stream)
        report.stated_seconds = stream_seconds(path, container, stream)
        streams = len(video_streams(container))
        if streams > 1:
            report.notes.append(f"{streams} video streams: number {stream.index} is used, as by FFmpeg's players")
        if stream.metadata.get("alpha_mode") == "1" and codec.name in ("vp8", "vp9"):
            report.notes.append("transparent, which FFmpeg's decoder leaves out: shown without it")
        stamps, errors, seen = [], 0, set()
        best, guesses = BestEffort(), guesses_times(container, stream)
        packets: Any = container.demux(stream)
        packet = None
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                for frame in packet.decode():
                    errors += frame.is_corrupt
                    stamp = best.of(None if guesses else frame.pts, frame.dts)
                    if stamp is not None:
                        stamps.append(float(stamp * (frame.time_base or stream.time_base)))
                    report.frames += 1
                    seen |= set(_kinds_of_picture(frame))
            except av.error.FFmpegError:
                if packet is not None and packet.has_sidedata("encryption_info"):
                    raise UserError(f"{short(path)}: the video is encrypted") from None
                errors += 1
                if errors > 10_000:
                    break
    report.notes += sorted(seen)
    _judge(report, np.array(stamps), errors)


def _note_alpha(pictures: Sequence[str | Path], report: MediumReport) -> None:
    for path in pictures:
        with opened_image(path) as image:
            if image.has_transparency_data:
                report.notes.append(_TRANSPARENT)
                return


def _kinds_of_picture(frame: Any) -> Iterable[str]:
    """Notes on unusual kinds of pictures and how they are treated."""
    if name := HDR.get(int(frame.color_trc)):
        yield f"high dynamic range ({name}): shown as on a usual screen"
    if frame.interlaced_frame:
        yield "interlaced: frames hold the lines of two moments, and are not deinterlaced"
    if has_alpha(frame.format):
        yield _TRANSPARENT


def _judge(report: MediumReport, stamps: np.ndarray, errors: int) -> None:
    """Fill in the report from the frames' times and the number of errors."""
    steps = np.diff(stamps)
    back = int((steps <= 0).sum())
    report.monotonic = not back
    if not report.frames:
        report.problems.append("no frame can be decoded")
        return
    if errors:
        report.problems.append(f"{errors} damaged packets or frames")
    if back > max(1, _GLITCHES * len(steps)) or (back and steps.min() < -_STEP):
        report.problems.append(f"times step back {back} times, by up to {-steps.min():.2f} s: joined files, or damage")
    elif back:
        report.notes.append(f"times step back {back} times in {len(stamps):,} frames")
    if not len(stamps):
        report.notes.append("frames without times: the rate is assumed")
        return
    interval = 1 / report.fps if report.fps else 0.04
    report.seconds = round(float(stamps[-1] - stamps[0]) + interval, 4)
    if report.stated_seconds - report.seconds > max(1.0, 0.02 * report.stated_seconds):
        report.problems.append(f"frames end at {report.seconds:.2f} s of {report.stated_seconds:.2f} s: cut short")
    if len(stamps) > 2 and np.diff(stamps).max() > 1.5 * np.diff(stamps).min() + 1e-3:
        report.notes.append("variable frame rate")
