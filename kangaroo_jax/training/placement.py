"""Chooses mesh, remat policies and gradient accumulation for the available chips, where the config says "auto".

A config may set each of them. Those that it leaves open ("auto", an empty mesh, 0 for `accumulate`) come from TABLE.
Its rows are those that are foretold fastest among those that fit, by the compiled step or by formula (docs/plan.md says
which); `kangaroo plan --search` looks for others.
"""

import dataclasses
import math

from kangaroo_jax.chips import Chip
from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.sharding import mesh_sizes


@dataclasses.dataclass(frozen=True)
class Placement:
    """One row of the table."""

    context: int = 1
    tensor: int = 1
    llm_remat: str = "full"
    vision_remat: str = "full"
    packs_per_device: int = 1  # rows for a group of context * tensor devices at a time


@dataclasses.dataclass(frozen=True)
class Row:
    """A placement, and what it is for."""

    chip: str
    tokens: int  # at most, in a pack
    patches: int  # at most, of all frames of a pack
    devices: int  # of a slice, at least: fewer hold more of the weights and of the optimiser's state each
    placement: Placement


ANY = 1 << 30
# The first row that a stage and a slice are within is used. A tensor axis moves tokens beside every product, remat
# computes a part of the forward pass again: each row has as little of both as memory allows.
TABLE = (
    Row("v5e", 10_240, 1 << 14, 32, Placement(vision_remat="mlp")),  # stages 1 and 2
    Row("v5e", 10_240, ANY, 32, Placement()),  # stage 3
    Row("v5e", 1 << 15, ANY, 32, Placement(tensor=2)),  # stages 4 and 5
    Row("v5e", 1 << 15, ANY, 1, Placement(tensor=4)),
    Row("v6e", 10_240, 1 << 14, 32, Placement(llm_remat="minimal", vision_remat="mlp")),
    Row("v6e", 10_240, ANY, 32, Placement(llm_remat="minimal", vision_remat="context")),
    Row("v6e", 16_384, ANY, 32, Placement(llm_remat="context", vision_remat="context")),
    Row("v6e", 1 << 15, ANY, 32, Placement(llm_remat="context")),
    Row("v6e", 1 << 15, ANY, 1, Placement(tensor=4)),
    Row("v5p", 10_240, 1 << 14, 16, Placement(llm_remat="mlp", vision_remat="mlp")),
    Row("v5p", 10_240, ANY, 16, Placement(llm_remat="mlp", vision_remat="minimal")),
    Row("v5p", 16_384, ANY, 16, Placement(llm_remat="mlp", vision_remat="context")),
    Row("v5p", 28_672, ANY, 16, Placement(llm_remat="gate", vision_remat="context")),
    Row("v5p", 1 << 15, ANY, 1, Placement()),
    # In packs of hours attention is most of the work; it is not recomputed, at the cost of some GiB on each device.
    Row("v5p", 1 << 19, ANY, 1, Placement(context=16, tensor=4, llm_remat="mlp")),
    Row("v5p", 1 << 21, ANY, 1, Placement(context=64, tensor=4, llm_remat="mlp")),
    # JAX takes three quarters of a GPU's memory unless it is told otherwise: these leave the rest free.
    *(
        Row(chip, *row)
        for chip in ("A100", "H100")
        for row in (
            (10_240, 1 << 14, 64, Placement(llm_remat="mlp", vision_remat="mlp")),
            (10_240, ANY, 64, Placement(llm_remat="mlp", vision_remat="minimal")),
            (16_384, ANY, 64, Placement(llm_remat="minimal", vision_remat="minimal")),
            (28_672, ANY, 64, Placement(llm_remat="minimal")),
        )
    ),
    Row("H200", 10_240, ANY, 64, Placement(llm_remat="mlp", vision_remat="mlp")),
    Row("H200", 16_384, ANY, 64, Placement(llm_remat="mlp", vision_remat="minimal")),
    Row("H200", 28_672, ANY, 64, Placement(llm_remat="mlp")),
)
DEFAULT = Placement()


def resolve(config: StageConfig, chip: Chip | None, devices: int, slices: int = 1) -> StageConfig:
    """A copy of a stage's config with mesh, accumulation and remat policies set.

    Args:
        config: a stage's config.
        chip: the kind of chip; None is a CPU.
        devices: the number of devices, over all slices.
        slices: the number of slices; the data axis spans them.

    Raises UserError if the mesh does not fit the devices, or the packs do not fit the mesh.
    """
    row = _row(config, chip, devices // slices)
    policies = {"model.llm.remat": row.llm_remat, "model.vision.remat": row.vision_remat}
    kept = dict(config.flat())
    left_open = {key: policy for key, policy in policies.items() if kept[key] == "auto"}
    if not config.train.mesh:
        row = _shared_rows(config, row, chip, devices, slices)
    mesh = mesh_sizes(config.train.mesh or (slices, -1, row.context, row.tensor), devices)
    packs, rows = config.data.packs_per_batch, mesh[0] * mesh[1]
    if packs % rows:
        raise UserError(
            f"config.data.packs_per_batch {packs} must be a multiple of {rows}, the data and fsdp sizes of the "
            f"mesh {mesh}"
        )
    accumulate = config.train.accumulate or _accumulate(packs // rows, row.packs_per_device)
    if packs % (rows * accumulate):
        raise UserError(
            f"config.train.accumulate {accumulate}: {packs} packs over {rows} groups of devices "
            f"cannot be cut into as many parts"
        )
    return config.changed({**left_open, "train.mesh": mesh, "train.accumulate": accumulate})


def _row(config: StageConfig, chip: Chip | None, devices: int) -> Placement:
    data = config.data
    patches = data.frames_per_pack * (data.image_size // config.model.vision.patch_size) ** 2
    for row in TABLE:
        within = data.tokens_per_pack <= row.tokens and patches <= row.patches and devices >= row.devices
        if chip is not None and chip.name == row.chip and within:
            # A slice that is smaller than the group of devices uses all it has.
            tensor = math.gcd(row.placement.tensor, devices)
            context = math.gcd(row.placement.context, devices // tensor)
            return dataclasses.replace(row.placement, tensor=tensor, context=context)
    return DEFAULT


def _shared_rows(config: StageConfig, row: Placement, chip: Chip | None, devices: int, slices: int) -> Placement:
    """The placement with larger groups of devices, if there are more groups than packs.

    The context axis grows; on GPUs, whose links are fastest inside a node, the tensor axis grows.
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
    """The number of parts into which a device's `packs` are cut, of at most `at_a_time` packs each."""
    return next(parts for parts in range(-(-packs // at_a_time), packs + 1) if packs % parts == 0)
