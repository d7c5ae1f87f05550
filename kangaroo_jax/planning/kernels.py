"""Attention kernels of a compiled program: their work, and their time by their own schedules.

XLA knows nothing of a Pallas kernel. `kernels.jsonl` has the schedule of each by chip, block and width, as
`kangaroo plan --mode=kernels` reads it from what the compiler makes of the kernel (`planning/bundles.py`).
"""

import dataclasses
import functools
import json
import math
import re
from importlib import resources

from kangaroo_jax.chips import Chip
from kangaroo_jax.models.attention_frames import LANES, QUERIES, TAKEN
from kangaroo_jax.models.attention_splash import visited_share
from kangaroo_jax.planning import hlo
from kangaroo_jax.planning.bundles import Schedule

# Matrix products of [T, S] with the head width in each kernel: forward, the two backward kernels, the fused one.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5, "frames_fwd": 2, "frames_bwd": 5}  # the last two: a ViT's own
TABLE = "kernels.jsonl"
CLOCK_GHZ = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}  # peak over the products of a cycle
CORES = {"v4": 2, "v5p": 2}  # of a chip; 1 for others


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    chip: str
    kind: str  # of PRODUCTS
    causal: bool
    block_q: int
    block_kv: int
    computed: int  # keys whose scores exist at a time
    width: int  # of a head


@dataclasses.dataclass(frozen=True)
class Timed:
    """A kernel's schedule, on how many cores of a chip it runs, and what it was compiled with."""

    schedule: Schedule
    cores: int
    jax: str
    libtpu: str

    def line(self, shape: Shape) -> str:
        """A line of the table."""
        rest = {"cores": self.cores, "jax": self.jax, "libtpu": self.libtpu}
        return json.dumps({**dataclasses.asdict(shape), **dataclasses.asdict(self.schedule), **rest})


@functools.cache
def table() -> dict[Shape, Timed]:
    """The kernels whose schedules were read; of several lines for one the last counts."""
    found = {}
    text = resources.files("kangaroo_jax.planning").joinpath(TABLE).read_text(encoding="utf-8")
    for line in text.splitlines():
        fields = json.loads(line)
        shape = Shape(**{field.name: fields[field.name] for field in dataclasses.fields(Shape)})
        schedule = Schedule(**{field.name: fields[field.name] for field in dataclasses.fields(Schedule)})
        found[shape] = Timed(schedule, fields["cores"], fields["jax"], fields["libtpu"])
    return found


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel in a program."""

    kind: str
    causal: bool
    items: int  # rows of tokens, times heads
    length: int
    keys: int
    width: int
    share: float  # of the blocks that are visited, where all of a row are of one sample
    blocks: tuple[int, int, int]  # queries and keys of one, and the keys whose scores exist at a time

    @property
    def flops(self) -> float:
        """FLOPs of its products over the blocks that it visits."""
        return 2.0 * PRODUCTS[self.kind] * self.items * self.length * self.keys * self.width * self.share

    def shape(self, chip: str) -> Shape:
        """What it was compiled for."""
        return Shape(chip, self.kind, self.causal, *self.blocks, self.width)

    def seconds(self, chip: Chip, visited: float = 1.0) -> float:
        """Its time by its schedule, at least that of its products at the peak; that alone where none is known.

        Where the schedule of other blocks alone is known, each of its cycles counts for as much of a block.

        `visited` is the share of a causal row's blocks that packing leaves of `share`.
        """
        shape = self.shape(chip.name)
        timed = table().get(shape) or _of_other_blocks(shape)
        share = visited if self.causal else 1.0
        peak = self.flops * share / (chip.tflops * 1e12)
        if timed is None or chip.name not in CLOCK_GHZ:
            return peak
        queries, keys = self.length // shape.block_q, self.keys // shape.block_kv
        steps = self.items * queries * keys
        rows = self.items * (queries if self.kind in ("fwd", "dq") else keys)
        cycles = timed.schedule.cycles(steps, steps * self.share * share, rows) / timed.cores
        return max(cycles / (CLOCK_GHZ[chip.name] * 1e9), peak * CORES.get(chip.name, 1) / timed.cores)


def _of_other_blocks(shape: Shape) -> Timed | None:
    """A known kernel that differs in its blocks alone, as it would take these."""
    for known, timed in table().items():
        if dataclasses.replace(known, block_q=0, block_kv=0, computed=0) == dataclasses.replace(
            shape, block_q=0, block_kv=0, computed=0
        ):
            rows, size = shape.block_q / known.block_q, shape.block_q * shape.block_kv / known.block_q / known.block_kv
            scaled = dataclasses.replace(
                timed.schedule,
                visited=round(timed.schedule.visited * size),
                first=round(timed.schedule.first * rows),
                last=round(timed.schedule.last * rows),
            )
            return dataclasses.replace(timed, schedule=scaled)
    return None


def call(visit: hlo.Visit) -> Call | None:
    """The attention kernel that an operation is, None for others."""
    operation, found = visit.operation, []
    scope = operation.scope
    if operation.kind != "custom-call" or "tpu_custom_call" not in operation.text:
        return None
    if frames := next((kind for kind in ("frames_fwd", "frames_bwd") if kind in scope), ""):
        n, length, width = visit.operand_shape(0)
        pairs, blocks = n * width // TAKEN, (length, length, min(length, QUERIES))
        return Call(frames, False, pairs, length, length, LANES, 1.0, blocks)  # of heads, as wide as one
    if "splash_" not in scope:
        return None
    for name in operation.operands:
        dtype, shape = visit.computation[name].shapes[0]
        if dtype in ("bf16", "f32") and len(shape) >= 2:  # dimensions of size 1 may be gone
            found.append((1,) * (3 - len(shape)) + shape)
    if len(found) < 2:
        return None
    (*rest, heads, length, width), keys = found[0], found[1][-2]
    kinds = (kind for kind in ("dkv", "dq", "fwd") if f"splash_mha_{kind}" in scope or f"splash_mqa_{kind}" in scope)
    kind = next(kinds)
    parts_of_d_query = [s for _, s in operation.shapes if len(s) > len(found[0]) and s[-3:] == (heads, length, width)]
    if kind == "dkv" and parts_of_d_query:
        kind = "fused"
    causal = "splash_causal" in scope
    share = visited_share(length, keys, causal, keys // length if causal else 1)
    blocks = _blocks(operation.text, kind)
    return Call(kind, causal, math.prod(rest) * heads, length, keys, width, share, blocks)


def _blocks(text: str, kind: str) -> tuple[int, int, int]:
    """(queries, keys, keys computed at a time) of a kernel's blocks, from its metadata; 0 where they are not there."""
    suffix = {"fwd": "", "dq": "_dq"}.get(kind, "_dkv")

    def size(name: str) -> int:
        found = re.search(rf'"{name}\\*": (\d+)', text.replace('\\"', '"'))
        return int(found.group(1)) if found else 0

    keys = size(f"block_kv{suffix}")
    return size(f"block_q{suffix}"), keys, size(f"block_kv{suffix}_compute") or keys
