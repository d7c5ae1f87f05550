"""What is known of accelerators by name: matrix peak, memory, links, hosts' CPUs. Sources: the makers' data sheets."""

import dataclasses
import re

from kangaroo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (a chip, but half a chip of tpu7x)."""

    name: str
    kind: str  # regex on JAX's device_kind, in lower case
    tflops: float  # dense, bfloat16 (float16 where there is none)
    gib: float  # of memory that a program can use
    hbm_gb: float  # GB/s of that memory
    link_gb: float  # GB/s in and out of one device, to its own slice or node
    platform: str = "tpu"
    compiles_on_cpu: bool = False  # libtpu compiles for it on any machine
    capability: float = 0.0  # CUDA's compute capability of a GPU
    cpus: int = 12  # virtual CPUs of a host beside one device: of Cloud TPU's hosts of four chips, as launch/slurm asks
    vmem_kib: int = 0  # of a TPU's fast memory that an operation may use in a train step; 0: the compiler's own limit


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", r"tpu v4$", 275, 31.25, 1228, 300, compiles_on_cpu=True, cpus=60),
        Chip("v5e", r"tpu v5 ?(lite|e)", 197, 15.75, 819, 200, compiles_on_cpu=True, cpus=28, vmem_kib=32768),
        Chip("v5p", r"tpu v5p?$", 459, 95.74, 2765, 600, compiles_on_cpu=True, cpus=52, vmem_kib=32768),
        Chip("v6e", r"tpu v6 ?(lite|e)", 918, 31.25, 1640, 448, compiles_on_cpu=True, cpus=45, vmem_kib=98304),
        Chip("tpu7x", r"tpu ?7x", 1153.5, 94.75, 3690, 600, compiles_on_cpu=True, cpus=28),
        Chip("T4", r"\bt4\b", 65, 14.6, 320, 16, "gpu", capability=7.5),
        Chip("L4", r"\bl4\b", 121, 22.2, 300, 32, "gpu", capability=8.9),
        Chip("L40S", r"\bl40s\b", 362, 44.4, 864, 32, "gpu", capability=8.9),
        Chip("V100", r"\bv100\b", 125, 31.7, 900, 150, "gpu", capability=7.0),
        Chip("A100", r"\ba100\b", 312, 79.1, 2039, 300, "gpu", capability=8.0),
        Chip("H100", r"\bh100\b", 989, 79.1, 3350, 450, "gpu", capability=9.0),
        Chip("H200", r"\bh200\b", 989, 139.8, 4800, 450, "gpu", capability=9.0),
        Chip("B200", r"\bb200\b", 2250, 178.0, 8000, 900, "gpu", capability=10.0),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind` ("TPU v5 lite", "NVIDIA H100 80GB HBM3"), None for an unknown one or a CPU."""
    kind = device_kind.lower()
    return next((chip for chip in CHIPS.values() if re.search(chip.kind, kind)), None)


@dataclasses.dataclass(frozen=True)
class Slices:
    """So many slices of so many chips."""

    chip: Chip
    topology: str  # "4x8", or a number of GPUs
    devices: int  # of all slices
    slices: int = 1

    def __str__(self) -> str:
        text = f"{self.chip.name}:{self.topology}"
        return f"{self.slices} x {text}" if self.slices > 1 else text


def parse_topology(text: str, slices: int = 1) -> Slices:
    """`v5e:4x8`, `v5p:2x2x4`, `H100:8`; of several slices each is of that size.

    Raises UserError for an unknown chip or a size that is not NxM, NxMxK or a number.
    """
    name, _, size = text.partition(":")
    by_lower = {known.lower(): chip for known, chip in CHIPS.items()}
    if name.lower() not in by_lower:
        raise UserError(f"topology {text!r}: no chip {name!r}; there are {', '.join(CHIPS)}")
    chip = by_lower[name.lower()]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", size):
        raise UserError(f"topology {text!r}: write CHIP:SIZE, such as v5e:4x8, v5p:2x2x4 or H100:8")
    if slices < 1:
        raise UserError(f"{slices} slices: at least one")
    devices = 1
    for part in size.split("x"):
        devices *= int(part)
    if chip.name == "tpu7x":
        devices *= 2
    return Slices(chip, size, devices * slices, slices)
