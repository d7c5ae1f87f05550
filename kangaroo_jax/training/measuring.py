"""Measures a stage while it trains: the loss on held-out samples, scores of benchmarks; chooses the best checkpoint.

A measurement follows the save of the step that it measures, and is a line of `metrics.jsonl` with the key `eval`. What
is best and whether to stop follow from those lines alone: a run that goes on after a kill chooses as one that was left
alone would.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax

from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.held_out import HeldOutBatches
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.distributed import barrier, is_main, said_by_main
from kangaroo_jax.training.host_rows import HostRows
from kangaroo_jax.training.metrics import StepLine, read_metrics
from kangaroo_jax.training.reporting import Reporter
from kangaroo_jax.training.step import LossFunction, TrainState

LOSS = "loss"  # name of the held-out loss among the scores; lower is better, where of all others higher is
BEST = "best"  # a link in the stage's folder to its best checkpoint
_DAY = 86_400.0  # seconds that a host waits for the slowest one


class Evaluator(Protocol):
    """Scores a checkpoint on the questions of `config.eval.benchmarks`."""

    def ask(self, checkpoint: Path, folder: Path, part: int, parts: int) -> None:
        """Answer the part (from 1) of the questions, into `folder`; what is answered there is not asked again."""

    def scores(self, folder: Path) -> dict[str, float]:
        """Benchmark -> score (0 to 1), of all answers in `folder`."""


MakeEvaluator = Callable[[StageConfig], Evaluator]


class HeldOutLoss:
    """The mean loss over all targets of held-out samples."""

    def __init__(self, loss: LossFunction, batches: HeldOutBatches, rows: HostRows) -> None:
        self._loss, self._batches, self._rows = loss, batches, rows
        self.samples = batches.samples

    def of(self, state: TrainState) -> float:
        """The loss with the weights of a state; every host must call it, and has the same number."""
        sums = [self._loss(state.params, state.frozen, self._rows.put(batch)) for batch in self._batches]
        loss, weight = (sum(map(float, some)) for some in zip(*jax.device_get(sums), strict=True))
        return loss / max(weight, 1.0)


class Measuring:
    """The measurements of a stage. Where `config.eval` is off it does nothing."""

    def __init__(
        self,
        config: StageConfig,
        workdir: Path,
        checkpoints: Checkpoints,
        *,
        held_out: HeldOutLoss | None,
        evaluator: Evaluator | None,
        reporter: Reporter,
        line: StepLine,
        tell: Tell,
        first: int,
    ) -> None:
        """The stage goes on after step `first`; what was measured until then is read from its log."""
        self._config, self._stage, self._workdir = config.eval, config.stage, workdir
        self._steps, self._checkpoints = config.train.steps, checkpoints
        self._held_out, self._evaluator = held_out, evaluator
        self._reporter, self._line, self._tell = reporter, line, tell
        self._history = history(workdir, first) if config.eval.every else {}
        self._choose()

    def due(self, step: int) -> bool:
        """Whether a checkpoint and a measurement follow `step`."""
        every = self._config.every
        return bool(every and step) and (step % every == 0 or step == self._steps) and step not in self._history

    def enough(self) -> bool:
        """Whether the last `config.eval.patience` measurements were no better than one before them."""
        patience = self._config.patience
        found = best_of(self._history, self._config.best) if patience else None
        return found is not None and sum(step > found for step in self._history) >= patience

    def measure(self, state: TrainState, step: int) -> float:
        """Measure the state after `step`, whose save was begun; returns the seconds that it took.

        Every host must call it. Raises UserError where a benchmark's file can no longer be read.
        """
        start = time.perf_counter()
        self._checkpoints.wait()
        scores = {} if self._held_out is None else {LOSS: round(self._held_out.of(state), 6)}
        if self._evaluator is not None:
            scores |= self._answered(self._evaluator, step)
        self._history[step] = scores
        self._reporter.measured(step, scores)
        self._choose()
        seconds = time.perf_counter() - start
        self._line.pause(seconds)
        best = best_of(self._history, self._config.best)
        which = "the best so far" if best == step else f"best at step {best}"
        self._tell(f"{self._stage}: after step {step}: {text_of(scores)}; {which}, in {self._workdir / BEST}")
        return seconds

    def _answered(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        """The scores, of which every host answers a part of the questions."""
        folder, checkpoint = self._workdir / "eval" / str(step), self._checkpoints.folder / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as apart:  # in a thread of its own no mesh is set
            apart.submit(evaluator.ask, checkpoint, folder, jax.process_index() + 1, jax.process_count()).result()
        barrier(f"{self._stage} answered after {step}", _DAY)
        told = said_by_main(f"scores/{self._stage}/{step}", lambda: json.dumps(evaluator.scores(folder)), _DAY)
        scores: dict[str, float] = json.loads(told)
        return scores

    def _choose(self) -> None:
        """Keep the best checkpoint, and have the link and the step's line say which it is."""
        best = best_of(self._history, self._config.best)
        if best is None:
            return
        self._checkpoints.best.step = best
        last = max(self._history)
        self._line.note = f"{text_of(self._history[last])} at {last}  "
        if is_main():
            link_best(self._workdir, f"checkpoints/{best}")


def link_best(workdir: Path, target: str) -> None:
    """Have the link to the best checkpoint lead to `target`, a path in the folder, at once."""
    link = workdir / f".{BEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.replace(link, workdir / BEST)


def best_of(scores: Mapping[int, Mapping[str, float]], name: str) -> int | None:
    """The step with the best score of a name ("" is each one's first), the earliest of equals; None if none has it."""
    values = {}
    for step, found in sorted(scores.items()):
        key = name or next(iter(found), "")
        if key in found:
            values[step] = found[key] if key == LOSS else -found[key]
    return min(values, key=lambda step: values[step]) if values else None


def history(workdir: Path, last: int) -> dict[int, dict[str, float]]:
    """step -> scores of the measurements until step `last`, as the main process logged them."""
    lines: list[dict[str, Any]] = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line["eval"] for line in lines if line["step"] <= last and isinstance(line.get("eval"), dict)}


def text_of(scores: Mapping[str, float]) -> str:
    """The scores for a line."""
    return ", ".join(f"held-out loss {v:.4f}" if name == LOSS else f"{name} {v:.1%}" for name, v in scores.items())
