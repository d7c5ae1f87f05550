"""What is wrong with media files: each is decoded from end to end, in processes that may be lost to it."""

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data import animation
from kangaroo_jax.data.conversation import Conversation
from kangaroo_jax.data.decode import WorkerPool
from kangaroo_jax.data.image import IMAGE_SUFFIXES, load_image
from kangaroo_jax.data.picker import open_video, start_seconds, stream_seconds
from kangaroo_jax.data.storage import current_cache, member_suffix, short, use_cache
from kangaroo_jax.data.video import folder_of_frames, probe
from kangaroo_jax.json_text import json_line

Media = dict[tuple[str, str], str]  # (path, kind) -> a sample that uses it


@dataclasses.dataclass
class Report:
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
    problems: list[str] = dataclasses.field(default_factory=list)  # with any of these it cannot be trained on as it is
    notes: list[str] = dataclasses.field(default_factory=list)


def media_of(conversations: Iterable[Conversation]) -> Media:
    """Every medium once, with the first sample that uses it."""
    media: Media = {}
    for conversation in conversations:
        for medium in conversation.media:
            for path in medium.frames or (medium.path,):
                media.setdefault((path, "image" if medium.frames else medium.kind), conversation.id)
    return media


def media_in(paths: Sequence[str]) -> Media:
    """Files, and all files in folders. Raises UserError for a path that does not exist."""
    media: Media = {}
    for path in paths:
        if os.path.isdir(path):
            files = sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
        elif os.path.isfile(path):
            files = [path]
        else:
            raise UserError(f"{path}: no such file or folder")
        media |= {(file, "image" if member_suffix(file) in IMAGE_SUFFIXES else "video"): "" for file in files}
    return media


def check_media(
    media: Media, report: Path, *, workers: int, seconds: float, tell: Callable[[str], None] = print
) -> int:
    """Check all media, write a JSONL report of all, print the bad ones and a summary; returns how many are bad.

    Raises UserError where the report cannot be written.
    """
    pool = WorkerPool(check_one, max(1, workers), seconds, functools.partial(use_cache, current_cache()))
    start, bad, problems = time.perf_counter(), 0, collections.Counter[str]()
    temporary = report.with_name(report.name + ".tmp")
    total = {"image": 0, "video": 0, "frames": 0, "seconds": 0.0}
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            futures = [(path, kind, sample, pool.submit(path, kind)) for (path, kind), sample in media.items()]
            for number, (path, kind, sample, future) in enumerate(futures, start=1):
                found = future.result()
                if isinstance(found, UserError):
                    found = Report(path, kind, problems=[str(found)])
                found.sample = sample
                total[kind] += 1
                total["frames"] += found.frames
                total["seconds"] += found.seconds
                file.write(json_line(dataclasses.asdict(found)))
                if found.problems:
                    bad += 1
                    problems[found.problems[0].removeprefix(f"{short(path)}: ").split(" (")[0][:60]] += 1
                    tell(f"BAD {short(path)}: {'; '.join(found.problems)}")
                if number % 1000 == 0:
                    rate = number / (time.perf_counter() - start)
                    tell(f"{number:,} of {len(media):,}, {rate:.1f} files/s, ETA {(len(media) - number) / rate:.0f} s")
    except OSError as error:
        raise UserError(f"{report}: cannot write the report ({error.strerror or error})") from None
    finally:
        pool.close()
    temporary.replace(report)
    tell(
        f"{len(media):,} media ({total['image']:,} images, {total['video']:,} videos of "
        f"{total['seconds'] / 3600:.1f} h, {total['frames']:,} frames decoded) in "
        f"{time.perf_counter() - start:.1f} s: {bad:,} bad; see {report}"
    )
    for problem, count in problems.most_common(10):
        tell(f"  {count:6,}  {problem}")
    return bad


def check_one(path: str, kind: str) -> Report:
    """Decode one medium whole. Problems are in the report; nothing is raised."""
    report = Report(path, kind)
    try:
        if kind == "image":
            info = probe(path, "image")
            report.codec, report.width, report.height, report.frames = info.codec, info.width, info.height, 1
            load_image(path, 64)
        elif os.path.isdir(path):
            for frame in folder_of_frames(path):
                load_image(frame, 64)
                report.frames += 1
        elif member_suffix(path) in animation.SUFFIXES:
            info = probe(path, "video")
            report.codec, report.width, report.height, report.fps = info.codec, info.width, info.height, info.fps
            report.seconds = report.stated_seconds = info.seconds
            report.frames = round(info.fps * info.seconds)
        else:
            _check_video(path, report)
    except UserError as error:
        report.problems.append(str(error))
    except Exception as error:  # of a library, on a broken file
        report.problems.append(f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})")
    return report


def _check_video(path: str, report: Report) -> None:
    with open_video(path) as (container, stream):
        codec = stream.codec_context
        report.container, report.codec = container.format.name, codec.name
        report.width, report.height = codec.width, codec.height
        report.fps, report.start = float(stream.average_rate or 0), start_seconds(stream)
        report.stated_seconds = stream_seconds(path, container, stream)
        stamps, errors, last_decoded, ordered = [], 0, -np.inf, True
        packets: Any = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                if packet.dts is not None:
                    ordered &= packet.dts > last_decoded
                    last_decoded = packet.dts
                for frame in packet.decode():
                    errors += frame.is_corrupt
                    if frame.pts is not None:
                        stamps.append(float(frame.pts * (frame.time_base or stream.time_base)))
                    report.frames += 1
            except av.error.FFmpegError:
                errors += 1
                if errors > 10_000:
                    break
    _judge(report, np.array(stamps), errors, ordered)


def _judge(report: Report, stamps: np.ndarray, errors: int, ordered: bool) -> None:
    """What the frames say of the file."""
    report.monotonic = bool((np.diff(stamps) > 0).all()) and ordered
    if not report.frames:
        report.problems.append("no frame can be decoded")
        return
    if errors:
        report.problems.append(f"{errors} damaged packets or frames")
    if not report.monotonic:
        report.problems.append("presentation or decoding times do not ascend")
    if not len(stamps):
        report.notes.append("frames without times: the rate is assumed")
        return
    interval = 1 / report.fps if report.fps else 0.04
    report.seconds = round(float(stamps[-1] - stamps[0]) + interval, 4)
    if report.stated_seconds - report.seconds > max(1.0, 0.02 * report.stated_seconds):
        report.problems.append(f"frames end at {report.seconds:.2f} s of {report.stated_seconds:.2f} s: cut short")
    if len(stamps) > 2 and np.diff(stamps).max() > 1.5 * np.diff(stamps).min() + 1e-3:
        report.notes.append("variable frame rate")
