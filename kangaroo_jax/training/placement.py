"""How a stage lies on the chips at hand: mesh, remat policies and gradient accumulation, where the config says "auto".

A config may name each itself. What it leaves open ("auto", an empty mesh, 0 for `accumulate`) comes from
TABLE. Its rows are cautious: full remat, and a tensor axis on chips of 16 and 32 GB. `kangaroo plan --search` may find
faster ones.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from kangaroo_jax.chips import Chip
from kangaroo_jax.errors import UserError
from kangaroo_jax.sharding import mesh_sizes


@dataclasses.dataclass(frozen=True)
class Placement:
    """One row of the table."""

    context: int = 1
    tensor: int = 1
    llm_remat: str = "full"
    vision_remat: str = "full"
    packs_per_device: int = 1  # rows that a group of context * tensor devices works on at a time


# (chip, tokens a pack at most) -> placement; the first row that fits is taken.
TABLE: tuple[tuple[str, int, Placement], ...] = (
    ("v5e", 1 << 15, Placement(tensor=4)),
    ("v6e", 1 << 15, Placement(tensor=4)),
    ("v5p", 1 << 15, Placement()),
    # In rows of hours attention is most of the work: not computed again, for some GiB a device.
    ("v5p", 1 << 19, Placement(context=16, tensor=4, llm_remat="minimal")),
    ("v5p", 1 << 21, Placement(context=64, tensor=4, llm_remat="minimal")),
)
DEFAULT = Placement()


def resolve(config: ConfigDict, chip: Chip | None, devices: int, slices: int = 1) -> ConfigDict:
    """A copy of a stage's config in which mesh, accumulation and remat policies are decided.

    Args:
        config: a stage's config.
        chip: what it runs on; None is a CPU.
        devices: how many there are, over all slices.
        slices: the data axis runs over them.

    Raises UserError where the mesh does not fit the devices, or the packs the mesh.
    """
    config = config.copy_and_resolve_references()
    row = _row(config, chip, devices // slices)
    with config.unlocked():
        for part, policy in ((config.model.llm, row.llm_remat), (config.model.vision, row.vision_remat)):
            if part.remat == "auto":
                part.remat = policy
        if not config.train.mesh:
            row = _shared_rows(config, row, chip, devices, slices)
        mesh = tuple(config.train.mesh) or (slices, -1, row.context, row.tensor)
        config.train.mesh = mesh_sizes(mesh, devices)
        rows = config.train.mesh[0] * config.train.mesh[1]
        packs = config.data.packs_per_batch
        if packs % rows:
            raise UserError(
                f"config.data.packs_per_batch {packs} must be a multiple of {rows}, the data and fsdp sizes of the "
                f"mesh {config.train.mesh}"
            )
        if not config.train.accumulate:
            config.train.accumulate = _accumulate(packs // rows, row.packs_per_device)
        if packs % (rows * config.train.accumulate):
            raise UserError(
                f"config.train.accumulate {config.train.accumulate}: {packs} packs over {rows} groups of devices "
                f"cannot be cut into as many parts"
            )
    return config


def _row(config: ConfigDict, chip: Chip | None, devices: int) -> Placement:
    for name, tokens, placement in TABLE:
        if chip is not None and chip.name == name and config.data.tokens_per_pack <= tokens:
            # A slice smaller than the group of devices takes what it has.
            tensor = math.gcd(placement.tensor, devices)
            return dataclasses.replace(placement, tensor=tensor, context=math.gcd(placement.context, devices // tensor))
    return DEFAULT


def _shared_rows(config: ConfigDict, row: Placement, chip: Chip | None, devices: int, slices: int) -> Placement:
    """The placement with larger groups, where there are more groups of devices than packs to give them.

    A longer context axis, or on GPUs, whose attention has none, a longer tensor axis.
    """
    packs, tokens = config.data.packs_per_batch, config.data.tokens_per_pack
    gpu = chip is not None and chip.platform == "gpu"
    while packs % (devices // (row.context * row.tensor)):
        larger = (
            dataclasses.replace(row, tensor=2 * row.tensor)
            if gpu
            else dataclasses.replace(row, context=2 * row.context)
        )
        fits = larger.tensor <= config.model.llm.kv_heads if gpu else tokens % (2 * larger.context) == 0
        if not fits or (devices // slices) % (larger.context * larger.tensor):
            break
        row = larger
    return row


def _accumulate(packs: int, at_a_time: int) -> int:
    """Into how many steps `packs` of a device are cut, of at most `at_a_time` each."""
    return next(parts for parts in range(-(-packs // at_a_time), packs + 1) if packs % parts == 0)
