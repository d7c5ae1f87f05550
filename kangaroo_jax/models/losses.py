"""Cross-entropy over a large vocabulary without ever holding all the logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from kangaroo_jax.conventions import Array
from kangaroo_jax.sharding import fitting, gather, index_on, max_over, per_device, shards, sum_over, sum_scatter

Scalar = Float32[Array, ""]
Gradients = tuple[Array | None, Array | None, Array | None]  # by the hidden states, by the head, by the weights


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> tuple[Scalar, Scalar]:
    """Weighted next-token cross-entropy -> (sum of weight * loss, sum of weights); `hidden` after the final norm.

    Logits exist for `chunk` tokens of each pack at a time. Tokens of weight 0 are sorted to the end of
    their pack and cost nothing. While logits are at hand their gradient is taken too (a scalar loss
    only scales it), so that nothing is computed twice; where the head is frozen its part is left out.
    The gradient by a weight is its token's loss (0 where the weight is).
    On a mesh every device sorts and sums the tokens that it has; only the head is gathered.
    """
    total = _weighted_loss(hidden, head, targets, weights.astype(jnp.float32), chunk)
    return total, jnp.sum(weights, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float32[Array, "B T"],
    chunk: int,
) -> Scalar:
    return _run(hidden, head, targets, weights, chunk, False, False, False)[0]


def _forward(hidden: Any, head: Any, targets: Any, weights: Any, chunk: int) -> tuple[Scalar, Gradients]:
    """The arguments are CustomVJPPrimal, which say whether a gradient is asked for."""
    wanted = hidden.perturbed, head.perturbed, weights.perturbed
    total, *gradients = _run(hidden.value, head.value, targets.value, weights.value, chunk, *wanted)
    return total, (gradients[0], gradients[1], gradients[2])


def _backward(_: int, gradients: Gradients, d_total: Any) -> tuple[Array | None, ...]:
    d_hidden, d_head, d_weights = (None if g is None else (g * d_total).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, d_weights


_weighted_loss.defvjp(_forward, _backward, symbolic_zeros=True)


HIDDEN, TOKENS, HEAD = ("batch", "tokens", None), ("batch", "tokens"), ("embed", "activation_vocab")


def _run(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    with_hidden: bool,
    with_head: bool,
    with_each: bool,
) -> tuple[Scalar, Array | None, Array | None, Array | None]:
    """(loss, its gradient by hidden or None, by head or None, by weights or None)."""
    axes = fitting(head.shape, HEAD)
    wanted: dict[str, Any] = dict(with_hidden=with_hidden, with_head=with_head, with_each=with_each)
    local = functools.partial(_run_local, axes=axes, chunk=chunk, **wanted)
    gradients = (HIDDEN if with_hidden else None, axes if with_head else None, TOKENS if with_each else None)
    run = per_device(local, (HIDDEN, axes, TOKENS, TOKENS), ((), *gradients))
    loss, d_hidden, d_head, each = run(hidden, head, targets, weights)
    return loss, d_hidden, d_head, each


def _run_local(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "d v"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    axes: tuple[str | None, ...],
    chunk: int,
    with_hidden: bool,
    with_head: bool,
    with_each: bool,
) -> tuple[Scalar, Array | None, Array | None, Array | None]:
    """`_run` on what one device has: its tokens, and its part of the head, cut over `axes`."""
    batch, length, width = hidden.shape
    embed, vocab = axes
    parts = -(-length // chunk)
    chunk = -(-length // parts)
    pad = [(0, 0), (0, parts * chunk - length)]
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    order = jnp.pad(order, pad, mode="edge")
    weights = jnp.where(np.arange(parts * chunk) < length, jnp.take_along_axis(weights, order, axis=1), 0.0)
    targets = jnp.take_along_axis(targets, order, axis=1)
    kernel = gather(head.astype(hidden.dtype), embed, 0)
    vocabulary = kernel.shape[1]
    first = index_on(vocab) * vocabulary if shards(vocab) > 1 else 0
    state = {"loss": jnp.zeros((), jnp.float32)}
    if with_hidden:
        state["hidden"] = jnp.zeros((batch, parts * chunk, width), hidden.dtype)
    if with_head:
        state["head"] = jnp.zeros(kernel.shape, jnp.float32)
    if with_each:
        state["each"] = jnp.zeros((batch, parts * chunk), jnp.float32)

    def step(index: Array, state: dict[str, Array]) -> dict[str, Array]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=index * chunk, slice_size=chunk, axis=1)
        target, weight = cut(targets) - first, cut(weights)
        x = jnp.take_along_axis(hidden, cut(order)[..., None], axis=1)
        logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)
        normaliser, true = _normaliser_and_true(logits, target, vocab)
        new = {"loss": state["loss"] + jnp.sum((normaliser - true) * weight)}
        if with_each:
            losses = jnp.where(weight != 0, normaliser - true, 0.0)
            new["each"] = jax.lax.dynamic_update_slice_in_dim(state["each"], losses, index * chunk, axis=1)
        if not (with_hidden or with_head):
            return new
        hit = jnp.arange(vocabulary) == target[..., None]
        d_logits = ((jnp.exp(logits - normaliser[..., None]) - hit) * weight[..., None]).astype(hidden.dtype)
        if with_hidden:
            d_x = jnp.einsum("btv,dv->btd", d_logits, kernel, preferred_element_type=jnp.float32).astype(hidden.dtype)
            d_x = sum_over(d_x, vocab)
            new["hidden"] = jax.lax.dynamic_update_slice_in_dim(state["hidden"], d_x, index * chunk, axis=1)
        if with_head:
            d_head = jnp.einsum("btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32)
            new["head"] = state["head"] + d_head
        return new

    counted = max_over(max_over(jnp.max(jnp.sum(weights != 0, axis=1)), "batch"), "tokens")
    state = jax.lax.fori_loop(0, (counted + chunk - 1) // chunk, step, state)
    d_hidden = d_head = each = None
    if with_each:
        each = jnp.take_along_axis(state["each"], jnp.argsort(order[:, :length], axis=1), axis=1)
    if with_hidden:
        place = jnp.argsort(order[:, :length], axis=1)
        d_hidden = jnp.take_along_axis(state["hidden"], place[..., None], axis=1)
    if with_head:
        if shards(embed) > 1:
            d_head = sum_over(sum_scatter(state["head"], embed, 0), "replicas")
        else:
            d_head = sum_over(sum_over(state["head"], "batch"), "tokens")
        d_head = d_head.astype(head.dtype)
    return sum_over(sum_over(state["loss"], "batch"), "tokens"), d_hidden, d_head, each


def _normaliser_and_true(
    logits: Float32[Array, "B t V"], target: Int[Array, "B t"], vocab: str | None
) -> tuple[Float32[Array, "B t"], Float32[Array, "B t"]]:
    """log sum exp of the logits over the whole vocabulary, and the target's logit; target may lie elsewhere."""
    if shards(vocab) == 1:
        true = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1), true
    largest = max_over(jnp.max(logits, axis=-1), vocab)
    total = sum_over(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), vocab)
    here = (target >= 0) & (target < logits.shape[-1])
    true = jnp.take_along_axis(logits, jnp.clip(target, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return largest + jnp.log(total), sum_over(jnp.where(here, true, 0.0), vocab)
