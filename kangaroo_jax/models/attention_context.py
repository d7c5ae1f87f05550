"""Context parallelism: the tokens of a row are cut over devices, and each does an equal part of causal attention.

Early queries see few keys, late ones many. So each device's T/C tokens are two halves, and device i computes
halves i and 2C-1-i of all 2C: one early, one late. Only queries (and results) travel for that; everywhere else
tokens stay in their order. Keys and values are gathered: with grouped heads they are a quarter of the queries.
With 4 devices:

    tokens of      device 0   device 1   device 2   device 3
    in order       0 1        2 3        4 5        6 7
    computed by    0 7        6 1        2 5        4 3        (the even half first)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from kangaroo_jax.conventions import Array
from kangaroo_jax.sharding import gather, index_on, permute, shards

AXIS = "tokens"  # the logical axis that is cut


def halves_of(piece: int, pieces: int) -> tuple[int, int]:
    """The two of the 2 * pieces halves that a device computes, the even one first."""
    return (piece, 2 * pieces - 1 - piece) if piece % 2 == 0 else (2 * pieces - 1 - piece, piece)


def _pairs(pieces: int, slot: int) -> list[tuple[int, int]]:
    """(from, to) for the even halves (slot 0) or the odd ones (slot 1)."""
    return [(halves_of(piece, pieces)[slot] // 2, piece) for piece in range(pieces)]


def _swap(x: Shaped[Array, "B T *rest"], back: bool) -> Shaped[Array, "B T *rest"]:
    """The T/C tokens of a device: halves in order -> the halves that this device computes, or `back`."""
    pieces = shards(AXIS)
    halves = []
    for slot, half in enumerate(jnp.split(x, 2, axis=1)):
        pairs = _pairs(pieces, slot)
        halves.append(permute(half, AXIS, [(to, start) for start, to in pairs] if back else pairs))
    return jnp.concatenate(halves, axis=1)


def query_places(length: int) -> Int[Array, " {length}"]:
    """Index in the row of each query that this device computes."""
    pieces = shards(AXIS)
    half = length // 2
    table = jnp.asarray([halves_of(piece, pieces) for piece in range(pieces)], jnp.int32)
    return (table[index_on(AXIS)][:, None] * half + jnp.arange(half, dtype=jnp.int32)).reshape(-1)


def context_parallel(
    function: Callable[..., jax.Array],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None,
) -> Float[Array, "B T N H"]:
    """Causal attention by index of rows cut over AXIS; to be called in `per_device`, with T/C tokens of each row.

    `function(query, key, value, segments, positions)` gets the queries of two halves, all T keys, the segments
    of each, and the queries' positions in the row, int32[T/C].
    """
    if query.shape[1] % 2:
        raise ValueError(f"context parallelism: {query.shape[1]} tokens a device must be an even number")
    key, value = gather(key, AXIS, 1), gather(value, AXIS, 1)
    ids = None
    if segments is not None:
        ids = (_swap(segments[0], back=False), gather(segments[1], AXIS, 1))
    y = function(_swap(query, back=False), key, value, ids, query_places(query.shape[1]))
    return _swap(y, back=True)
