"""Whether a benchmark's files are whole, before an hour is spent on them; and where they come from."""

import collections
import dataclasses
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.video import clip_range, folder_of_frames, load_video, probe_cached
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.files import is_there
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.progress import Progress, Tell

_SIDE = 32  # pixels to which the frames that are tried are decoded
_LISTED = 20  # files or questions of a kind that are named


@dataclasses.dataclass(frozen=True)
class Checked:
    """What there is of a benchmark, and what is wrong with it."""

    questions: int
    hidden: int  # whose answers are not public
    media: int
    missing: tuple[str, ...]  # files that are not there
    broken: tuple[str, ...]  # "FILE: why" of those that cannot be read
    faults: tuple[str, ...]  # of the benchmark itself
    twice: tuple[str, ...]  # ids that several questions have

    @property
    def complete(self) -> bool:
        """Whether every question can be asked."""
        return not (self.missing or self.broken or self.twice)


def data_of(benchmark: Benchmark, data: Path) -> Path:
    """The folder of a benchmark's files: `data/NAME` where there is one, else `data` itself. Raises UserError."""
    folder = data / benchmark.name
    if not data.exists():
        raise UserError(f"--data={data}: no such folder")
    return folder if folder.is_dir() else data


def questions_of(benchmark: Benchmark, data: Path, limit: int = 0) -> list[Question]:
    """The questions of a benchmark, or the first `limit`. Raises UserError: its files are not as they should be."""
    questions = list(benchmark.read(data_of(benchmark, data)))
    if not questions:
        raise UserError(f"{data}: there is no question of {benchmark.name} in its files")
    for question in questions:
        if question.kind not in ("exact", "open") and not question.options:
            raise UserError(f"{data}: question {question.id} of {benchmark.name} has no options")
    return questions[:limit] if limit else questions


def check(benchmark: Benchmark, questions: Sequence[Question], tell: Tell = print) -> Checked:
    """Look at every file once: is it there, and can its first and last second be decoded?"""
    media = {(medium.path, medium.start, medium.end, medium.frames): medium for q in questions for medium in q.media}
    missing = [medium.path for medium in media.values() if not is_there(medium)]
    there = [medium for medium in media.values() if is_there(medium)]
    progress = Progress(f"check {benchmark.name}", len(there), "files", tell)

    def tried(medium: Media) -> str:
        fault = _broken(medium)
        progress.add()
        return fault

    with ThreadPoolExecutor(usable_cpus()) as pool:
        broken = [fault for fault in pool.map(tried, there) if fault]
    ids = collections.Counter(question.id for question in questions)
    return Checked(
        questions=len(questions),
        hidden=sum(question.answer is None for question in questions),
        media=len(media),
        missing=tuple(dict.fromkeys(missing)),
        broken=tuple(broken),
        faults=tuple(question.fault for question in questions if question.fault),
        twice=tuple(name for name, count in ids.items() if count > 1),
    )


def _broken(medium: Media) -> str:
    """Why a medium cannot be read, "" where it can."""
    try:
        if medium.kind == "image":
            _look(medium.path)
        elif medium.frames or os.path.isdir(medium.path):
            for frame in dict.fromkeys(medium.frames or folder_of_frames(medium.path)):
                _look(frame)
        else:
            seconds = probe_cached(medium.path, "video").seconds
            begin, end = clip_range(medium.path, seconds, medium.start, medium.end)
            last = max(end - begin - 1.0, 0.0)
            load_video(medium.path, image_size=_SIDE, times=[0.0, last], start=medium.start)
    except UserError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=65_536)
def _look(path: str) -> None:
    """Read an image, which several videos may have as a frame, once. Raises UserError."""
    load_image(path, _SIDE)


def report(benchmark: Benchmark, found: Checked) -> list[str]:
    """The lines that say what was found."""
    expected = benchmark.questions
    differs = f" (it has {expected:,})" if expected and expected != found.questions else ""
    hidden = f", of which {found.hidden:,} have no public answer" if found.hidden else ""
    lines = [f"{benchmark.name}: {found.questions:,} questions{differs}{hidden}, about {found.media:,} media"]
    for what, names in (
        ("missing", found.missing),
        ("broken", found.broken),
        ("fault of the benchmark", found.faults),
        ("the id of several questions", found.twice),
    ):
        lines += [f"  {what}: {name}" for name in names[:_LISTED]]
        if len(names) > _LISTED:
            lines.append(f"  {what}: {len(names) - _LISTED:,} more")
    lines.append(
        f"  {len(found.missing):,} missing, {len(found.broken):,} broken, {len(found.faults):,} questions at fault"
    )
    return lines


def describe(benchmark: Benchmark) -> list[str]:
    """The lines that say what to fetch, and how a benchmark is asked and read."""
    count = f"{benchmark.questions:,} questions" if benchmark.questions else "questions"
    published = ", ".join(f"{name} {value:g}" for name, value in benchmark.published.items()) or "none"
    readings = ", ".join(["strict", *benchmark.readings])
    lines = [
        f"{benchmark.title} ({benchmark.name}): {count}, {benchmark.size}",
        f"  files: {benchmark.fetch}",
        f"  put them in DATA/{benchmark.name}/ or in DATA itself, and give --data=DATA; nothing is downloaded",
        f"  licence: {benchmark.licence}",
        f"  prompts: {', '.join(benchmark.wordings)}; protocols: {readings}",
        f"  score: the mean over {f'the groups of {benchmark.average}' if benchmark.average else 'questions'}",
        f"  frames of a video: {benchmark.frames or 'as in training (their number is not published)'}",
        f"  Kangaroo's published row: {published}",
    ]
    return [*lines, f"  note: {benchmark.note}"] if benchmark.note else lines
