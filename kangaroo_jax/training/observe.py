"""Measures the use of the machine: MFU in both conventions, goodput, memory, recompilations, profiles."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kangaroo_jax.chips import Chip
from kangaroo_jax.config import StageConfig
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.flops import step_flops


class Observer:
    """Follows the steps of a stage."""

    def __init__(
        self,
        config: StageConfig,
        chip: Chip | None,
        *,
        workdir: Path,
        tell: Tell,
        begin: float | None = None,
        before: Mapping[str, float] | None = None,
    ) -> None:
        """`chip`: the kind of chip; None (a CPU, or an unknown accelerator) has no MFU.

        `begin`: the start of this process by `time.perf_counter`. `before`: `times` of the stage's earlier processes.
        """
        flops, self._devices = step_flops(config), jax.device_count()
        peak = chip.tflops * 1e12 * self._devices if chip else 0.0
        self._perfect = {  # seconds of a step at the chip's peak
            name: value / peak for name, value in (("mfu_causal", flops.causal), ("mfu_full", flops.full)) if peak
        }
        self._profile, self._workdir, self._tell = config.train.profile, workdir, tell
        self._clock, before = time.perf_counter(), before or {}
        self._begin = (self._clock if begin is None else begin) - before.get("elapsed", 0.0)
        self._stepping = before.get("stepping", 0.0)  # seconds of steps, without the first one, which compiles
        self._compiled = 0
        self._profiling = False

    def step(self, step: int, step_fn: Any, aside: float = 0.0) -> float:
        """Record the start of a step; returns the seconds since the previous one, `aside` of them not for steps."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        size = step_fn._cache_size() if hasattr(step_fn, "_cache_size") else 0
        if size > self._compiled and self._compiled:
            self._tell(f"warning: step {step} was compiled again; a batch or the state has another shape or type")
        elif self._compiled:
            self._stepping += max(0.0, seconds - aside)
        self._compiled = max(self._compiled, size)
        if self._profile:
            self._trace(step)
        return seconds

    def values(self, steps: int, seconds: float) -> dict[str, float]:
        """The values to log for the last `steps`, which took `seconds`.

        They are mfu_causal and mfu_full (if the chip's peak is known), goodput (the share of the time of all the
        stage's processes spent on steps that count, not on starting, compiling, waiting for data, saving or repeated
        steps) and hbm_gib (the peak so far).
        """
        known = {name: round(perfect * steps / seconds, 4) for name, perfect in self._perfect.items()}
        times = self.times()
        known["goodput"] = round(times["stepping"] / max(times["elapsed"], 1e-9), 4)
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            known["hbm_gib"] = round(memory["peak_bytes_in_use"] / (1 << 30), 2)
        return known

    def times(self) -> dict[str, float]:
        """Seconds: `elapsed` over all the stage's processes until now, `stepping` for the steps that count."""
        return {"elapsed": round(time.perf_counter() - self._begin, 2), "stepping": round(self._stepping, 2)}

    def _trace(self, step: int) -> None:
        first, last = self._profile
        if step == first and not self._profiling:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._profiling = True
        elif step > last and self._profiling:
            self.close()

    def close(self) -> None:
        """End a running profile."""
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False
            self._tell(f"profile of steps {self._profile[0]} to {self._profile[1]} in {self._workdir / 'profile'}")
