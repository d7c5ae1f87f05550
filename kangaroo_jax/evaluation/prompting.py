"""What is asked: the tasks of a benchmark, and each as tokens of a prompt with the identity of its answer."""

import dataclasses
import hashlib
import random
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kangaroo_jax.config import frames_per_group, tokens_per_group
from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.batches.sample import Recipe, frame_policy, plan_media, render_parts
from kangaroo_jax.data.media.video import FramePolicy, MediaRef, load_frames, load_media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Wording
from kangaroo_jax.evaluation.benchmarks.subtitles import lines_on_display, on_display
from kangaroo_jax.evaluation.samples import key_of
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.identity import source_of

CONTROLS = ("no-video", "one-frame", "shuffled", "rotated")  # what is asked beside the question itself
_KEPT = 64  # videos whose shuffled frames are kept as files: more than are under way


@dataclasses.dataclass(frozen=True)
class Task:
    """A question as it is to be asked."""

    benchmark: Benchmark
    question: Question
    wording: Wording
    style: str
    variant: str = ""  # "" or a control
    frames: int | None = None  # of a video; None as in training
    max_new_tokens: int = 16

    @property
    def name(self) -> tuple[str, str, str]:
        """See `samples.Name`."""
        return self.benchmark.name, self.variant, self.question.id

    def generation(self) -> dict[str, Any]:
        """What the answer depends on beside weights and prompt; answers are greedy."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": 0.0, "likelihood": self.wording.likelihood}


def tasks_of(
    benchmark: Benchmark,
    questions: Iterable[Question],
    style: str = "",
    variants: Sequence[str] = ("",),
    frames: int | None = None,
    max_new_tokens: int | None = None,
) -> list[Task]:
    """The tasks of a benchmark: those about one video are neighbours, in all variants.

    Raises UserError: the benchmark has no such style of prompt.
    """
    style = style or next(iter(benchmark.wordings))
    if style not in benchmark.wordings:
        raise UserError(f"{benchmark.name}: has no prompts of {style!r}; there are {', '.join(benchmark.wordings)}")
    by_video: dict[tuple[str, str], list[Task]] = {}
    for question in questions:
        wording = benchmark.wording(style, question.kind)
        for variant in variants:
            if variant == "rotated" and (wording.likelihood or not _turns(question)):
                continue
            asked = rotated(question) if variant == "rotated" else question
            told = max_new_tokens or benchmark.max_new_tokens
            task = Task(benchmark, asked, wording, style, variant, frames or benchmark.frames, told)
            seen = "" if variant == "rotated" else variant
            by_video.setdefault((question.video or question.id, seen), []).append(task)
    return [task for some in by_video.values() for task in some]


def rotated(question: Question) -> Question:
    """The question with its options moved by half of them, so that none keeps its letter; as it is where none can."""
    if not _turns(question):
        return question
    half = (len(question.options) + 1) // 2
    letter = question.answer
    if letter:
        letter = question.letters[(question.letters.index(letter) - half) % len(question.options)]
    return dataclasses.replace(question, options=question.options[half:] + question.options[:half], answer=letter)


def _turns(question: Question) -> bool:
    """Whether a question shows lettered options whose order is ours to choose."""
    return question.kind == "choice" and len(question.options) > 1 and not question.prompt


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A task as tokens."""

    task: Task
    recipe: Recipe
    continuations: tuple[np.ndarray, ...]  # texts whose likelihood is wanted
    identity: dict[str, Any]
    key: str


class Prompts:
    """Makes prompts for a model. Its methods may be called from any thread."""

    def __init__(self, model: Kangaroo) -> None:
        self._per_group = frames_per_group(model.config.model)
        self._tokens = tokens_per_group(model.config.model, model.config.data.image_size)
        self._policy = frame_policy(model.config.data, self._per_group)
        self._model = model
        self._shuffled = Shuffled(model.config.data.image_size)

    def close(self) -> None:
        """Remove what was written for controls."""
        self._shuffled.close()

    def prompt(self, task: Task) -> Prompt:
        """The tokens of a task and the identity of its answer. Raises UserError where a medium cannot be read."""
        wording, tokenizer = task.wording, self._model.tokenizer
        refs = media_of(task, self._policy, self._shuffled)
        said = text_of(task, refs)
        turns: list[tuple[str, Sequence[str | MediaRef]]] = [("user", [*parts_of(task, refs, self._per_group), said])]
        if wording.system:
            turns.insert(0, ("system", [wording.system]))
        if wording.prefill:
            turns.append(("assistant", [wording.prefill]))
        recipe = render_parts(turns, tokenizer, self._per_group, self._tokens, leave_open=bool(wording.prefill))
        recipe = dataclasses.replace(recipe, media=refs)  # one that was cut is decoded and encoded whole
        scored = task.question.options if wording.likelihood else ()
        continuations = tuple(np.array(tokenizer.encode(option), np.int32) for option in scored)
        ids = hashlib.sha256(recipe.tokens.astype("<i4").tobytes())
        for continuation in continuations:
            ids.update(b"|" + continuation.astype("<i4").tobytes())
        identity = {
            "weights": self._model.weights_id,
            "media": digests_of(refs),
            "prompt": ids.hexdigest(),
            "times": times_of(refs),
            "generation": task.generation(),
        }
        return Prompt(task, recipe, continuations, identity, key_of(identity))


