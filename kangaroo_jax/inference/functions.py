"""What the engine's programs compute: pure functions of the weights, a conversation's memory and a few numbers."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int32, UInt8, UInt32

from kangaroo_jax.conventions import Array
from kangaroo_jax.inference.memories import Chunk, Layers, Part, Step, filled_up, write_tails
from kangaroo_jax.inference.sampling import Choices, Chosen, choose
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.sharding import constrain

Weights = tuple[jax.Array, ...]
Tail = Float[Array, "L 2 K tail H"]
Number = Int32[Array, ""]


class Structure:
    """A model without its weights; equal ones share their compiled programs. Its hash is computed once."""

    def __init__(self, graph: Any, treedef: Any, shapes: Hashable, mesh: Mesh | None, precision: str | None) -> None:
        self.graph, self.treedef, self.mesh, self.precision = graph, treedef, mesh, precision
        self._parts = (graph, treedef, shapes, mesh, precision)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and (self is other or self._parts == other._parts)

    def model(self, weights: Weights) -> KangarooModel:
        model: KangarooModel = nnx.merge(self.graph, jax.tree.unflatten(self.treedef, weights))
        return model


def _encode(
    structure: Structure, weights: Weights, frames: UInt8[Array, "F S S 3"], times: Float32[Array, " F"]
) -> Float[Array, "R D"]:
    return constrain(structure.model(weights).encode(frames[None], times[None])[0], (None, None))


def _read(
    model: KangarooModel, large: Layers, embeddings: Float[Array, "1 n D"], start: Number, visible: int
) -> tuple[Float[Array, "1 n D"], Layers]:
    positions = (start + jnp.arange(embeddings.shape[1]))[None]
    hidden, memories = model.llm.read(embeddings, positions, [Chunk(layer, start, visible) for layer in large])
    return hidden, tuple(memory.layer for memory in memories)


def _extend(
    structure: Structure,
    weights: Weights,
    large: Layers,
    tokens: Int32[Array, " n"],
    index: Int32[Array, " n"],
    vision: Float[Array, "n D"],
    start: Number,
    *,
    visible: int,
) -> tuple[Layers, Float[Array, ""]]:
    model = structure.model(weights)
    hidden, layers = _read(model, large, model.embed(tokens[None], index[None], vision[None]), start, visible)
    return layers, constrain(hidden[0, -1, 0], ())


def _score(
    structure: Structure,
    weights: Weights,
    large: Layers,
    tokens: Int32[Array, " n"],
    start: Number,
    following: Int32[Array, " n"],
    *,
    visible: int,
) -> tuple[Layers, tuple[Float32[Array, " n"], Int32[Array, " n"], Float32[Array, " n"]]]:
    model = structure.model(weights)
    embeddings = model.embed(tokens[None], jnp.full_like(tokens, -1)[None], None)
    hidden, layers = _read(model, large, embeddings, start, visible)
    logits = _logits(model, hidden[0])
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
    return layers, (own - total, jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(logits, axis=-1) - total)


def _logits(model: KangarooModel, hidden: Float[Array, "n D"]) -> Float32[Array, "n V"]:
    """Each device makes its part, so that logits move and not the head's weights."""
    logits = constrain(model.unembed(hidden), (None, "activation_vocab"))
    return constrain(logits, (None, None))


def _decode(
    structure: Structure,
    weights: Weights,
    larges: tuple[Layers, ...],
    tails: tuple[Tail, ...],
    seen: tuple[Int32[Array, " V"], ...],
    previous: Int32[Array, " {most}"],
    numbers: Int32[Array, "5 B"],
    choices: Choices,
    allowed: UInt32[Array, "B W"],
    *,
    most: int,
) -> tuple[Chosen, tuple[Tail, ...], tuple[Int32[Array, " V"], ...]]:
    model = structure.model(weights)
    source, given, filled, place, index = numbers
    tokens = jnp.where(source >= 0, previous[jnp.maximum(source, 0)], given)[:, None]
    steps = [
        Step(tuple(large[layer] for large in larges), tuple(tail[layer] for tail in tails), filled, place)
        for layer in range(len(larges[0]))
    ]
    embeddings = model.embed(tokens, jnp.full_like(tokens, -1), None)
    embeddings, positions = filled_up(embeddings), filled_up((filled + place)[:, None])
    hidden, steps = model.llm.read(embeddings, positions, steps)
    hidden, steps = jax.lax.optimization_barrier((hidden, steps))
    logits = _logits(model, hidden[:, 0])[: len(larges)]
    chosen = choose(logits, seen, index, choices, allowed)
    counted = [constrain(row.at[chosen.tokens[i]].add(1), (None,)) for i, row in enumerate(seen)]
    padded = constrain(jnp.pad(chosen.tokens, (0, most - len(larges))), (None,))
    return dataclasses.replace(chosen, tokens=padded), write_tails(tails, steps), tuple(counted)


def _flush(structure: Structure, large: Layers, tail: Tail, filled: Number) -> Layers:
    return tuple(
        part.written(Part.of(keys.swapaxes(1, 2), values, part.keys.dtype), filled)
        for part, (keys, values) in zip(large, tail, strict=True)
    )


def _copy(structure: Structure, into: Layers, large: Layers) -> Layers:
    return tuple(
        part.written(theirs.first(min(part.tokens, theirs.tokens)), 0) for part, theirs in zip(into, large, strict=True)
    )


# Each program's function, the arguments that it uses up, and its static sizes by their place in the key.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, int]]] = {
    "encode": (_encode, (), {}),
    "extend": (_extend, (1,), {"visible": 2}),
    "score": (_score, (1,), {"visible": 0}),
    "decode": (_decode, (2, 3), {}),
    "flush": (_flush, (0,), {}),
    "copy": (_copy, (0,), {}),
}
