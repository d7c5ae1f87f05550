"""When a stage's state is saved: by the number of the step, by the clock, and at the end."""

import time

import jax

from kangaroo_jax.checkpoints.reading import NotFinite
from kangaroo_jax.config import StageConfig, TrainConfig, to_plain
from kangaroo_jax.data.batches.loader import Loader
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.distributed import is_main, key_value_keys, key_value_set
from kangaroo_jax.training.host_rows import whole_data_state
from kangaroo_jax.training.step import TrainState


class Saver:
    """Saves a stage's state when it is due; where a step is not finite, after the first one that is again."""

    def __init__(self, checkpoints: Checkpoints, loader: Loader, config: StageConfig, first: int) -> None:
        """`config` is kept in the checkpoints; the stage goes on after step `first`, which needs no saving."""
        self._checkpoints, self._loader, self._config, self._first = checkpoints, loader, config, first
        self._clock = SaveClock(config.train.checkpoint_minutes)
        self._owed = False

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, or was before and was not saved. See `SaveClock.due`."""
        self._owed = self._clock.due(step) or due_by_number(step, self._config.train) or self._owed
        return self._owed

    def save(self, state: TrainState) -> float:
        """Start saving; returns, once the arrays are copied off the devices, the seconds that it took."""
        start = time.perf_counter()
        self._checkpoints.save(state, whole_data_state(self._loader), to_plain(self._config))
        self._clock.saved()
        self._owed = False
        return time.perf_counter() - start

    def save_last(self, state: TrainState, step: int) -> None:
        """Have the state after `step` on disk, where the run is asked to stop."""
        if step not in (self._first, self._checkpoints.begun):
            self.save(state)
        self._checkpoints.wait()

    def check_last(self, step: int) -> None:
        """Raise NotFinite if the state after `step`, the stage's last, could not be saved."""
        if self._owed:
            raise NotFinite(
                f"{self._config.stage}: step {step}, the last, was skipped: nothing shows that the weights are "
                f"sound, and they are not saved; run again with --config.train.steps={step + 1} to go on from the "
                "last checkpoint and end with other samples"
            )


def due_by_number(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint follows `step` by its number, independently of time."""
    every = [number for number in (config.checkpoint_every, config.keep_period) if number]
    return step == config.steps or any(step % number == 0 for number in every)


class SaveClock:
    """Decides after which step a checkpoint is due because the last is `minutes` old, the same for all processes.

    The main process decides two steps ahead. Another process sees the end of a step only after the main process has
    begun it, and so always finds the decision.
    """

    AHEAD = 2

    def __init__(self, minutes: float) -> None:
        """With `minutes` 0 no checkpoint is ever due."""
        self._seconds, self._last = 60 * minutes, time.monotonic()
        self._many = jax.process_count() > 1
        self._decided = 0

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Every process must call this once the previous step is known to be finished."""
        if not self._seconds:
            return False
        late = time.monotonic() - self._last >= self._seconds
        if not self._many:
            return late
        if is_main() and late and not self._decided:
            self._decided = step + self.AHEAD
            key_value_set(f"save/{self._decided}", "")
        return str(step) in key_value_keys("save/")

    def saved(self) -> None:
        """Restart the clock: a checkpoint has been started."""
        self._last, self._decided = time.monotonic(), 0
