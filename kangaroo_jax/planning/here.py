"""This machine's own devices as a topology, and what to change in a stage that they have too little memory for."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from kangaroo_jax.chips import Chip, Slices, find_chip
from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.planning.formula import peak_gib
from kangaroo_jax.system.memory import host_memory
from kangaroo_jax.training.placement import resolve

GIB = 1 << 30
CPU_TFLOPS = 0.1  # of a host in float32; only the memory of a plan for a CPU is of use
_FRAMES = ("min_frames", "max_frames", "long_min_frames", "long_max_frames")
ROOM = 0.95  # of a device's memory that a changed stage may take
# In a process of its own: a device belongs to one process at a time, and a plan computes on the CPU.
_LOOK = (
    "import jax, json; d = jax.devices(); s = d[0].memory_stats() or {}; "
    "print(json.dumps([d[0].platform, d[0].device_kind, len(d), s.get('bytes_limit', 0), "
    "[list(x.coords) for x in d] if hasattr(d[0], 'coords') else []]))"
)


def devices_here() -> Slices:
    """The devices that JAX finds on this machine. Raises UserError for a kind that is not known."""
    looked = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True)
    lines = looked.stdout.splitlines()
    if looked.returncode or not lines:
        raise UserError(f"--topology=here: JAX finds no device ({looked.stderr.strip().splitlines()[-1][:200]})")
    platform, kind, count, limit, coords = json.loads(lines[-1])
    if platform == "cpu":
        return cpu_here()
    chip = find_chip(kind)
    if chip is None:
        raise UserError(f"--topology=here: {kind!r} is none of the chips that are known; name one that is like it")
    size = "x".join(str(1 + max(axis) - min(axis)) for axis in zip(*coords, strict=True)) if coords else str(count)
    if chip.name in ("v5e", "v6e"):
        size = "x".join(size.split("x")[:2])
    return Slices(chip, size, count)


def cpu_here() -> Slices:
    """This host as a device with all of its memory."""
    chip = Chip("CPU", r"^cpu$", CPU_TFLOPS, round(host_memory()[0] / GIB, 2), 50, 10, "cpu")
    return Slices(chip, "1", 1)


# ------------------------------------------------------------------------------ out of memory


def changes(config: StageConfig) -> Iterator[dict[str, Any]]:
    """Changes of a resolved stage that need less memory, mildest first; each with all before it that go with it."""
    rows = config.data.packs_per_batch // (config.train.mesh[0] * config.train.mesh[1])
    made: dict[str, Any] = {}
    if config.train.accumulate < rows:
        made = {"train.accumulate": rows}
        yield made
    if config.model.llm.remat != "full" or config.model.vision.remat != "full":
        made = {**made, "model.llm.remat": "full", "model.vision.remat": "full"}
        yield made
    if not config.lora.rank and config.optimizer.moment_dtype == "float32" and config.optimizer.kind == "adamw":
        yield {**made, "optimizer.moment_dtype": "bfloat16"}
    if config.lora.rank and not config.lora.quantize:
        made = {**made, "lora.quantize": "int8"}
        yield made
    tokens, frames = config.data.tokens_per_pack // 2, config.data.frames_per_pack // 4 * 2
    while tokens >= 1024 and frames >= 8:
        most = {f"data.{key}": frames for key in _FRAMES if getattr(config.data, key) > frames}
        samples = min(config.data.max_sample_tokens, tokens)
        sizes = {"data.tokens_per_pack": tokens, "data.frames_per_pack": frames, "data.max_sample_tokens": samples}
        yield {**made, **sizes, **most}
        tokens, frames = tokens // 2, frames // 4 * 2
    if not config.lora.rank:
        yield {**made, "lora.rank": 16}


def what_to_change(config: StageConfig, capacity: float) -> str:
    """Flags with which a resolved stage, for which `capacity` GiB did not suffice, should fit; "" if none would."""
    counts = count_parameters(config.model)
    correction = max(1.0, capacity / peak_gib(config, counts))  # it needs more than there is, whatever the formula says
    for change in changes(config):
        if (needed := correction * peak_gib(config.changed(change), counts)) <= ROOM * capacity:
            flags = " ".join(f"--config.{key}={value}" for key, value in change.items())
            return f"{flags} should need about {needed:.1f} GiB"
    return ""


@contextlib.contextmanager
def explained_memory(given: StageConfig) -> Iterator[None]:
    """Turn the runtime's error for too little memory into a line that says what to change. Raises UserError."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        device = jax.local_devices()[0]
        chip = find_chip(device.device_kind)
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        capacity = limit / GIB or (chip.gib if chip else host_memory()[0] / GIB)
        advice = what_to_change(resolve(given, chip, jax.device_count()), capacity)
        raise UserError(
            f"{given.stage}: out of memory: a {chip.name if chip else device.device_kind} has {capacity:.1f} GiB; "
            f"{advice or 'take more devices, or a smaller model'} (kangaroo plan compiles it beforehand)"
        ) from error
