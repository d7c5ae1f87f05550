"""Compile programs for chips that this machine lacks, and read the needs of the real train step from its own.

libtpu (the extra `tpu`) compiles for TPUs on any machine, JAX's CUDA plugin for GPUs (`planning/gpu.py`); nothing runs
and no weight is allocated.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from kangaroo_jax.chips import Chip, Slices
from kangaroo_jax.config import StageConfig
from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.planning import cycles, gpu, hlo, kernels
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.installing import install_line

GIB = 1 << 30
READ = 6  # raise it when a program is read differently: cached results are then compiled again


class Seconds(TypedDict):
    """The duration of a compilation."""

    lower_seconds: float
    compile_seconds: float  # wall time
    compile_cpu_seconds: float  # CPU time of all threads: the wall time on one idle core


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Memory and work of one device in a step. FLOPs count matrix products and attention kernels."""

    fits: bool
    peak_gib: float  # peak memory of the step, with the program itself; see `peak_bytes`
    state_gib: float  # weights, optimiser state and batch
    host_gib: float  # offloaded to host memory
    flops: dict[str, float]  # by part: vision, llm, other (the LM head), attention_vision, attention_llm
    collectives: dict[str, float]  # bytes by kind
    seconds: dict[str, float]  # of a step by part (`cycles.PARTS`), foretold; empty where the chip's clock is not known
    gathers_logits: bool  # an all-gather of something as wide as the vocabulary and as long as a pack
    lower_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    error: str = ""
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of `gpu.Kernel`


def why_not(chip: Chip) -> str:
    """Why nothing is compiled for a chip here; "" where it is, and for TPUs, which are compiled for or refused."""
    if chip.platform == "cpu":
        return "a stage on a CPU is measured, not compiled beforehand"
    return gpu.why_not(chip) if chip.platform == "gpu" else ""


def prepare_environment() -> None:
    """Set what libtpu and JAX read at import. Call it before JAX is imported, or with JAX on the CPU already."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-32"),  # only read at start; any value silences a warning
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)


def check_libtpu() -> None:
    """Raise UserError if libtpu is missing or not the version for this JAX, which may not read its programs."""
    try:
        found = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise UserError(f"compiling for a TPU needs libtpu: {install_line('tpu')}") from None
    named = re.search(r"libtpu==([\d.]+?)(?:\.\*)?(?:[\s;,]|$)", " ".join(metadata.requires("jax") or ()))
    if named and not f"{found}.".startswith(f"{named[1]}."):
        raise UserError(
            f"libtpu {found} is not of the release that jax {metadata.version('jax')} goes with ({named[1]}), and JAX "
            f"may not read what it compiles: {install_line('tpu')}"
        )


def topology_devices(target: Slices) -> list[Any]:
    """The devices of a topology, none of which has to exist here. Raises UserError."""
    from jax.experimental import topologies

    if target.chip.platform == "gpu":
        return gpu.topology_devices(target)
    check_libtpu()
    prepare_environment()
    sizes = [int(size) for size in target.topology.split("x")]
    # A host has 2 x 2 chips; the compiler does not guess that a smaller slice is one smaller host.
    host = (*(min(2, size) for size in (*sizes, 1)[:2]), 1)
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if host != (2, 2, 1):
        options["chips_per_host_bounds"] = host
    if target.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    name = f"{target.chip.name}:{target.topology}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:
        text = one_line(error)
        raise UserError(f"topology {name}: {text[:200]}") from None


def abstract_batch(config: StageConfig, mesh: Any) -> PackedBatch:
    """The shapes and shardings of a batch."""
    import jax

    from kangaroo_jax.sharding import sharding

    data = config.data
    sizes = {"B": data.packs_per_batch, "T": data.tokens_per_pack, "F": data.frames_per_pack, "S": data.image_size}
    arrays = {}
    for name, field in FIELDS.items():
        shape = field.shape(sizes)
        arrays[name] = jax.ShapeDtypeStruct(shape, field.dtype, sharding=sharding(mesh, field.axes, shape))
    return PackedBatch(**arrays)


def lower_step(config: StageConfig, devices: list[Any]) -> Any:
    """The train step of a resolved config (see `training.placement`), lowered for `devices`."""
    import jax

    from kangaroo_jax.models.parameters import abstract_model
    from kangaroo_jax.sharding import make_mesh
    from kangaroo_jax.training.state import abstract_state, build_step

    mesh = make_mesh(config.train.mesh, devices)
    binding = abstract_model(config.model, config.lora)
    state = abstract_state(config, binding, mesh)
    step = build_step(config, binding, state)
    with jax.set_mesh(mesh), _default(devices[0]):
        return step.trace(state, abstract_batch(config, mesh)).lower(lowering_platforms=(_lowered_for(devices[0]),))


def _default(device: Any) -> Any:
    """Where a GPU is compiled for, it is the device that libraries of kernels (tokamax) look at."""
    import jax

    return jax.default_device(device) if device.platform == "gpu" else contextlib.nullcontext()


def _lowered_for(device: Any) -> str:
    """JAX's name of a device's platform where it lowers programs."""
    return "cuda" if device.platform == "gpu" else str(device.platform)


def compile_step(config: StageConfig, target: Slices, cache: Path | None = None, visited: float = 1.0) -> Compiled:
    """Compile the step of a resolved config for `target`; results are cached in the folder `cache`, if given.

    `visited` is the share of a row's causal blocks of attention that packing leaves (see `packing`), for the time.
    A program that needs too much memory gives `fits=False` and the memory that it would need.
    """
    from kangaroo_jax.training.step import compiler_options

    devices = topology_devices(target)

    def read(program: Any, seconds: Seconds) -> dict[str, Any]:
        return dataclasses.asdict(_read(program, config, target, visited, seconds))

    def refused(message: str, seconds: Seconds) -> dict[str, Any]:
        return dataclasses.asdict(_too_large(message, seconds))

    def lower() -> Any:
        return lower_step(config, devices)

    beside = f"visited {visited} {compiler_options(devices[0])}"
    return Compiled(**compile_kept(lower, target, cache, read, refused, beside))


def compile_kept(
    lower: Callable[[], Any],
    target: Slices,
    cache: Path | None,
    read: Callable[[Any, Seconds], dict[str, Any]],
    refused: Callable[[str, Seconds], dict[str, Any]],
    beside: str = "",
) -> dict[str, Any]:
    """What `read` says of a lowered program when it is compiled, or `refused` of the compiler's message.

    The same program is compiled once where `cache` names a folder; `beside` is what else the results depend on. They
    must be JSON-able.
    """
    import jax

    start = time.perf_counter()
    lowered = lower()
    lower_seconds = time.perf_counter() - start
    versions = f"{jax.__version__} {_compiler(target.chip)}"
    digest = hashlib.sha256(f"{READ} {target} {versions} {beside} {lowered.as_text()}".encode()).hexdigest()[:24]
    kept = cache / f"{digest}.json" if cache else None
    if kept is not None and kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    start, cpu = time.perf_counter(), time.process_time()
    program, message = None, ""
    ours: list[gpu.Kernel] = []
    try:
        if target.chip.platform == "gpu":
            program, ours = gpu.compile_lowered(lowered, target.chip)
        else:
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
    seconds: Seconds = {
        "lower_seconds": round(lower_seconds, 1),
        "compile_seconds": round(time.perf_counter() - start, 1),
        "compile_cpu_seconds": round(time.process_time() - cpu, 1),
    }
    result = refused(message, seconds) if program is None else read(program, seconds)
    if ours:
        result["kernels"] = [dataclasses.asdict(kernel) for kernel in ours]
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, result)
    return result


def _compiler(chip: Chip) -> str:
    """Version and options of the compiler for a chip."""
    if chip.platform == "gpu":
        return f"ptxas {gpu.ptxas_version()} {os.environ.get('XLA_FLAGS', '')}"
    import libtpu

    return f"{getattr(libtpu, '__version__', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"


def amount_refused(message: str) -> float:
    """GiB that the compiler said a program needs, NaN where it does not say. Other errors become UserError."""
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM", message)
    if "RESOURCE_EXHAUSTED" not in message and not found:
        raise UserError(f"the compiler refused the program: {' '.join(message.split())[:400]}")
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    amount, unit = (found.group(1) or found.group(5), found.group(2) or found.group(6)) if found else ("nan", "G")
    return round(float(amount) * units[unit], 2)


def _too_large(message: str, seconds: Seconds) -> Compiled:
    """The result for a step that does not fit, from the compiler's message; other errors become UserError."""
    return Compiled(
        fits=False,
        peak_gib=amount_refused(message),
        state_gib=float("nan"),
        host_gib=0.0,
        flops={},
        collectives={},
        seconds={},
        gathers_logits=False,
        error=" ".join(message.split())[:300],
        **seconds,
    )


