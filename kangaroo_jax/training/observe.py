"""How well the machine is used: MFU in both conventions, rates a chip, goodput, memory, recompilations, profiles."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kangaroo_jax.chips import Chip
from kangaroo_jax.training.flops import step_flops

Tell = Callable[[str], None]


class Observer:
    """Follows the steps of a stage."""

    def __init__(self, config: ConfigDict, chip: Chip | None, *, workdir: Path, tell: Tell) -> None:
        """`chip`: what it runs on; None (a CPU, or an unknown accelerator) has no MFU."""
        flops, self._devices = step_flops(config), jax.device_count()
        peak = chip.tflops * 1e12 * self._devices if chip else 0.0
        self._perfect = {  # seconds of a step that would use the peak in full
            name: value / peak for name, value in (("mfu_causal", flops.causal), ("mfu_full", flops.full)) if peak
        }
        self._profile, self._workdir, self._tell = tuple(config.train.profile), workdir, tell
        self._begin = self._clock = time.perf_counter()
        self._stepping = 0.0  # seconds of steps, without the first, which compiles
        self._compiled = 0
        self._profiling = False

    def step(self, step: int, step_fn: Any) -> float:
        """A step has been started; returns the seconds since the one before."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        size = step_fn._cache_size() if hasattr(step_fn, "_cache_size") else 0
        if size > self._compiled and self._compiled:
            self._tell(f"warning: step {step} was compiled again; a batch or the state has another shape or type")
        elif self._compiled:
            self._stepping += seconds
        self._compiled = max(self._compiled, size)
        if self._profile:
            self._trace(step)
        return seconds

    def values(self, steps: int, seconds: float) -> dict[str, float]:
        """What to log of the last `steps`, which took `seconds`.

        mfu_causal and mfu_full (where the chip's peak is known), goodput (the share of the time since the start
        that went into steps, not into starting, compiling or saving) and hbm_gib (the most used so far).
        """
        known = {name: round(perfect * steps / seconds, 4) for name, perfect in self._perfect.items()}
        known["goodput"] = round(self._stepping / max(time.perf_counter() - self._begin, 1e-9), 4)
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            known["hbm_gib"] = round(memory["peak_bytes_in_use"] / (1 << 30), 2)
        return known

    def _trace(self, step: int) -> None:
        first, last = self._profile
        if step == first and not self._profiling:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._profiling = True
        elif step > last and self._profiling:
            self.close()

    def close(self) -> None:
        """End a profile that is being taken."""
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False
            self._tell(f"profile of steps {self._profile[0]} to {self._profile[1]} in {self._workdir / 'profile'}")
