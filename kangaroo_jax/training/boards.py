"""Boards that show a stage's numbers beside `metrics.jsonl`: TensorBoard, Weights & Biases."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kangaroo_jax.config import StageConfig, to_plain
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.installing import install_line


class Board(Protocol):
    """Shows numbers by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""

    def close(self) -> None:
        """No more come."""


def open_boards(config: StageConfig, stage_dir: Path) -> list[Board]:
    """Those that `config.train` asks for. Raises UserError where the package of one is missing."""
    boards: list[Board] = []
    if config.train.tensorboard:
        boards.append(TensorBoard(stage_dir))
    if config.train.wandb:
        boards.append(WeightsAndBiases(config, stage_dir))
    return boards


def scalars_of(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers among values; one of an inner mapping has both names, as `eval/loss`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= scalars_of(value, f"{before}{name}/")
        elif isinstance(value, int | float):
            found[f"{before}{name}"] = value
    return found


class TensorBoard:
    """Event files in the stage's folder (package tensorboard)."""

    def __init__(self, stage_dir: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise UserError("config.train.tensorboard needs the package tensorboard: pip install tensorboard") from None

        self._events, self._event, self._summary = EventFileWriter(str(stage_dir)), event_pb2, summary_pb2

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Board`."""
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summary.Summary(value=scalars)
        self._events.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """See `Board`."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases (package wandb), the same one when a stage goes on.

    With the environment's WANDB_MODE=offline it needs no account.
    """

    def __init__(self, config: StageConfig, stage_dir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(f"config.train.wandb needs the package wandb: {install_line('wandb')}") from None
        name = hashlib.sha256(str(stage_dir.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=config.train.wandb,
            name=f"{config.stage} {stage_dir.resolve().name}".strip(),
            id=name,
            resume="allow",
            dir=str(stage_dir),
            config=to_plain(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Board`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Board`."""
        self._run.finish()