def peak_bytes(memory: Any) -> int:
    """Peak bytes of one device, from the program's `memory_analysis()`, plus the program itself.

    The compiler compares `peak_memory_in_bytes` (arguments, results, and the temporaries that live at one time) with
    the chip's memory. Arguments plus `temp_size_in_bytes` is too much: programs for which that sum is 3 GiB over the
    chip's memory are accepted, as their peak is within it.
    """
    return int(memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes)


def _read(program: Any, config: StageConfig, target: Slices, visited: float, seconds: Seconds) -> Compiled:
    memory = program.memory_analysis()
    peak = peak_bytes(memory)
    program_text = hlo.parse(program.as_text())
    flops: dict[str, float] = collections.defaultdict(float)
    moved: dict[str, float] = collections.defaultdict(float)
    chunks = max(1, -(-config.data.tokens_per_pack // config.train.mesh[2] // config.model.llm.loss_chunk))
    for visit in hlo.walk(program_text, chunks):
        part = next((name for name in ("vision", "llm") if name in visit.operation.scope), "other")
        flops[part] += hlo.matmul_flops(visit)
        if kernel := kernels.call(visit):
            flops[f"attention_{part}"] += kernel.flops * visit.times
        flops[f"attention_{part}"] += gpu.attention_flops(visit, target.chip)
    wide = False
    for kind, size, visit in hlo.moves(program_text, chunks):
        moved[kind] += size
        wide |= kind == "all-gather" and is_logits(visit.operation, config)
    return Compiled(
        fits=peak <= target.chip.gib * GIB,
        peak_gib=round(peak / GIB, 2),
        state_gib=round(memory.argument_size_in_bytes / GIB, 2),
        host_gib=round((memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes) / GIB, 2),
        flops=dict(flops),
        collectives=dict(moved),
        seconds=cycles.foretell(program_text, target, chunks, visited),
        gathers_logits=wide,
        **seconds,
    )


def is_logits(operation: hlo.Operation, config: StageConfig) -> bool:
    """Whether a result is logits: as wide as the vocabulary and as long as the tokens of a chunk or more."""
    vocabulary, chunk = config.model.llm.vocab_size, config.model.llm.loss_chunk
    for _, dimensions in operation.shapes:
        if vocabulary in dimensions:
            others = [size for size in dimensions if size not in (vocabulary, config.model.llm.width)]
            if config.model.llm.width not in dimensions and max(others, default=0) >= chunk:
                return True
    return False
