"""Handles a finished step: its lines in the logs and on the screen, and the reaction to non-finite values."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from kangaroo_jax.checkpoints.reading import NotFinite
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.stream import LoaderStats
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.loss_by import LossBySource
from kangaroo_jax.training.metrics import MetricLog, SampleLog, StepLine
from kangaroo_jax.training.observe import Observer

_NAMED = 8  # the most samples of a step that a message names


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that has been started and may still run on the device."""

    step: int
    metrics: dict[str, jax.Array]
    stats: LoaderStats
    wait: float  # seconds of waiting for its batch
    by_source: LossBySource | None = None


class Reporter:
    """Reports the steps of a stage, in order."""

    def __init__(
        self,
        config: StageConfig,
        *,
        log: MetricLog,
        samples: SampleLog,
        line: StepLine,
        observer: Observer,
        tell: Tell,
        skipped_steps: int = 0,
        spikes: int = 0,
    ) -> None:
        """`skipped_steps` and `spikes`: the numbers of skipped steps, and of spikes, of the stage so far."""
        self.finite = True  # whether the loss and gradient norm of the last reported step were finite
        self._config, self._every = config, config.train.log_every
        self._log, self._samples, self._line, self._observer = log, samples, line, observer
        self._tell, self._skipped, self._in_a_row = tell, skipped_steps, 0
        self._spikes = spikes
        self._pending: Pending | None = None

    def begun(self, pending: Pending) -> None:
        """Take a step that may still run on the device; `finish` reports it."""
        self._pending = pending

    def finish(self) -> int | None:
        """Report the step that was begun last and return its number; None if that is done. Raises as `report`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self.report(pending)
        return pending.step

    def report(self, pending: Pending) -> None:
        """Wait for a step, write its metrics and samples; print every `log_every` steps.

        Raises NotFinite if its loss or gradient is not finite and `train.on_nonfinite` is "stop", or too many steps in
        a row were skipped.
        """
        step, stats = pending.step, pending.stats
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self.finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        self._skipped, self._in_a_row = (self._skipped, 0) if self.finite else (self._skipped + 1, self._in_a_row + 1)
        self._line.add(
            tokens=stats.tokens,
            frames=stats.frames,
            capacity=stats.token_capacity,
            wait=pending.wait,
            frame_capacity=stats.frame_capacity,
            counts=stats.by_both,
        )
        use = {}
        if step % self._every == 0:
            steps, seconds = self._line.window()
            use = {**self._line.rates(), **self._observer.values(steps, seconds)}
        counts = {**stats.to_json(), "skipped_steps": self._skipped, **self._observer.times()}
        losses = {} if pending.by_source is None else pending.by_source.means()
        self._samples.write(step, stats.sample_ids)
        self._log.write(step, {**values, **counts, **use, **({"losses": losses} if losses else {})})
        if use:
            self._line.tell(step, values, stats.skipped, use, losses)
        if not self.finite:
            self._not_finite(step, values, stats)
        if values.get("spikes", 0.0) > self._spikes:
            self._spikes = int(values["spikes"])
            self._tell(
                f"{self._config.stage}: step {step}: the gradient's norm {values['grad_norm']:g} is a spike: passed "
                f"over, weights and optimiser stay as they were; {self._which(stats)}"
            )

    def measured(self, step: int, scores: Mapping[str, float]) -> None:
        """Log what was measured after `step`, which is reported: a line with the key `eval` and the running counts."""
        counts = {"skipped_steps": self._skipped, **({"spikes": self._spikes} if self._spikes else {})}
        self._log.write(step, {"eval": dict(scores), **counts, **self._observer.times()})

    def _which(self, stats: LoaderStats) -> str:
        more = f" and {stats.samples - _NAMED} more in {self._samples.path.name}" if stats.samples > _NAMED else ""
        return f"samples {', '.join(map(repr, stats.sample_ids[:_NAMED]))}{more}"

    def _not_finite(self, step: int, values: dict[str, float], stats: LoaderStats) -> None:
        what = f"step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
        which = self._which(stats)
        stage, train = self._config.stage, self._config.train
        if train.on_nonfinite == "stop":
            raise NotFinite(
                f"{stage}: {what}; {which}; stopped, and what was saved before stays: run again to go on from there, "
                "with --config.train.on_nonfinite=skip to pass over such steps"
            )
        if self._in_a_row >= train.nonfinite_in_a_row:
            raise NotFinite(
                f"{stage}: {what}, {self._in_a_row} such steps in a row; {which}; stopped: go on from an "
                "earlier checkpoint with a lower learning rate, or look at the data"
            )
        self._tell(f"{stage}: {what}: skipped, weights and optimiser stay as they were; {which}")


def of_host(path: Path) -> Path:
    """`path` for the main process, `name.N.jsonl` for process N."""
    return path if jax.process_index() == 0 else path.with_name(f"{path.stem}.{jax.process_index()}{path.suffix}")
