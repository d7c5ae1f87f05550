"""Compile programs for NVIDIA GPUs that this machine lacks, and read what the assembler says of their kernels.

The extra `plan-gpu` has all that it takes: JAX's CUDA plugin, ptxas and libdevice. There is no driver, no toolkit and
no GPU in it. XLA chooses by formula what it would otherwise choose by trial.
"""

import dataclasses
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from kangaroo_jax.chips import Chip, Slices
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.models.attention_triton import tiles_for, visited_share
from kangaroo_jax.planning import hlo
from kangaroo_jax.system.installing import install_line

PER_NODE = 8  # GPUs that a node's fast links join
# What launch/slurm/train.sh sets for training, and no trials, which need a GPU.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_latency_hiding_scheduler": True}
NO_TILES = "Couldn't find output tile sizes"  # XLA's formula has none for some small products: then cuBLAS has them
PLUGINS = ("cuda13", "cuda12")
# Matrix products of [queries, keys] with a head's width in each of the kernels of `models/attention_triton.py`.
PRODUCTS = {"forward": 2, "d_query": 3, "d_key": 4}
FORWARD_OPERANDS = 6  # of tokamax's
_NAME = re.compile(rf"attention_({'|'.join(PRODUCTS)})_(\d+)")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What XLA asks of a GPU. Limits that all of them share are in `target_text`."""

    name: str  # as JAX calls it
    processors: int  # streaming multiprocessors
    lanes: int  # float32 units of one
    threads: int  # of one at a time
    shared: int  # bytes of shared memory of one
    shared_of_block: int  # bytes of it that a block may ask for
    l2: int  # bytes
    clock_ghz: float  # boost
    memory: int  # bytes


_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
# Processors, L2, boost clock and memory are from NVIDIA's data sheets and architecture papers (A100 80GB SXM, L4, L40S,
# H100 SXM, H200 SXM, B200); lanes, threads and shared memory, all but 1 KiB of which a block may ask for, from the
# tables by compute capability in the CUDA C++ Programming Guide. H100's are as XLA reads them: openxla/xla#25919.
FACTS = {
    "A100": Facts("NVIDIA A100-SXM4-80GB", 108, 64, 2048, 164 * _KIB, 163 * _KIB, 40 * _MIB, 1.41, 80 * _GIB),
    "L4": Facts("NVIDIA L4", 58, 128, 1536, 100 * _KIB, 99 * _KIB, 48 * _MIB, 2.04, 24 * _GIB),
    "L40S": Facts("NVIDIA L40S", 142, 128, 1536, 100 * _KIB, 99 * _KIB, 96 * _MIB, 2.52, 48 * _GIB),
    "H100": Facts("NVIDIA H100 80GB HBM3", 132, 128, 2048, 228 * _KIB, 227 * _KIB, 50 * _MIB, 1.98, 80 * _GIB),
    "H200": Facts("NVIDIA H200", 132, 128, 2048, 228 * _KIB, 227 * _KIB, 50 * _MIB, 1.98, 141 * _GIB),
    "B200": Facts("NVIDIA B200", 148, 128, 2048, 228 * _KIB, 227 * _KIB, 126 * _MIB, 1.965, 180 * _GIB),
}


def arch(chip: Chip) -> str:
    """ptxas's name of a GPU; from Hopper on with the instructions that only its generation has."""
    return f"sm_{round(10 * chip.capability)}{'a' if chip.capability >= 9 else ''}"


