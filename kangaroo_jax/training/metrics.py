"""Reports of steps: progress lines, JSONL, and boards if the config asks for some."""

import collections
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from kangaroo_jax.errors import printable
from kangaroo_jax.system.files import write_text
from kangaroo_jax.system.json_text import json_lines
from kangaroo_jax.system.progress import Tell, duration
from kangaroo_jax.training.boards import Board, scalars_of


class MetricLog:
    """`metrics.jsonl` of a stage: one line for each step, in order, without repetition even after a restart."""

    def __init__(self, stage_dir: Path, *, boards: Sequence[Board] = (), name: str = "metrics.jsonl") -> None:
        """Append to `stage_dir/name`; `boards` are given the numbers, too, and closed with the file."""
        self.path = Path(stage_dir) / name
        self._file = _appended(self.path)
        self._clock = time.perf_counter()
        self._boards = boards

    def rewind(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Drop the lines after `step`: a run restored at `step` writes them again.

        Returns the last line that is kept, and the last of all including dropped ones; {} if there is none.
        """
        self._file.close()
        kept, last = drop_after(self.path, step)
        self._file = _appended(self.path)
        return kept, last

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one step's values, and the `seconds` since the previous step."""
        now = time.perf_counter()
        values = {**values, "seconds": round(now - self._clock, 4)}
        self._clock = now
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for board in self._boards:
            board.write(step, scalars_of(values))

    def close(self) -> None:
        """Close the file; every line was flushed to the operating system when it was written."""
        self._file.close()
        for board in self._boards:
            board.close()


class SampleLog:
    """`samples.jsonl` of a stage: the sample ids of each step, up to about twice `limit` bytes of the latest.

    Older lines are in `samples.jsonl.1`; still older ones are dropped.
    """

    def __init__(self, stage_dir: Path, *, name: str = "samples.jsonl", limit: int = 1 << 26) -> None:
        """Append to `stage_dir/name`."""
        self.path, self._limit = Path(stage_dir) / name, limit
        self._file = _appended(self.path)

    def write(self, step: int, ids: Sequence[str]) -> None:
        """Append the samples of a step."""
        self._file.write(json.dumps({"step": step, "samples": list(ids)}) + "\n")
        if self._file.tell() > self._limit:
            self._file.close()
            self.path.replace(_older(self.path))
            self._file = _appended(self.path)

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        self._file.close()
        if _older(self.path).exists():
            drop_after(_older(self.path), step)
        drop_after(self.path, step)
        self._file = _appended(self.path)

    def close(self) -> None:
        """Close."""
        self._file.close()


def _appended(path: Path) -> TextIO:
    """Open to append; every line is flushed to the operating system at once."""
    return path.open("a", encoding="utf-8", buffering=1)


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def read_samples(path: str | Path) -> dict[int, list[str]]:
    """The ids of each step's samples, from a `samples.jsonl` and the older file beside it."""
    path = Path(path)
    files = [file for file in (_older(path), path) if file.exists()]
    return {line["step"]: line["samples"] for file in files for line in read_metrics(file)}


def drop_after(path: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rewrite a file of steps without the lines after `step`; returns the last line kept, and the last of all."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept[-1] if kept else {}, lines[-1] if lines else {}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a file of steps; fragments left by a kill or a full disk are skipped."""
    rows = (row for _, row in json_lines(path) if isinstance(row, dict))
    return [row for row in rows if type(row.get("step")) is int]


def number(line: Mapping[str, Any], key: str) -> float:
    """The number at `key` of a line from `read_metrics`; 0 if an edit or damage left none."""
    value = line.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


class StepLine:
    """Sums and rates over the steps since the last printed line, and the line."""

    def __init__(self, stage: str, steps: int, tell: Tell, *, chips: int = 1) -> None:
        """`tell` prints a line; `steps` is the stage's last step; rates are also given for each of `chips`."""
        self._stage, self._steps, self._tell, self._chips = stage, steps, tell, chips
        self._clock = self._begin = time.perf_counter()
        self._first: int | None = None
        self._sums = {"steps": 0, "tokens": 0, "frames": 0, "capacity": 0, "frame_capacity": 0, "wait": 0.0}
        self._counts: collections.Counter[str] = collections.Counter()
        self.note = ""  # what the line says of the last measurement

    def pause(self, seconds: float) -> None:
        """Leave these last seconds out of the rates."""
        self._clock += seconds

    def add(
        self,
        *,
        tokens: int,
        frames: int,
        capacity: int,
        wait: float,
        frame_capacity: int = 0,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Add a step: useful tokens and frames, their positions (B * T, B * F), seconds spent waiting for data.

        `counts` are samples by source and language, shown if there is more than one of them.
        """
        step = {"steps": 1, "tokens": tokens, "frames": frames, "capacity": capacity, "wait": wait}
        for key, value in (step | {"frame_capacity": frame_capacity}).items():
            self._sums[key] += value
        self._counts.update(counts or {})

    def window(self) -> tuple[int, float]:
        """(steps, seconds) since the last printed line."""
        return int(self._sums["steps"]), max(time.perf_counter() - self._clock, 1e-9)

    def rates(self) -> dict[str, float]:
        """Useful tokens and frames a second for each chip, and the share of time spent waiting for data."""
        _, seconds = self.window()
        return {
            "tokens_per_second_per_chip": round(self._sums["tokens"] / seconds / self._chips, 1),
            "frames_per_second_per_chip": round(self._sums["frames"] / seconds / self._chips, 2),
            "data_wait": round(self._sums["wait"] / seconds, 4),
        }

    def tell(
        self,
        step: int,
        metrics: dict[str, float],
        skipped: int,
        use: Mapping[str, float] | None = None,
        losses: Mapping[str, float] | None = None,
    ) -> None:
        """Print the line of `step` and begin a new window.

        `use`: the values of `training.observe` for the chips. `losses`: the step's, by source and language.
        """
        now = time.perf_counter()
        seconds = max(now - self._clock, 1e-9)
        s, use = self._sums, use or {}
        mfu = (
            f"MFU {100 * use['mfu_causal']:.1f}% causal {100 * use['mfu_full']:.1f}% full  "
            if "mfu_full" in use
            else ""
        )
        left = (self._steps - step) * seconds / max(s["steps"], 1)
        passed = {"skipped": skipped, "spikes": int(metrics.get("spikes", 0))}
        self._tell(
            f"{self._stage} {step:>{len(str(self._steps))}}/{self._steps}  loss {metrics['loss']:.4f}  "
            f"grad {metrics['grad_norm']:.2f}  lr {metrics['learning_rate']:.1e}  "
            f"{s['tokens'] / seconds:,.0f} tok/s  {s['frames'] / seconds:,.0f} frames/s  "
            f"useful {100 * s['tokens'] / max(s['capacity'], 1):.0f}%"
            f"{_share(' frames', s['frames'], s['frame_capacity'])}  {self._mix(losses or {})}"
            f"wait {100 * s['wait'] / seconds:.0f}%  {mfu}{self.note}"
            f"{''.join(f'{name} {count}  ' for name, count in passed.items() if count)}ETA {duration(left)}"
        )
        self._clock = now
        self._sums = dict.fromkeys(s, 0)
        self._counts.clear()

    def _mix(self, losses: Mapping[str, float]) -> str:
        if len(self._counts) < 2:
            return ""
        total = sum(self._counts.values())
        parts = []
        for name, count in self._counts.most_common(6):
            loss = f" loss {losses[name]:.4f}" if name in losses else ""
            parts.append(f"{printable(name)} {100 * count / total:.0f}%{loss}")
        return "  ".join(parts) + "  "


def _share(name: str, part: float, whole: float) -> str:
    return f"{name} {100 * part / whole:.0f}%" if whole else ""
