"""Makes the train state from weights, and the sharding of each of its arrays on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kangaroo_jax.config import StageConfig
from kangaroo_jax.models.parameters import Binding, Params, split_trainable
from kangaroo_jax.sharding import sharding
from kangaroo_jax.training.optimizer import make_optimizer, make_schedule
from kangaroo_jax.training.step import TrainState, TrainStep, make_train_step


def rules_of(config: StageConfig) -> tuple[tuple[str, float | None], ...]:
    """(regex, multiplier) of what trains: `optimizer.trainable`, of the factors alone where there are some."""
    base: tuple[tuple[str, float | None], ...] = ((r"(?!.*/lora_[ab]$).*", None),) if config.lora.rank else ()
    return (*base, *config.optimizer.trainable)


def make_state(config: StageConfig, params: Params) -> TrainState:
    """Step 0: `params` split into trained and frozen by `config.optimizer`, and zeros in the optimiser."""
    trained, frozen = split_trainable(params, rules_of(config), config.optimizer.frozen_dtype)
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))


def state_shardings(state: Any, binding: Binding, mesh: Mesh) -> Any:
    """The sharding of every array of a (perhaps abstract) TrainState.

    A weight is sharded by its logical axes, and so are the optimiser's arrays with the weight's path and shape; arrays
    of other shapes (counts, factored moments) are replicated.
    """

    def sharding_of(path: tuple[Any, ...], x: Any) -> NamedSharding:
        for key in reversed(path):
            name = getattr(key, "key", None)
            if name in binding.axes and x.shape == binding.shapes[name].shape:
                return sharding(mesh, binding.axes[name], x.shape)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def abstract_state(config: StageConfig, binding: Binding, mesh: Mesh) -> TrainState:
    """`make_state` without arrays: only shapes, dtypes and shardings."""
    state = jax.eval_shape(lambda params: make_state(config, params), dict(binding.shapes))
    shardings = state_shardings(state, binding, mesh)
    placed: TrainState = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, shardings
    )
    return placed


def build_step(config: StageConfig, binding: Binding, state: TrainState) -> TrainStep:
    """The train step of a resolved config (`placement.resolve`) for a state, which may be abstract."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, state.params)
    schedule = make_schedule(config.optimizer, config.train.steps)
    skip = config.train.on_nonfinite == "skip"
    return make_train_step(binding, optimizer, schedule, config.train.accumulate, shardings_of(state), skip)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)
