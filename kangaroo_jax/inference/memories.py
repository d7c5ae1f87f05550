"""What a layer of the decoder remembers of conversations, in two levels: a large part and a short tail.

The large part of a layer is keys [K, H, C] and values [K, C, H]: the order in which attention reads them, so that
nothing is turned. A decode step only reads it, so that it needs no copy and several conversations may share one;
the step writes the tail, TAIL tokens long. `Chunk` is a piece of one prompt, `Step` one token of several conversations.

Where the large part is int8, every token attends to rounded keys and values, those of its own chunk and of the tail
included: an answer does not depend on when a tail is moved, or how a prompt is cut.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int32, Shaped

from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.sizes import TAIL
from kangaroo_jax.models.attention import MASKED
from kangaroo_jax.sharding import constrain, platform

QUERIES = 128  # of a chunk, whose scores exist at a time
TAILS = (None, None, "activation_kv_heads", None, None)
INT8 = "int8"
_LARGEST = 127
# Each array of a part has an axis of tokens, and names for all its axes.
_AXES: dict[str, tuple[int, tuple[str | None, ...]]] = {
    "keys": (2, ("activation_kv_heads", None, None)),
    "values": (1, ("activation_kv_heads", None, None)),
    "key_scale": (1, ("activation_kv_heads", None)),
    "value_scale": (1, ("activation_kv_heads", None)),
}


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Raise UserError unless it names how keys and values are kept: int8, or None as they are computed."""
    if kv_dtype not in (None, INT8):
        raise UserError(f"kv_dtype {kv_dtype!r}: use {INT8}, or none to keep keys and values as they are computed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Keys and values of S tokens in one layer. Of int8, each token of each head has a scale."""

    keys: Any  # [K, H, S]
    values: Any  # [K, S, H]
    key_scale: Any = None  # float32[K, S]
    value_scale: Any = None

    @classmethod
    def shapes(cls, heads: int, width: int, tokens: int, dtype: Any, make: Callable[..., Any]) -> "Part":
        """What `make(shape, names of axes, dtype)` gives for each array of a part."""
        scale = make((heads, tokens), _AXES["key_scale"][1], jnp.float32) if dtype == jnp.int8 else None
        keys = make((heads, width, tokens), _AXES["keys"][1], dtype)
        return cls(keys, make((heads, tokens, width), _AXES["values"][1], dtype), scale, scale)

    @classmethod
    def of(cls, keys: Float[Array, "K H S"], values: Float[Array, "K S H"], dtype: Any) -> "Part":
        """A part of keys and values, which are rounded for int8."""
        if dtype != jnp.int8:
            return cls(keys.astype(dtype), values.astype(dtype))
        keys, key_scale = _whole(keys, 1)
        values, value_scale = _whole(values, 2)
        return cls(keys, values, key_scale[:, 0], value_scale[:, :, 0])

    @property
    def tokens(self) -> int:
        """S."""
        return int(self.values.shape[1])

    def arrays(self) -> dict[str, Any]:
        """Its arrays by name."""
        return {name: array for name in _AXES if (array := getattr(self, name)) is not None}

    def first(self, count: int) -> "Part":
        """The first tokens; of NumPy's arrays a view."""
        return Part(**{name: array[_until(name, count)] for name, array in self.arrays().items()})

    def written(self, new: "Part", start: Int32[Array, ""] | int) -> "Part":
        """With other tokens in place of those from `start` on."""
        zero, start, other = jnp.int32(0), jnp.asarray(start, jnp.int32), new.arrays()

        def write(name: str, array: jax.Array) -> jax.Array:
            axis, names = _AXES[name]
            place = tuple(start if i == axis else zero for i in range(array.ndim))
            return constrain(jax.lax.dynamic_update_slice(array, other[name], place), names)

        return Part(**{name: write(name, array) for name, array in self.arrays().items()})

    def padded(self, like: "Part") -> "Part":
        """NumPy's arrays with as many tokens as `like` has, the later ones left out or 0."""
        padded = {}
        for name, shape in like.arrays().items():
            padded[name] = np.zeros(shape.shape, shape.dtype)
            part = getattr(self, name)[_until(name, like.tokens)]
            padded[name][_until(name, part.shape[_AXES[name][0]])] = part
        return Part(**padded)


Layers = tuple[Part, ...]


def _until(name: str, count: int) -> tuple[slice, ...]:
    return (*[slice(None)] * _AXES[name][0], slice(0, count))


def _whole(x: Float[Array, "*x"], axis: int) -> tuple[Int8[Array, "*x"], Float32[Array, "..."]]:
    """x as int8, and the scale that all numbers along an axis share."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST)
    return jnp.rint(x / scale).astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The memory of one layer while a piece of one conversation's prompt is read: B is 1."""

    layer: Part
    start: jax.Array  # int32[], how many tokens it holds; the new ones stand behind them
    visible: int = dataclasses.field(metadata=dict(static=True))  # at least start

    def update_and_attend(
        self, query: Float[Array, "1 T N H"], key: Float[Array, "1 T K H"], value: Float[Array, "1 T K H"]
    ) -> tuple[Float[Array, "1 T N H"], "Chunk"]:
        """See `LayerMemory`. Reads what was there before it writes, so that the write is made in place."""
        count, heads = query.shape[1], key.shape[2]
        new = Part.of(key[0].transpose(1, 2, 0), value[0].transpose(1, 0, 2), self.layer.keys.dtype)
        queries = _grouped(query[0], heads)
        earlier = jnp.arange(self.visible) < self.start
        contexts = []
        for first in range(0, count, QUERIES):
            last = min(first + QUERIES, count)
            own = jnp.arange(last) <= jnp.arange(first, last)[:, None]
            parts = [(new.first(last), own[:, None])]
            if self.visible:
                parts.append((self.layer.first(self.visible), earlier))
            contexts.append(_attend(queries[:, first:last], parts))
        context = jnp.concatenate(contexts, axis=1).transpose(1, 0, 2, 3).reshape(query.shape)
        context, new = jax.lax.optimization_barrier((context, new))
        return context, dataclasses.replace(self, layer=self.layer.written(new, self.start))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """The memory of one layer while each of B conversations reads one token. For more rows see `filled_up`."""

    layers: tuple[Part, ...]  # of each row; rows may name the same arrays
    tails: tuple[jax.Array, ...]  # [2, K, TAIL, H] of each row: keys and values
    filled: jax.Array  # int32[B], tokens in the large part
    place: jax.Array  # int32[B], of the new token in the tail
    new: jax.Array | None = None  # [B, 2, K, H]: what update_and_attend found, to be written into the tails

    def update_and_attend(
        self, query: Float[Array, "B 1 N H"], key: Float[Array, "B 1 K H"], value: Float[Array, "B 1 K H"]
    ) -> tuple[Float[Array, "B 1 N H"], "Step"]:
        """See `LayerMemory`. What it remembers is in `new` alone."""
        heads, count = key.shape[2], len(self.layers)
        new = jnp.stack([key[:count, 0], value[:count, 0]], axis=1)
        if self.layers[0].key_scale is not None:
            whole, scale = _whole(new, 3)
            new = (whole * scale).astype(new.dtype)
        contexts = []
        for row, (part, tail) in enumerate(zip(self.layers, self.tails, strict=True)):
            here = jnp.arange(TAIL) == self.place[row]
            tail = jnp.where(here[:, None], new[row, :, :, None].astype(tail.dtype), tail)
            parts = [
                (part, jnp.arange(part.tokens) < self.filled[row]),
                (Part(tail[0].swapaxes(1, 2), tail[1]), jnp.arange(TAIL) <= self.place[row]),
            ]
            contexts.append(_attend(_grouped(query[row], heads), parts))
        context = jnp.concatenate(contexts, axis=1).transpose(1, 0, 2, 3).reshape(count, *query.shape[1:])
        return filled_up(context), dataclasses.replace(self, new=new)


def filled_up(rows: Shaped[Array, "B T ..."]) -> Shaped[Array, "C T ..."]:
    """On a TPU two rows for one: XLA multiplies a single row on the vector unit, three to four times slower.

    The barrier hides from XLA that both are the same.
    """
    if platform() != "tpu" or len(rows) > 1:
        return rows
    both: jax.Array = jax.lax.optimization_barrier(jnp.concatenate([rows, rows]))
    return both


def write_tails(
    tails: Sequence[Float[Array, "L 2 K tail H"]], steps: Sequence[Step]
) -> tuple[Float[Array, "L 2 K tail H"], ...]:
    """The tails of each row with the new token of every layer."""
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


def _grouped(query: Float[Array, "T N H"], heads: int) -> Float[Array, "{heads} T groups H"]:
    """Scaled, and by the key-value head that is read."""
    count, _, width = query.shape
    grouped: jax.Array = (query * width**-0.5).reshape(count, heads, -1, width).transpose(1, 0, 2, 3)
    return grouped


def _attend(
    query: Float[Array, "K T groups H"], parts: Sequence[tuple[Part, Bool[Array, "..."]]]
) -> Float[Array, "K T groups H"]:
    """One softmax over several parts of a memory; of each, which tokens are seen, bool[S] or bool[T, 1, S]."""
    scores = [jnp.where(seen, _scores(query, part), MASKED) for part, seen in parts]
    largest = scores[0].max(-1, keepdims=True)
    for other in scores[1:]:
        largest = jnp.maximum(largest, other.max(-1, keepdims=True))
    weights = [jnp.exp(score - largest) for score in scores]
    total = sum(weight.sum(-1, keepdims=True) for weight in weights)
    outputs = [_weighed(weight, part, query.dtype) for weight, (part, _) in zip(weights, parts, strict=True)]
    return (sum(outputs[1:], outputs[0]) / total).astype(query.dtype)


def _scores(query: Float[Array, "K T groups H"], part: Part) -> Float32[Array, "K T groups S"]:
    keys = part.keys.astype(query.dtype)
    scores = jnp.einsum("ktgh,khs->ktgs", query, keys, preferred_element_type=jnp.float32)
    return scores if part.key_scale is None else scores * part.key_scale[:, None, None]


def _weighed(weight: Float32[Array, "K T groups S"], part: Part, dtype: Any) -> Float32[Array, "K T groups H"]:
    if part.value_scale is not None:
        weight = weight * part.value_scale[:, None, None]
    values = part.values.astype(dtype)
    return jnp.einsum("ktgs,ksh->ktgh", weight.astype(dtype), values, preferred_element_type=jnp.float32)
