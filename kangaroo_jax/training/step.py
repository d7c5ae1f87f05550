"""The train step: one pure function, jitted once, its state donated."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.training.parameters import Binding, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and the frozen weights that it reads."""

    step: jax.Array  # int32[]; steps done
    params: Params  # float32, trained
    frozen: Params  # optimizer.frozen_dtype: no gradient, no optimiser state
    opt_state: optax.OptState


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]


def mean_loss(binding: Binding, params: Params, frozen: Params, batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
    """(mean loss over the weighted targets of the whole batch, their total weight)."""
    loss_sum, weight_sum = binding.bind({**params, **frozen}).loss(batch)
    return loss_sum / jnp.maximum(weight_sum, 1.0), weight_sum


def make_train_step(binding: Binding, optimizer: optax.GradientTransformation, schedule: optax.Schedule) -> TrainStep:
    """`train_step(state, batch) -> (state, metrics)`; metrics: loss, grad_norm, learning_rate, target_weight."""

    def train_step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        grad_fn = jax.value_and_grad(lambda p: mean_loss(binding, p, state.frozen, batch), has_aux=True)
        (loss, weight), grads = grad_fn(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": schedule(state.step),
            "target_weight": weight,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
