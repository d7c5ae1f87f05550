"""What a run will need and what there is; what is likely to go wrong."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from kangaroo_jax.chips import find_chip
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.annotations.sources import AnnotationFile, evenly
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.finetune.table import Example, answers_of
from kangaroo_jax.finetune.wording import counted, quoted
from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.models.lora import is_factor
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.planning.formula import peak_gib
from kangaroo_jax.system.memory import host_memory
from kangaroo_jax.training.optimizer import count
from kangaroo_jax.training.placement import resolve

FEW, MANY_ANSWERS, IMBALANCE = 50, 50, 3.0
_GIB = 1 << 30
_READ = 3000  # conversations of the replay whose tokens count as known


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a run needs, and what there is of it."""

    memory_gib: float
    memory_there: float
    disk_gib: float
    disk_there: float
    device: str

    def lines(self) -> list[str]:
        """In words."""
        return [
            f"needs about {self.memory_gib:.1f} GiB of memory of {self.memory_there:.1f} free on {self.device}",
            f"needs about {self.disk_gib:.2f} GiB of disk of {self.disk_there:.0f} free",
        ]

    def check(self) -> None:
        """Raise UserError where something will not suffice."""
        if self.disk_gib > self.disk_there:
            raise UserError(
                f"needs {self.disk_gib:.1f} GiB of disk, but {self.disk_there:.1f} are free; make room, or give "
                "another --workdir"
            )
        if self.memory_gib > 1.2 * self.memory_there:  # the formula's error is up to a fifth
            raise UserError(
                f"needs about {self.memory_gib:.1f} GiB of memory, but {self.device} has {self.memory_there:.1f} free; "
                "--quantize=int8 halves the decoder, --frames=24 and --config.data.tokens_per_pack=4096 the rest"
            )


def needs_of(config: StageConfig, workdir: Path) -> Needs:
    """By formula, of a stage on the devices of this process. Raises UserError for impossible settings."""
    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    resolved = resolve(config, chip, jax.device_count())
    binding = abstract_model(config.model, config.lora)
    trained = count({path: x for path, x in binding.shapes.items() if not config.lora.rank or is_factor(path)})
    memory = peak_gib(resolved, count_parameters(config.model))
    stats = device.memory_stats() or {}
    there = stats.get("bytes_limit", host_memory()[1]) - stats.get("bytes_in_use", 0)
    kept = 3 * (config.train.keep_checkpoints + 2) * 4 * trained  # the best, the last, and one that is written
    existing = next(folder for folder in (workdir, *workdir.resolve().parents) if folder.exists())
    name = chip.name if chip else "this CPU"
    return Needs(memory, there / _GIB, kept / _GIB + 0.05, shutil.disk_usage(existing).free / _GIB, name)


def warnings(
    train: Sequence[Example],
    test: Sequence[Example],
    replay: Sequence[str],
    tokenizer: Tokenizer,
    adapter: bool,
    room: int = 0,
) -> list[str]:
    """Lines about what is likely to go wrong. `room`: most tokens of a sample, 0 where that is unknown."""
    lines = []
    if not replay:
        lines.append(
            "without --replay the model forgets: measured at tiny size, 200 steps on new clips alone took an old skill "
            "from 92% to 32%, with half replay it stayed at 89% to 94%"
        )
    clips = len({example.video for example in train})
    if clips < FEW:
        videos = counted(clips, "video")
        lines.append(f"{videos} to learn from: 20 gave 72 to 88% on a new concept where 120 gave 89 to 95%")
    counts = answers_of(train)
    if len(counts) <= MANY_ANSWERS and len(counts) > 1:
        most, least = next(iter(counts.items())), list(counts.items())[-1]
        if most[1] > IMBALANCE * least[1]:
            lines.append(
                f"{quoted(most[0])} is the answer of {counted(most[1], 'example')}, {quoted(least[0])} of {least[1]}: "
                "the model will prefer the former; balance them"
            )
    long = [example for example in (*train, *test) if room and _tokens(example, tokenizer) > room]
    if long:
        lines.append(
            f"examples longer than the {room} tokens that a sample may have, which are passed over: {len(long)}; the "
            f"first: {long[0].where}"
        )
    if adapter and (strange := _untrained(train, replay, tokenizer)):
        lines.append(
            f"answers with tokens that the base was never seen to write: {len(strange)} "
            f"({', '.join(map(quoted, strange[:4]))}); an adapter leaves the head as it is, so such words may never "
            "come; say it in words that it knows, or --full"
        )
    return lines


def of_base(base: ConfigDict, config: ConfigDict, train: Sequence[Example]) -> list[str]:
    """A line where the base never saw more than one frame of a video, and videos are to be learnt."""
    if not any(medium.kind == "video" for example in train for medium in example.conversation.media):
        return []
    if base.stage == "assembled":
        return ["the base was put together from other models and not trained since: it has not learnt to see a video"]
    if max(base.data.max_frames, base.data.long_max_frames) > 1:
        return []
    data, here = config.data, ""
    if not data.frames_per_pack:
        here = "no pack has room for a frame, so videos teach nothing; "
    elif max(data.max_frames, data.long_max_frames) <= 1:
        here = "a video is one frame here, too; "
    return [f"the base was trained with at most one frame ({base.stage}): {here}give a base that was trained on videos"]


def _tokens(example: Example, tokenizer: Tokenizer) -> int:
    """How many tokens its text has until the first answer ends, without frames: what comes later may be cut off."""
    turns = example.conversation.turns
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    return sum(len(tokenizer.encode(turn.text)) for turn in turns[: first + 1])


def _untrained(train: Sequence[Example], replay: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Answers with tokens that no answer of the replay has; without replay those of single bytes."""
    known: set[int] | None = None
    if replay:
        known = set()
        for path in replay:
            file = AnnotationFile(path)
            for i in evenly(len(file), _READ):
                for turn in file[i].turns:
                    if turn.role == "assistant":
                        known |= set(tokenizer.encode(turn.text)) | set(tokenizer.encode(" " + turn.text))
    found: Mapping[str, bool] = {
        answer: any(
            token not in known if known is not None else (tokenizer.name(token) or "").startswith("<0x")
            for token in tokenizer.encode(answer)
        )
        for answer in answers_of(train)
    }
    return [answer for answer, strange in found.items() if strange]