def media_of(task: Task, policy: FramePolicy, shuffled: "Shuffled") -> tuple[MediaRef, ...]:
    """The moments of a task's media that are looked at. Raises UserError where a file cannot be read."""
    if task.variant == "no-video":
        return ()
    media = tuple(_framed(medium, task.frames) for medium in task.question.media)
    refs = plan_media(media, policy, policy.multiple)
    if task.variant == "one-frame":
        return tuple(_middle_only(ref, policy.multiple) for ref in refs)
    return tuple(shuffled.of(ref) for ref in refs) if task.variant == "shuffled" else refs


def digests_of(refs: Sequence[MediaRef]) -> list[str]:
    """The sha256 of the bytes of each medium. Raises UserError where a file cannot be read."""
    digests = [[source_of(path).digest.hex() for path in ref.frames or (ref.path,)] for ref in refs]
    return [hashlib.sha256("".join(some).encode()).hexdigest() for some in digests]


def times_of(refs: Sequence[MediaRef]) -> list[list[float]]:
    """Where each medium begins and, counted from there, the seconds that are looked at."""
    return [[ref.start or 0.0, *(round(time, 6) for time in ref.times)] for ref in refs]


def text_of(task: Task, refs: Sequence[MediaRef]) -> str:
    """The user's text, with the subtitles that are on display with the frames. Raises UserError."""
    question = task.question
    times = [time + (ref.start or 0.0) for ref in refs if ref.kind == "video" for time in ref.times]
    wanted = question.subtitles and "{subtitles}" in task.wording.text
    shown = on_display(question.subtitles, times, question.subtitles_from) if wanted else ""
    return task.wording.prompt(question, shown)


def parts_of(task: Task, refs: Sequence[MediaRef], per_group: int) -> Iterator[MediaRef | str]:
    """The media, cut where the wording has subtitles between the frames: a line follows the frames up to its middle.

    `per_group`: frames that stay together. Raises UserError.
    """
    question = task.question
    if not (task.wording.interleaved and question.subtitles):
        yield from refs
        return
    for ref in refs:
        times, first = [time + (ref.start or 0.0) for time in ref.times], 0
        lines = lines_on_display(question.subtitles, times, question.subtitles_from)
        for line in sorted(lines, key=lambda line: line.start + line.end):
            before = sum(2 * time <= line.start + line.end for time in times)
            end = -(-before // per_group) * per_group
            if end > first:
                yield _frames_of(ref, slice(first, end))
                first = end
            yield line.text
        if first < len(times):
            yield _frames_of(ref, slice(first, None))


def _frames_of(ref: MediaRef, which: slice) -> MediaRef:
    return dataclasses.replace(ref, times=ref.times[which], frames=ref.frames[which])


def _framed(medium: Media, frames: int | None) -> Media:
    return medium if frames is None or medium.kind == "image" else dataclasses.replace(medium, nframes=frames)


def _middle_only(ref: MediaRef, count: int) -> MediaRef:
    """The medium as its middle frame, as often as a group takes frames."""
    middle = len(ref.times) // 2
    frames = (ref.frames[middle],) * count if ref.frames else ()
    return dataclasses.replace(ref, times=(ref.times[middle],) * count, frames=frames)


class Shuffled:
    """Videos as their own frames in another order, at the same seconds; the last few are kept as files."""

    def __init__(self, side: int) -> None:
        """`side`: pixels to which frames are decoded."""
        self._side, self._lock = side, threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._made: dict[MediaRef, tuple[MediaRef, Path]] = {}

    def of(self, ref: MediaRef) -> MediaRef:
        """The medium with its frames in an order that its times decide. Raises UserError where it cannot be read."""
        if ref.kind != "video":
            return ref
        with self._lock:
            if ref not in self._made:
                self._made[ref] = self._make(ref)
                while len(self._made) > _KEPT:
                    _, folder = self._made.pop(next(iter(self._made)))
                    shutil.rmtree(folder)
            return self._made[ref][0]

    def _make(self, ref: MediaRef) -> tuple[MediaRef, Path]:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="kangaroo-eval-")
        if ref.frames:
            clip = load_frames(ref.frames, ref.times, self._side)
        else:
            clip = load_media(ref.path, ref.kind, image_size=self._side, times=ref.times, start=ref.start)
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        paths = []
        for number, pixels in enumerate(clip.pixels):
            paths.append(str(folder / f"{number}.png"))
            Image.fromarray(pixels).save(paths[-1], compress_level=1)
        random.Random(len(paths)).shuffle(paths)
        return MediaRef("video", paths[0], tuple(map(float, clip.times)), None, tuple(paths)), folder

    def close(self) -> None:
        """Remove all files."""
        with self._lock:
            if self._folder is not None:
                self._folder.cleanup()
            self._folder = None
            self._made.clear()
