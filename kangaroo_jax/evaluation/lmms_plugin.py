"""Kangaroo as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`; nothing of it is changed.

    python -m lmms_eval --model=kangaroo --model_args=checkpoint=runs/model,frames=64 --tasks=videomme

The harness makes the prompts and reads the answers. They are answered as `kangaroo eval` answers them: tokens, moments
of frames and engine are the same, a video is looked at once, and `workdir` keeps each answer with its identity.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.asking import ask_model
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question, Wording
from kangaroo_jax.evaluation.prompting import Task, tasks_of
from kangaroo_jax.evaluation.samples import Samples
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.system.files import make_folder


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest("kangaroo", simple_class_path=f"{__name__}.AnsweringModel")


class AnsweringModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers requests of lmms-eval in its simple form: a text, and files or images that stand before it."""

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        workdir: str = "",
        frames: int = 0,
        at_a_time: int = 8,
        batch_size: Any = 1,
        device: Any = None,
        **other: Any,
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: folder that training or a conversion wrote.
            workdir: keeps `samples.jsonl`, so that nothing is asked twice; "" keeps nothing.
            frames: of a video; 0 is as in training.
            at_a_time: questions under way together.
            batch_size, device: lmms-eval passes them; the engine decides by itself.

        Raises:
            UserError: there is no checkpoint, or an argument is unknown.
        """
        super().__init__()
        if other:
            raise UserError(
                f"--model_args: there is no {', '.join(other)}; give checkpoint, workdir, frames, at_a_time"
            )
        self._frames, self._at_a_time = int(frames) or None, int(at_a_time)
        self._kept = tempfile.TemporaryDirectory(prefix="kangaroo-lmms-")  # images that came as pixels, and answers
        self._workdir = make_folder(Path(workdir or self._kept.name))
        self._model = Kangaroo.load(checkpoint)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request. Raises UserError: a file cannot be read, or a request cannot be put."""
        tasks, ends = [], []
        for number, request in enumerate(requests):
            text, options, to_visuals, doc, task, split = request.args
            visuals = to_visuals(self.task_dict[task][split][doc])
            asked = Question(f"{task}/{doc}/{number}", self._media(visuals), text, prompt=text, kind="open")
            told = dataclasses.replace(_ASKED, name=task)
            tasks += tasks_of(told, [asked], frames=self._frames, max_new_tokens=_length(options))
            until = options.get("until") or ()
            ends.append([until] if isinstance(until, str) else list(until))
        with Samples(self._workdir) as samples:
            ask_model(self._model, _by_video(tasks), samples, at_a_time=self._at_a_time, strict=True)
            answers = [str(samples.latest[task.name]["text"]) for task in tasks]
        return [_until(answer, some) for answer, some in zip(answers, ends, strict=True)]

    def _media(self, visuals: Sequence[Any] | None) -> tuple[Media, ...]:
        """What stands before the text: paths of videos and images, and images as pixels."""
        media = []
        for visual in visuals or ():
            if isinstance(visual, Image.Image):
                visual = self._written(visual)
            if not isinstance(visual, str):
                raise UserError(f"lmms-eval gave a {type(visual).__name__} to look at; only files and images are known")
            media.append(Media("image" if visual.lower().endswith(IMAGE_SUFFIXES) else "video", visual))
        return tuple(media)

    def _written(self, image: Image.Image) -> str:
        name = hashlib.sha256(image.tobytes() + repr((image.size, image.mode)).encode()).hexdigest()
        path = Path(self._kept.name) / f"{name}.png"
        if not path.exists():
            image.convert("RGB").save(path)
        return str(path)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not answered: the tasks of videos that ask for it have others that generate. Raises UserError."""
        raise UserError("this task asks for likelihoods; take its form that generates, or `kangaroo eval`")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not answered. Raises UserError."""
        raise UserError("this task talks over several rounds, which the plug-in does not; take another task")


_ASKED = Benchmark(
    name="",
    title="",
    read=lambda _: (),
    fetch="",
    licence="",
    size="",
    questions=0,
    wordings={"lmms-eval": {"": Wording("{question}")}},
    readings={},
)


def _length(options: dict[str, Any]) -> int:
    return int(options.get("max_new_tokens") or _ASKED.max_new_tokens)


def _by_video(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with those about one video as neighbours."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.question.video or task.question.id, []).append(task)
    return [task for some in groups.values() for task in some]


def _until(answer: str, ends: Sequence[str]) -> str:
    """The answer without what follows the first of the ends."""
    for end in ends:
        answer = answer.split(end, 1)[0] if end else answer
    return answer
