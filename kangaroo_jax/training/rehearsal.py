"""A stage's step on this machine's devices before the stage begins: compiled, and timed."""

import time

import jax
import jax.numpy as jnp

from kangaroo_jax.config import StageConfig
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.sharding import mesh_scope
from kangaroo_jax.training.host_rows import HostRows
from kangaroo_jax.training.loop import place
from kangaroo_jax.training.state import abstract_state, build_step, shardings_of
from kangaroo_jax.training.step import TrainStep

_TIMED = 2


def rehearse(given: StageConfig, batch: PackedBatch) -> tuple[TrainStep, float]:
    """(the compiled step, the seconds that it takes), with zeros in place of the weights.

    Args:
        given: a stage's config, with the number of steps that it will have. `train` takes the step for the same one.
        batch: of all rows, on the host.

    Raises UserError for impossible settings, and what JAX raises where the devices have too little memory.
    """
    config, _, mesh = place(given)
    binding = abstract_model(config.model, config.lora)
    target = abstract_state(config, binding, mesh)
    step = build_step(config, binding, target)
    placed = HostRows(mesh, config.data.packs_per_batch).put(batch)
    with mesh_scope(mesh):
        make = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target), out_shardings=shardings_of(target)
        )
        state, _ = step(make(), placed)
        jax.block_until_ready(state)
        seconds = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            state, _ = step(state, placed)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
    return step, min(seconds)