def target_text(chip: Chip) -> str:
    """A GpuTargetConfigProto of one of FACTS, as text."""
    facts, (major, minor) = FACTS[chip.name], divmod(round(10 * chip.capability), 10)
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_core: {facts.shared}
  shared_memory_per_block_optin: {facts.shared_of_block}
  threads_per_core_limit: {facts.threads}
  core_count: {facts.processors}
  fpus_per_core: {facts.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {round(chip.hbm_gb * 1e9)}
  l2_cache_size: {facts.l2}
  clock_rate_ghz: {facts.clock_ghz}
  device_memory_size: {facts.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{facts.name}"
"""


def why_not(chip: Chip) -> str:
    """Why nothing is compiled for a GPU here, and how to change that; "" where it is."""
    if chip.name not in FACTS:
        return f"there are no facts for the compiler about a {chip.name}, only about {', '.join(FACTS)}"
    wanted = _version("jax")
    found = {name: _version(f"jax-{name}-plugin") for name in PLUGINS}
    if not any(found.values()):
        return f"the compiler is not installed: {install_line('plan-gpu')}"
    if wanted not in found.values():
        others = ", ".join(filter(None, found.values()))
        return f"JAX's CUDA plugin is {others}, JAX {wanted}, and each reads its own alone: {install_line('plan-gpu')}"
    if ptxas() is None:
        return f"ptxas is not installed: {install_line('plan-gpu')}"
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def ptxas() -> Path | None:
    """NVIDIA's assembler, from its package; None where it is not installed."""
    spec = util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for place in ("cu13", "cuda_nvcc"):
            file = Path(folder, place, "bin", "ptxas")
            if file.is_file():
                return file
    return None


def ptxas_version() -> str:
    """The version of the package that ptxas is from."""
    return _version("nvidia-cuda-nvcc") or _version("nvidia-cuda-nvcc-cu12")


def topology_devices(target: Slices) -> list[Any]:
    """The devices of so many GPUs, PER_NODE to a node, none of which has to exist here. Raises UserError."""
    from jax.experimental import topologies

    if reason := why_not(target.chip):
        raise UserError(f"{target}: {reason}")
    size = target.devices // target.slices
    nodes = -(-size // PER_NODE)
    if size % nodes:
        raise UserError(f"{target}: {size} GPUs are not spread evenly over {nodes} nodes of {PER_NODE}")
    shape = f"{target.slices}x{nodes}x{size // nodes}"
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target_text(target.chip), topology=shape
        )
    except Exception as error:
        raise UserError(f"{target}: {one_line(error)[:200]}") from None
    return list(topology.devices)


# ------------------------------------------------------------------------------------ kernels


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel of ours, by the assembler."""

    name: str  # and the width of its heads
    registers: int  # of a thread
    spilled: int  # bytes of a thread that do not fit into registers
    wgmma: bool  # whether it uses Hopper's matrix instruction

    def __str__(self) -> str:
        spills = f"{self.spilled} bytes spilled" if self.spilled else "nothing spilled"
        return f"{self.name} {self.registers} registers, {spills}"


def compile_lowered(lowered: Any, chip: Chip) -> tuple[Any, list[Kernel]]:
    """The compiled program, and our kernels in it as ptxas compiles them, equal ones once. Raises UserError."""
    import jax

    with tempfile.TemporaryDirectory(prefix="kangaroo-plan-") as folder:
        options = {**COMPILER_OPTIONS, "xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if NO_TILES not in str(error):
                raise
            program = lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})
        found: set[Kernel] = set()
        for file in sorted(Path(folder).glob("*.ptx")):
            text = file.read_text(encoding="utf-8")
            if re.search(r"\.entry attention_", text):
                found.update(_assembled(file, text, arch(chip)))
    return program, sorted(found, key=lambda kernel: (kernel.name, kernel.registers))


def _assembled(file: Path, text: str, generation: str) -> Iterator[Kernel]:
    program = ptxas()
    assert program is not None  # `why_not` has looked
    command = [str(program), "-v", f"-arch={generation}", str(file), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"ptxas: {' '.join(done.stderr.split())[:300]}")
    pattern = r"entry function '(\w+)'[\s\S]*?(\d+) bytes spill stores[\s\S]*?Used (\d+) registers"
    for name, spilled, registers in re.findall(pattern, done.stderr):
        if found := _NAME.match(name):
            body = text.partition(f".entry {name}(")[2].partition(".entry ")[0]
            yield Kernel(f"{found[1]} {found[2]}", int(registers), int(spilled), "wgmma.mma_async" in body)


def attention_flops(visit: hlo.Visit, chip: Chip) -> float:
    """FLOPs of an attention kernel over the blocks that order leaves to visit, times its visits; 0 for others."""
    operation = visit.operation
    if operation.kind != "custom-call":
        return 0.0
    if "tokamax_causal" in operation.scope and '"mosaic_gpu' in operation.text:
        *rows, length, heads, width = visit.operand_shape(0)
        # The backward kernels also take the output's gradient and sums; one gives two gradients, the other one.
        backward, gives_two = len(operation.operands) > FORWARD_OPERANDS, len(operation.shapes) == 2
        products = PRODUCTS["forward"] if not backward else PRODUCTS["d_key" if gives_two else "d_query"]
        return 2.0 * products * math.prod(rows) * heads * length**2 * width * 0.5 * visit.times
    found = re.search(f"/{_NAME.pattern}/", operation.scope)
    if found is None:
        return 0.0
    (batch, length, heads, width), keys = visit.operand_shape(0), visit.operand_shape(1)[1]
    tile = getattr(tiles_for(chip.capability, width), found[1])
    share = visited_share(length, keys, tile, "triton_causal" in operation.scope)
    return 2.0 * PRODUCTS[found[1]] * batch * heads * length * keys * width * share * visit.times
