"""The train step: one pure function, jitted once, with its state donated."""

import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float32

from kangaroo_jax.chips import find_chip
from kangaroo_jax.conventions import Array, PackedBatch
from kangaroo_jax.models.parameters import Binding, Params
from kangaroo_jax.sharding import Axes, apart, batch_axes, constrain
from kangaroo_jax.training.guard import told


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step changes, and the frozen weights that it reads."""

    step: jax.Array  # int32[]; number of finished steps
    params: Params  # float32, trained
    frozen: Params  # in optimizer.frozen_dtype, without gradient or optimiser state
    opt_state: optax.OptState


Scalar = Float32[Array, ""]
Metrics = dict[str, Scalar]
Sums = tuple[Scalar, Scalar, Params]  # sums of losses, of weights, of gradients
TrainStep = Any  # a jitted (TrainState, PackedBatch) -> (TrainState, Metrics)
TokenLosses = Any  # a jitted (Params, Params, PackedBatch) -> float32[B, T]
LossFunction = Any  # a jitted (Params, Params, PackedBatch) -> (Scalar, Scalar)

TPU_OPTIONS = {
    # A product whose weight is gathered is not cut into as many products as there are devices, each with its transfer
    # ("windowed einsum"): a ViT's are then a 32nd as deep as the matrix unit needs. The MiB from which they are cut.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Weights are gathered beside products. By itself XLA does so for v5e, and waits for them on v5p and v6e.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def mean_loss(binding: Binding, params: Params, frozen: Params, batch: PackedBatch) -> tuple[Scalar, Scalar]:
    """(mean loss over the weighted targets of the whole batch, their total weight)."""
    loss_sum, weight_sum = binding.bind({**params, **frozen}).loss(batch)
    return loss_sum / jnp.maximum(weight_sum, 1.0), weight_sum


def gradient(
    binding: Binding, params: Params, frozen: Params, batch: PackedBatch, accumulate: int = 1
) -> tuple[tuple[Scalar, Scalar], Params]:
    """((mean loss, total weight), gradient by `params`), with each gradient sharded like its weight.

    With `accumulate` over 1 the batch is cut into as many parts (which must divide B), computed one after another.
    Sums of losses are differentiated and divided once by the weight of the whole batch, so that parts of different
    weight give the gradient of the whole.
    """
    if accumulate == 1:
        value, grads = jax.value_and_grad(lambda p: mean_loss(binding, p, frozen, batch), has_aux=True)(params)
        return value, _like_weights(binding, grads)

    def loss_sum(params: Params, frozen: Params, part: PackedBatch) -> tuple[Scalar, Scalar]:
        loss, weight = binding.bind({**params, **frozen}).loss(part)
        return loss, weight

    def sums(params: Params, frozen: Params, parts: PackedBatch) -> Sums:
        def add(total: Sums, part: PackedBatch) -> tuple[Sums, None]:
            (loss, weight), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, frozen, part)
            grads = _like_weights(binding, grads)
            return jax.tree.map(jnp.add, total, (loss, weight, grads)), None

        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, _like_weights(binding, jax.tree.map(jnp.zeros_like, params)))
        return jax.lax.scan(add, start, parts)[0]

    axes = jax.tree.map(lambda axes: (None, *axes), batch_axes(), is_leaf=lambda axes: isinstance(axes, tuple))
    # Between slices gradients cross the slow network: once, and not for every part.
    loss, weight, grads = apart(sums, "replicas", ((), (), axes))(params, frozen, _parts_of(batch, accumulate))
    scale = 1.0 / jnp.maximum(weight, 1.0)
    return (loss * scale, weight), jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def _parts_of(batch: PackedBatch, count: int) -> PackedBatch:
    """[B, ...] -> [count, B / count, ...], with every device's rows spread evenly over the parts."""

    def split(x: jax.Array, axes: Axes) -> jax.Array:
        parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        return constrain(parts, (None, *axes))

    parts: PackedBatch = jax.tree.map(split, batch, batch_axes())
    return parts


def make_loss(binding: Binding, accumulate: int = 1) -> LossFunction:
    """A jitted (trained weights, frozen weights, batch) -> (sum of losses, of weights), in parts as the step's."""

    def loss(params: Params, frozen: Params, batch: PackedBatch) -> tuple[Scalar, Scalar]:
        model = binding.bind({**params, **frozen})

        def add(total: tuple[Scalar, Scalar], part: PackedBatch) -> tuple[tuple[Scalar, Scalar], None]:
            return jax.tree.map(jnp.add, total, model.loss(part)), None

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, (zero, zero), _parts_of(batch, accumulate))[0]

    return jax.jit(loss)


def make_token_losses(binding: Binding, accumulate: int = 1) -> TokenLosses:
    """A jitted (trained weights, frozen weights, batch) -> each target's loss [B, T], 0 where its weight is."""

    def losses(params: Params, frozen: Params, batch: PackedBatch) -> Float32[Array, "B T"]:
        model = binding.bind({**params, **frozen})

        def of_part(part: PackedBatch) -> jax.Array:
            def loss(weights: jax.Array) -> jax.Array:
                total: jax.Array = model.loss(dataclasses.replace(part, weights=weights))[0]
                return total

            losses: jax.Array = jax.grad(loss)(part.weights)
            return losses

        each = jax.lax.map(of_part, _parts_of(batch, accumulate))
        return constrain(jnp.moveaxis(each, 0, 1).reshape(batch.weights.shape), ("batch", "tokens"))

    return jax.jit(losses)


def _like_weights(binding: Binding, grads: Params) -> Params:
    return {path: constrain(grad, binding.axes[path]) for path, grad in grads.items()}


def make_train_step(
    binding: Binding,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
    shardings: Any = None,
    skip_nonfinite: bool = False,
) -> TrainStep:
    """`train_step(state, batch) -> (state, metrics)`; metrics: loss, grad_norm, learning_rate, target_weight,
    and what `guard.told` says.

    `accumulate`: parts of the batch that are computed one after another. `shardings`: the shardings of the state, which
    the step preserves, so that the second step is not compiled again. `skip_nonfinite`: a step whose loss or gradient
    norm is not finite counts, but leaves weights and optimiser unchanged.
    """

    def train_step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        (loss, weight), grads = gradient(binding, state.params, state.frozen, batch, accumulate)
        norm = optax.tree.norm(grads)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "target_weight": weight,
        }

        def update(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        before = (state.params, state.opt_state)
        if skip_nonfinite:  # a branch, because a select would hold both results in memory and round them differently
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = jax.lax.cond(finite, update, lambda *kept: kept, *before)
        else:
            params, opt_state = update(*before)
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics | told(opt_state)

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None),
        compiler_options=None if shardings is None else compiler_options(_a_device(shardings)),
    )


def compiler_options(device: Any) -> dict[str, str] | None:
    """The options that a step for `device` is compiled with, None for the compiler's own.

    A TPU's are those of TPU_OPTIONS and the chip's `vmem_kib`, without those that LIBTPU_INIT_ARGS names.
    """
    if device.platform != "tpu":
        return None
    chip = find_chip(device.device_kind)
    limit = {"xla_tpu_scoped_vmem_limit_kib": str(chip.vmem_kib)} if chip and chip.vmem_kib else {}
    named = re.findall(r"--(\w+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
    return {name: value for name, value in {**TPU_OPTIONS, **limit}.items() if name not in named}


def _a_device(shardings: Any) -> Any:
    """One of the devices that hold the arrays of these shardings."""
    return next(iter(jax.tree.leaves(shardings)[0].device_set))
