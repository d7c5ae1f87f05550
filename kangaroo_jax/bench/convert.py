"""`kangaroo bench convert`: converts a large checkpoint of random numbers from Hugging Face's layout to ours and back.

Each conversion runs in its own process, whose peak resident memory the kernel reports. A plain copy of the same files,
before and after, measures the disk.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints.stored import Box, Spec
from kangaroo_jax.config import stage_config
from kangaroo_jax.conversion import formats
from kangaroo_jax.conversion.building import Building
from kangaroo_jax.conversion.export import write_json
from kangaroo_jax.conversion.names import SPECIAL
from kangaroo_jax.conversion.shards import nbytes_there, write_safetensors
from kangaroo_jax.conversion.sources import shapes_of, table_for
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import make_folder
from kangaroo_jax.system.memory import peak_mib
from kangaroo_jax.system.progress import Progress, Tell

BLOCK = (64 << 20) - 39  # bytes of random numbers, reused from different offsets


class RandomWeights:
    """Random bfloat16 weights of given shapes; the same every time."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """path -> shape."""
        dtype = np.dtype(ml_dtypes.bfloat16)
        self.specs = {path: Spec(shape, dtype) for path, shape in shapes.items()}
        rng = np.random.default_rng(0)
        self._block = rng.standard_normal(BLOCK, np.float32).astype(dtype)

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        shape = [s.stop - s.start for s in box]
        size = int(np.prod(shape))
        start = hash_of(path, box) % BLOCK
        numbers = np.empty(size, self._block.dtype)
        for done in range(-start, size, BLOCK):
            first, last = max(done, 0), min(done + BLOCK, size)
            numbers[first:last] = self._block[first - done : last - done]
        return numbers.reshape(shape)


def hash_of(path: str, box: Box) -> int:
    """A number that depends on path and box, the same in every process."""
    return int.from_bytes(f"{path} {[s.start for s in box]}".encode(), "little") % 1_000_003 * 7919


def published_sizes(layers: int) -> ConfigDict:
    """The config of the published sizes, but with `layers` decoder layers."""
    config = stage_config("kangaroo_8b")
    config.model.llm.depth = layers
    return config


def make_checkpoint(folder: Path, config: ConfigDict, tell: Tell = print) -> int:
    """Write the model of a stage's config with random weights in the release's layout; returns its bytes."""
    weights = RandomWeights({path: shape for path, shape in shapes_of(config.model).items() if path != SPECIAL})
    rows = [row for row in table_for("kangaroo", config.model) if row.ours != SPECIAL]
    total = sum(nbytes_there(row, weights) for row in rows)
    with Building(folder, {"made": total}) as building:
        building.need(int(4.1 * total))  # this checkpoint, ours, the one converted back, and a copy
        write_json(building.folder / "config.json", formats.write_hf(config, "bfloat16"))
        write_safetensors(weights, rows, building, Progress("made", total, "bytes", tell))
    return total


def bench_convert(folder: Path, config: ConfigDict, tell: Tell = print) -> dict[str, Any]:
    """Make a checkpoint in `folder`, copy it, convert it to ours and back, copy it again, and compare.

    Returns gigabytes, MB/s of each, CPU seconds and peak GiB of each conversion, and the number of files that came
    back unchanged. On a shared machine CPU seconds are more reliable than MB/s. Everything that is written is
    removed. Raises UserError if the disk lacks room.
    """
    folder = make_folder(folder.absolute())
    names = {name: folder / name for name in ("source", "orbax", "back", "copy")}
    existing = [name for name, path in names.items() if path.exists()]
    if existing:
        raise UserError(f"{folder}: holds {', '.join(existing)} already; give an empty folder")
    try:
        total = make_checkpoint(names["source"], config, tell)
        result: dict[str, Any] = {"gigabytes": round(total / 1e9, 2), "layers": config.model.llm.depth}
        result["copy_mb_per_second"] = [_copy(names["source"], names["copy"], total)]
        for name, source, target in (("to_orbax", "source", "orbax"), ("to_hf", "orbax", "back")):
            seconds, cpu_seconds, peak = _convert(names[source], names[target])
            result[f"{name}_mb_per_second"] = round(total / 1e6 / seconds)
            result[f"{name}_peak_gib"] = round(peak, 2)
            result[f"{name}_cpu_seconds"] = round(cpu_seconds, 1)
            tell(f"{name}: {result[f'{name}_mb_per_second']} MB/s, {result[f'{name}_peak_gib']} GiB")
        result["copy_mb_per_second"].append(_copy(names["source"], names["copy"], total))
        files = [path.name for path in names["source"].glob("model*")]
        same = filecmp.cmpfiles(names["source"], names["back"], files, shallow=False)[0]
        result["files_equal"] = f"{len(same)} of {len(files)}"
        return result
    finally:
        for path in names.values():
            shutil.rmtree(path, ignore_errors=True)


def _copy(source: Path, target: Path, total: int) -> int:
    """MB/s of a plain copy of every file; the copies are removed."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return round(total / 1e6 / seconds)


def _convert(source: Path, target: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak GiB) of `kangaroo convert` in its own process. Raises UserError."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "kangaroo_jax", "convert", f"--from={source}", f"--to={target}"]
    start, peak = time.perf_counter(), 0.0
    # In its own process group it gets no Ctrl-C from the terminal: only this process handles that.
    process = subprocess.Popen(command, env={**environment, "JAX_PLATFORMS": "cpu"}, process_group=0)
    ended = 0
    try:
        while not ended:
            peak = peak_mib(process.pid) / 1024 or peak
            time.sleep(0.02)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    finally:
        if not ended:
            process.kill()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the conversion of {source} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak
