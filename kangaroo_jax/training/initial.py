"""The initial state of a stage: weights of another checkpoint, or fresh ones."""

import functools

import jax
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import StageConfig
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.parameters import Binding
from kangaroo_jax.sharding import mesh_scope, sharding
from kangaroo_jax.training.state import make_state, state_shardings
from kangaroo_jax.training.step import TrainState


def initial_state(config: StageConfig, binding: Binding, mesh: Mesh) -> TrainState:
    """Weights of `config.init_from`, or fresh ones, split into trained and frozen; zeros in the optimiser."""

    def fresh() -> dict[str, jax.Array]:
        return binding.flatten(KangarooModel(config.model, rngs=nnx.Rngs(config.seed)))

    shardings = {path: sharding(mesh, axes, binding.shapes[path].shape) for path, axes in binding.axes.items()}
    if config.init_from:
        if not config.init_other_rope:
            reading.check_rope(config.init_from, config.model)
        params = reading.load_params(config.init_from, binding, mesh)
    else:
        params = jax.jit(fresh, out_shardings=shardings)()
    with mesh_scope(mesh):
        make = functools.partial(make_state, config)
        where = state_shardings(jax.eval_shape(make, params), binding, mesh)
        state: TrainState = jax.jit(make, out_shardings=where)(params)
        return state
