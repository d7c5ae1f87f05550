"""Equal layers, run one after another: their weights stacked on a leading axis, for `jax.lax.scan`, or each apart."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kangaroo_jax.conventions import Array

Carry = TypeVar("Carry")
Layer = TypeVar("Layer", bound=nnx.Module)

# What the forward pass of a layer keeps for the backward pass; the rest is computed again.
#   none     keeps everything but joined weights     (fastest, most memory)
#   dots     keeps the result of every matrix product with a weight
#   minimal  keeps what attention takes and makes, so that its kernel does not run again
#   gate     keeps one of the MLP's two first products as well
#   mlp      keeps both: of the products only that after attention is left to compute again
#   context  keeps what attention makes, so that its kernel does not run again; what it takes is computed again
#   full     keeps only the layer's input            (slowest, least memory)
#   offload  is minimal with what is kept moved to the host's memory meanwhile
MADE_NAMES = ("context", "attention_statistics")  # by `context`
KEPT_NAMES = ("query", "key", "value", *MADE_NAMES)  # by `minimal`
MLP_NAMES = ("gate", "up")
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names("weight"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES, *MLP_NAMES),
    "gate": jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES, MLP_NAMES[0]),
    "minimal": jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES),
    "context": jax.checkpoint_policies.save_only_these_names(*MADE_NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(KEPT_NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def keep(x: Array, name: str) -> Array:
    """Mark an activation that remat policies keep. Raises ValueError for a name that is in none of them."""
    if name not in (*KEPT_NAMES, *MLP_NAMES):
        raise ValueError(f"activation {name!r}: one of {', '.join((*KEPT_NAMES, *MLP_NAMES))}")
    marked: jax.Array = checkpoint_name(x, name)
    return marked


def stack_layers(make: Callable[[nnx.Rngs], Layer], depth: int, *, rngs: nnx.Rngs) -> Layer:
    """`depth` layers, each with its own random key, as one layer whose weights have a leading axis "layers"."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    weights = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(jax.random.split(rngs.params(), depth))
    stacked = nnx.merge(graph, weights)
    for _, weight in nnx.to_flat_state(nnx.state(stacked)):
        weight.set_metadata(axes=("layers", *weight.axes))
    nnx.update(stacked, weights)
    return stacked


def unstack_layers(layers: Layer) -> "nnx.List[Layer]":
    """What `stack_layers` made, or its abstract form, as a list of layers with weights of their own.

    A program that runs once a token wants them so: of stacked weights every step copies each layer's.
    """
    graph, weights = nnx.split(layers)
    leaves, structure = jax.tree.flatten(weights)
    depth = leaves[0].shape[0]
    abstract = isinstance(leaves[0], jax.ShapeDtypeStruct)
    apart = [[jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * depth if abstract else list(leaf) for leaf in leaves]
    unstacked = []
    for number in range(depth):
        layer = nnx.merge(graph, jax.tree.unflatten(structure, [pieces[number] for pieces in apart]))
        for _, weight in nnx.to_flat_state(nnx.state(layer)):
            weight.set_metadata(axes=weight.axes[1:])
        unstacked.append(layer)
    return nnx.List(unstacked)


def run_layers(
    layers: "Layer | nnx.List[Layer]",
    step: Callable[[Layer, Carry, Array], Carry],
    carry: Carry,
    *,
    scan: bool,
    remat: str,
) -> Carry:
    """carry = step(layer, carry, index of the layer) through all `layers`, stacked ones or a list.

    `scan=False` unrolls the loop (for debugging: longer to compile). `remat` is a name in
    REMAT_POLICIES, or "auto", which is "full" where nothing has decided it; KeyError for another.
    """
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            carry = step(layer, carry, jnp.asarray(index))
        return carry
    graph, weights = nnx.split(layers)
    depth = jax.tree.leaves(weights)[0].shape[0]

    def body(carry: Carry, layer: tuple[Any, jax.Array]) -> tuple[Carry, None]:
        weights, index = layer
        return step(nnx.merge(graph, weights), carry, index), None

    remat = "full" if remat == "auto" else remat
    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if scan:
        return jax.lax.scan(body, carry, (weights, jnp.arange(depth)))[0]
    for index, layer in enumerate(_unstack(weights, depth)):
        carry, _ = body(carry, (layer, jnp.asarray(index)))
    return carry


def _unstack(weights: Any, depth: int) -> list[Any]:
    """The weights of each layer; `split`, unlike indexing, has one concatenation as its gradient."""
    leaves, structure = jax.tree.flatten(weights)
    layers = zip(*(jax.lax.split(leaf, (1,) * depth) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, [leaf[0] for leaf in layer]) for layer in layers]
