"""What a layer of the decoder remembers of conversations, in two levels: a large part and a short tail.

The large part of a layer is keys [K, H, C] and values [K, C, H]: the order in which attention reads them, so that
nothing is turned. A decode step only reads it, so that it needs no copy and several conversations may share one;
the step writes the tail, TAIL tokens long. `Chunk` is a piece of one prompt, `Step` one token of several conversations.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kangaroo_jax.inference.sizes import TAIL
from kangaroo_jax.models.attention import MASKED
from kangaroo_jax.sharding import constrain

QUERIES = 128  # of a chunk, whose scores exist at a time
KEYS = ("activation_kv_heads", None, None)  # of the large part; of values as well
TAILS = (None, None, "activation_kv_heads", None, None)

Layer = tuple[jax.Array, jax.Array]  # keys [K, H, C], values [K, C, H]
Layers = tuple[Layer, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The memory of one layer while a piece of one conversation's prompt is read: B is 1."""

    layer: Layer
    start: jax.Array  # int32[], how many tokens it holds; the new ones stand behind them
    visible: int = dataclasses.field(metadata=dict(static=True))  # at least start

    def update_and_attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> "tuple[jax.Array, Chunk]":
        """See `LayerMemory`. Reads what was there before it writes, so that the write is made in place."""
        keys, values = self.layer
        count, heads = query.shape[1], key.shape[2]
        new_keys = key[0].transpose(1, 2, 0).astype(keys.dtype)
        new_values = value[0].transpose(1, 0, 2).astype(values.dtype)
        queries = _grouped(query[0], heads)
        earlier = jnp.arange(self.visible) < self.start
        contexts = []
        for first in range(0, count, QUERIES):
            last = min(first + QUERIES, count)
            own = jnp.arange(last) <= jnp.arange(first, last)[:, None]
            parts = [(new_keys[:, :, :last], new_values[:, :last], own[:, None])]
            if self.visible:
                parts.append((keys[:, :, : self.visible], values[:, : self.visible], earlier))
            contexts.append(_attend(queries[:, first:last], parts))
        context = jnp.concatenate(contexts, axis=1).transpose(1, 0, 2, 3).reshape(query.shape)
        context, new_keys, new_values = jax.lax.optimization_barrier((context, new_keys, new_values))
        zero = jnp.int32(0)
        keys = jax.lax.dynamic_update_slice(keys, new_keys, (zero, zero, self.start))
        values = jax.lax.dynamic_update_slice(values, new_values, (zero, self.start, zero))
        return context, dataclasses.replace(self, layer=(constrain(keys, KEYS), constrain(values, KEYS)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """The memory of one layer while each of B conversations reads one token."""

    layers: tuple[Layer, ...]  # of each row; rows may name the same arrays
    tails: tuple[jax.Array, ...]  # [2, K, TAIL, H] of each row: keys and values
    filled: jax.Array  # int32[B], tokens in the large part
    place: jax.Array  # int32[B], of the new token in the tail
    new: jax.Array | None = None  # [B, 2, K, H]: what update_and_attend found, to be written into the tails

    def update_and_attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> "tuple[jax.Array, Step]":
        """See `LayerMemory`. What it remembers is in `new` alone."""
        heads = key.shape[2]
        new = jnp.stack([key[:, 0], value[:, 0]], axis=1)
        contexts = []
        for row, ((keys, values), tail) in enumerate(zip(self.layers, self.tails, strict=True)):
            here = jnp.arange(TAIL) == self.place[row]
            tail = jnp.where(here[:, None], new[row, :, :, None].astype(tail.dtype), tail)
            parts = [
                (keys, values, jnp.arange(values.shape[1]) < self.filled[row]),
                (tail[0].swapaxes(1, 2), tail[1], jnp.arange(TAIL) <= self.place[row]),
            ]
            contexts.append(_attend(_grouped(query[row], heads), parts))
        context = jnp.concatenate(contexts, axis=1).transpose(1, 0, 2, 3).reshape(query.shape)
        return context, dataclasses.replace(self, new=new)


def write_tails(tails: Sequence[jax.Array], steps: Sequence[Step]) -> tuple[jax.Array, ...]:
    """The tails [L, 2, K, TAIL, H] of each row with the new token of every layer."""
    new = jnp.stack([step.new for step in steps if step.new is not None], axis=1)  # [B, L, 2, K, H]
    place, zero = steps[0].place, jnp.int32(0)
    return tuple(
        constrain(
            jax.lax.dynamic_update_slice(
                tail, new[row, :, :, :, None].astype(tail.dtype), (zero, zero, zero, place[row], zero)
            ),
            TAILS,
        )
        for row, tail in enumerate(tails)
    )


def _grouped(query: jax.Array, heads: int) -> jax.Array:
    """query [T, N, H], scaled -> [K, T, N / K, H]."""
    count, _, width = query.shape
    grouped: jax.Array = (query * width**-0.5).reshape(count, heads, -1, width).transpose(1, 0, 2, 3)
    return grouped


def _attend(query: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """One softmax over several parts of a memory.

    query [K, T, G, H]; of each part keys [K, H, S], values [K, S, H] and which of them are seen, bool[S] or
    bool[T, 1, S] -> [K, T, G, H].
    """
    scores = [
        jnp.where(
            seen,
            jnp.einsum("ktgh,khs->ktgs", query, keys.astype(query.dtype), preferred_element_type=jnp.float32),
            MASKED,
        )
        for keys, _, seen in parts
    ]
    largest = scores[0].max(-1, keepdims=True)
    for other in scores[1:]:
        largest = jnp.maximum(largest, other.max(-1, keepdims=True))
    weights = [jnp.exp(score - largest) for score in scores]
    total = sum(weight.sum(-1, keepdims=True) for weight in weights)
    outputs = [
        jnp.einsum(
            "ktgs,ksh->ktgh", weight.astype(query.dtype), values.astype(query.dtype), preferred_element_type=jnp.float32
        )
        for weight, (_, values, _) in zip(weights, parts, strict=True)
    ]
    return (sum(outputs[1:], outputs[0]) / total).astype(query.dtype)
