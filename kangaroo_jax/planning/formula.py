"""Memory and time of a step by formula: for chips without a compiler here, and to choose what to compile.

The memory formula counts the large parts: weights and optimiser, gradients, the input of every layer that full remat
keeps, and the working set of one layer and of the loss. Its error should be below a fifth.
"""

import itertools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from kangaroo_jax.chips import Chip, Slices
from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.errors import UserError
from kangaroo_jax.planning.adapters import adapted_sizes
from kangaroo_jax.sharding import MESH_AXES, sharding
from kangaroo_jax.training.flops import part_trains, step_flops
from kangaroo_jax.training.placement import resolve

GIB = 1 << 30
OVERHEAD_GIB = 0.5  # the program itself
COMPILERS_SHARE = 1.2  # buffers that the compiler holds twice; fitted to its results for stages 3 and 5
# Activations that a remat policy keeps for each layer besides its input, in multiples of the model's width.
KEPT_WIDTHS = {
    **{"full": 0.0, "offload": 0.0, "context": 1.0, "minimal": 3.5, "gate": 7.0, "mlp": 10.5, "dots": 11.0},
    "none": 22.0,
}
# The share of a forward pass that a remat policy computes again.
RECOMPUTED = {
    **{"full": 0.73, "context": 0.7, "offload": 0.62, "minimal": 0.62, "gate": 0.35, "mlp": 0.08, "dots": 0.0},
    "none": 0.0,
}


def weights_and_state(config: StageConfig, counts: dict[str, int]) -> tuple[float, float]:
    """(bytes of weights and optimiser, bytes of gradients) of the whole model, over all devices."""
    moments = {"float32": 8.0, "bfloat16": 4.0}[config.optimizer.moment_dtype]
    moments = {"adafactor": 0.02, "muon": 4.0}.get(config.optimizer.kind, moments)
    if config.lora.rank:
        factors, base = adapted_sizes(config.model, config.lora)
        return factors * (4.0 + moments) + base, factors * 4.0
    trained = sum(n for name, n in counts.items() if name != "total" and part_trains(name, config))
    frozen = counts["total"] - trained
    return trained * (4.0 + moments) + frozen * 2.0, trained * 4.0


def peak_gib(config: StageConfig, counts: dict[str, int]) -> float:
    """Estimated memory of one device, in GiB, for a resolved config (`training.placement.resolve`)."""
    data, model = config.data, config.model
    _, fsdp, context, tensor = config.train.mesh
    llm, vision = model.llm, model.vision
    devices = config.train.mesh[0] * fsdp * context * tensor
    state, gradients = weights_and_state(config, counts)
    rows = max(1, data.packs_per_batch // (config.train.mesh[0] * fsdp) // config.train.accumulate)
    tokens = rows * data.tokens_per_pack / context
    total = (state + gradients) / (fsdp * context * tensor)

    layers = llm.depth * tokens * llm.width * 2.0
    kept = layers * (1 + KEPT_WIDTHS[llm.remat]) / tensor
    layer_weights = (counts["llm"] - (1 if llm.tied_head else 2) * llm.vocab_size * llm.width) / llm.depth
    working = 2 * 2.0 * layer_weights / tensor + tokens * 2.0 * (6 * llm.width + 4 * llm.mlp_width / tensor)
    if part_trains("llm", config):
        working += 4.0 * layer_weights / tensor
    loss = llm.vocab_size / tensor * (4.0 * 3 * rows * llm.loss_chunk + 2.0 * llm.width)
    if part_trains("llm", config):
        loss += 4.0 * llm.width * llm.vocab_size / tensor

    frames = data.packs_per_batch * data.frames_per_pack / devices / config.train.accumulate
    vision_tokens = (data.image_size // vision.patch_size) ** 2 + 1
    seen = frames * vision_tokens * vision.width * 2.0
    seen_kept = seen * vision.depth * (1 + KEPT_WIDTHS[vision.remat]) if part_trains("vision", config) else 0.0
    seen_working = seen * 14
    shape, mesh = (data.packs_per_batch, data.frames_per_pack), AbstractMesh(config.train.mesh, MESH_AXES)
    held = sharding(mesh, ("batch", "pack_frames"), shape)
    pixels = math.prod(held.shard_shape(shape)) * data.image_size**2 * 3
    groups = data.frames_per_pack // frames_per_group(model) if data.frames_per_pack else 0
    vision_rows = rows * groups * tokens_per_group(model, data.image_size) * llm.width * 2.0
    total += kept + seen_kept + max(working, loss, seen_working) + pixels + 2 * vision_rows
    return round(COMPILERS_SHARE * total / GIB + OVERHEAD_GIB, 2)


def step_seconds(config: StageConfig, chip: Chip, counts: dict[str, int], mfu: float) -> float:
    """Estimated seconds of a step: the work, including recomputation, at `mfu`, and half of the transfers (overlap)."""
    _, fsdp, context, tensor = config.train.mesh
    devices = config.train.mesh[0] * fsdp * context * tensor
    flops, llm = step_flops(config), config.model.llm
    repeated = 1 + RECOMPUTED[llm.remat] / 3
    compute = flops.causal * repeated / (devices * chip.tflops * 1e12 * mfu)
    parts = config.train.accumulate
    layer_bytes = (
        2.0 * (counts["llm"] - (1 if llm.tied_head else 2) * llm.vocab_size * llm.width) / tensor * 4
    )  # 3 gathers, 1 reduction
    rows = max(1, config.data.packs_per_batch // (config.train.mesh[0] * fsdp) // parts)
    tokens = rows * config.data.tokens_per_pack / context
    moved = layer_bytes if fsdp * context > 1 else 0.0
    if tensor > 1:
        moved += llm.depth * 11 * tokens * llm.width * 2.0
    if context > 1:
        moved += llm.depth * 4 * tokens * context * 2 * llm.kv_heads * llm.head_dim * 2.0 / tensor
    return compute + 0.5 * moved * parts / (chip.link_gb * 1e9)


def candidates(config: StageConfig, target: Slices, counts: dict[str, int], mfu: float) -> Iterator[StageConfig]:
    """Resolved configs with other meshes and remat policies that the formula expects to fit, fastest first."""
    inner = target.devices // target.slices
    sizes = [2**i for i in range(inner.bit_length()) if inner % 2**i == 0]
    found: list[tuple[float, StageConfig]] = []
    for context, tensor in itertools.product(sizes, sizes):
        if inner % (context * tensor) or tensor > config.model.llm.kv_heads:
            continue
        for remat in ("none", "mlp", "gate", "minimal", "context", "full"):
            choice = {
                "train.mesh": (target.slices, -1, context, tensor),
                "train.accumulate": 0,
                "model.llm.remat": remat,
                "model.vision.remat": "full" if remat == "none" else remat,
            }
            try:
                trial = resolve(config.changed(choice), target.chip, target.devices, target.slices)
            except UserError:
                continue
            if config.data.tokens_per_pack % (2 * context) == 0 and peak_gib(trial, counts) < 1.1 * target.chip.gib:
                found.append((step_seconds(trial, target.chip, counts, mfu), trial))
    yield from (trial for _, trial in sorted(found, key=lambda pair: pair[0]))
