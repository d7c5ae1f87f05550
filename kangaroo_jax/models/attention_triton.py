"""Attention for GPUs: FlashAttention-2 in Pallas for Triton (Dao 2023), of rows in which a query sees a range of keys.

Segments are runs of tokens, so that the keys which a query sees stand side by side, and so do the queries that see a
key. Both kinds of ranges are computed once; the kernels need nothing else. A block of queries visits only the blocks
of keys between the least and the largest key that one of its queries sees, and a block of keys only such queries, so
that neither the forward nor the backward pass touches other segments. Blocks that every query of a block sees in
whole are not masked. Key-value heads are read by their query heads where they lie, and never repeated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.stack import keep
from kangaroo_jax.sharding import compute_capability

LOG2_E = math.log2(math.e)
HIDDEN = -math.inf  # score of a key that a query does not see
LOWEST = -1e20  # what the largest score of a query is at least, so that a row of hidden keys weighs nothing
WIDTHS = (16, 32, 64, 128)  # of heads: the matrix units take powers of two


class Ranges(NamedTuple):
    """The keys that each query sees, from `begin` up to `end`, and the queries that see each key."""

    begin: Int[Array, "B T"]
    end: Int[Array, "B T"]
    first: Int[Array, "B S"]
    last: Int[Array, "B S"]  # exclusive, as `end` is


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel is cut: queries and keys of a block, warps that work on one, loads under way at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    d_query: Tile
    d_key: Tile


# By generation and width of heads (the least that is no smaller). None of these spills a register, and on Hopper each
# has enough rows for the matrix instruction of a whole warp group; docs/plan.md has what the assembler says of each.
HOPPER = {
    64: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
}
BLACKWELL = {64: HOPPER[64], 128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))}
AMPERE = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
}


def tiles_for(capability: float, width: int) -> Tiles:
    """The tiles for a GPU of CUDA's compute `capability` and heads of `width`."""
    table = HOPPER if 9 <= capability < 10 else BLACKWELL if 10 <= capability < 12 else AMPERE
    return next(tiles for least, tiles in table.items() if width <= least)


def visited_share(length: int, keys: int, tile: Tile, causal: bool) -> float:
    """The share of the length x keys scores in blocks that a row of one segment visits."""
    if not causal:
        return 1.0
    ends = np.minimum(np.arange(0, length, tile.queries) + tile.queries, length)
    visited = -(-ends // tile.keys) * tile.keys
    return float(np.minimum(visited, keys).sum() * tile.queries / (length * keys))


def triton(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    causal: bool,
    positions: Int[Array, " T"] | None = None,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """Attention as in `attention.attention`.

    The two arrays of segments are of one row, in which every segment is a run: its tokens stand side by side.
    `positions` are the queries' in the row, where a device has only some of its tokens: two runs of T/2, as
    `attention_context` deals them. `interpret` runs the kernels on any device, slowly, for tests.

    Raises UserError for heads of a width not in WIDTHS.
    """
    if query.shape[-1] not in WIDTHS:
        raise UserError(f"attention 'triton': heads of {query.shape[-1]}, not one of {WIDTHS}: set xla_chunked")
    tiles = tiles or tiles_for(compute_capability(), query.shape[-1])
    batch, length = query.shape[:2]
    ranges = ranges_of(segments and segments[1], (batch, length), key.shape[1], causal, positions)
    with jax.named_scope("triton_causal" if causal else "triton_full"):
        parts = jnp.split(query, len(ranges), axis=1)
        return jnp.concatenate(
            [attend(part, key, value, one, tiles, interpret) for part, one in zip(parts, ranges, strict=True)], axis=1
        )


def ranges_of(
    segments: Int[Array, "B S"] | None,
    queries: tuple[int, int],
    keys: int,
    causal: bool,
    positions: Int[Array, " T"] | None = None,
) -> list[Ranges]:
    """The ranges of rows of `segments`, of one segment each where there are none.

    There is one for all queries, [B, T] in shape, or with `positions` one for each of their two runs.
    """
    batch, length = queries
    if segments is None:
        begin, end = jnp.zeros((batch, keys), jnp.int32), jnp.full((batch, keys), keys, jnp.int32)
    else:
        index = jnp.arange(keys, dtype=jnp.int32)
        new = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)], constant_values=True)
        following = jnp.pad(new[:, 1:], [(0, 0), (0, 1)], constant_values=True)
        begin = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
        end = jax.lax.cummin(jnp.where(following, index + 1, keys), axis=1, reverse=True)
    if not causal:
        if segments is None:  # as many queries as you like
            whole = jnp.zeros((batch, length), jnp.int32)
            return [Ranges(whole, whole + keys, begin, jnp.full_like(begin, length))]
        return [Ranges(begin, end, begin, end)]
    index = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, keys))
    if positions is None:
        return [Ranges(begin, index + 1, index, end)]
    half = length // 2
    return [
        Ranges(
            begin[:, run],
            jnp.broadcast_to(run + 1, (batch, half)),
            jnp.clip(index - run[0], 0, half),
            jnp.clip(end - run[0], 0, half),
        )
        for run in jnp.split(jnp.asarray(positions), 2)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    ranges: Ranges,
    tiles: Tiles,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Attention of each query to its range of keys."""
    output: jax.Array = _forward(query, key, value, ranges, tiles, interpret)[0]
    return output


def _forward(query: Any, key: Any, value: Any, ranges: Ranges, tiles: Tiles, interpret: bool) -> tuple[Any, Any]:
    (batch, length, heads, width), tile = query.shape, tiles.forward
    grid, of_queries, of_keys, limits, sums = _cut_by_queries(tile, query, key)
    output, statistics = pl.pallas_call(
        functools.partial(_forward_kernel, tile=tile, length=length, keys=key.shape[1]),
        grid=grid,
        in_specs=[of_queries, of_keys, of_keys, limits, limits],
        out_specs=[of_queries, sums],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"attention_forward_{width}",
    )(query, key, value, *_whole_blocks(tile.queries, ranges.begin, ranges.end))
    output, statistics = keep(output, "context"), keep(statistics, "attention_statistics")
    return output, (query, key, value, ranges, output, statistics)


def _backward(tiles: Tiles, interpret: bool, residuals: Any, d_output: Any) -> tuple[Any, Any, Any, None]:
    query, key, value, ranges, output, statistics = residuals
    expected = jnp.einsum("btnh,btnh->bnt", output, d_output, preferred_element_type=jnp.float32)
    d_query = _gradient_of_queries(tiles.d_query, interpret, query, key, value, ranges, d_output, statistics, expected)
    d_key, d_value = _gradient_of_keys(
        tiles.d_key, interpret, query, key, value, ranges, d_output, statistics, expected
    )
    return d_query, d_key, d_value, None


attend.defvjp(_forward, _backward)


def _cut_by_queries(tile: Tile, query: Any, key: Any) -> tuple[tuple[int, int, int], Any, Any, Any, Any]:
    """(grid, specs of queries, of keys, of the ranges, of numbers for every head and query); the last block is first.

    In a causal row it has the most to do.
    """
    (batch, length, heads, width), (keys, kv_heads) = query.shape, key.shape[1:3]
    blocks, groups = -(-length // tile.queries), heads // kv_heads
    return (
        (blocks, heads, batch),
        pl.BlockSpec((None, tile.queries, None, width), lambda i, n, b: (b, blocks - 1 - i, n, 0)),
        pl.BlockSpec((None, keys, None, width), lambda i, n, b: (b, 0, n // groups, 0)),
        pl.BlockSpec((None, tile.queries), lambda i, n, b: (b, blocks - 1 - i)),
        pl.BlockSpec((None, None, tile.queries), lambda i, n, b: (b, n, blocks - 1 - i)),
    )


def _gradient_of_queries(
    tile: Tile, interpret: bool, query: Any, key: Any, value: Any, ranges: Ranges, *rest: Any
) -> Float[Array, "B T N H"]:
    grid, of_queries, of_keys, limits, sums = _cut_by_queries(tile, query, key)
    d_query: jax.Array = pl.pallas_call(
        functools.partial(_d_query_kernel, tile=tile, length=query.shape[1], keys=key.shape[1]),
        grid=grid,
        in_specs=[of_queries, of_keys, of_keys, limits, limits, of_queries, sums, sums],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"attention_d_query_{query.shape[-1]}",
    )(query, key, value, *_whole_blocks(tile.queries, ranges.begin, ranges.end), *rest)
    return d_query


def _gradient_of_keys(
    tile: Tile, interpret: bool, query: Any, key: Any, value: Any, ranges: Ranges, *rest: Any
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    (batch, length, heads, width), (keys, kv_heads) = query.shape, key.shape[1:3]
    blocks, groups = -(-keys // tile.keys), heads // kv_heads
    of_keys = pl.BlockSpec((None, tile.keys, None, width), lambda i, k, b: (b, i, k, 0))
    of_queries = pl.BlockSpec((None, length, groups, width), lambda i, k, b: (b, 0, k, 0))
    limits = pl.BlockSpec((None, tile.keys), lambda i, k, b: (b, i))
    sums = pl.BlockSpec((None, groups, length), lambda i, k, b: (b, k, 0))
    shape = jax.ShapeDtypeStruct(key.shape, key.dtype)
    d_key, d_value = pl.pallas_call(
        functools.partial(_d_key_kernel, tile=tile, groups=groups, length=length, keys=keys),
        grid=(blocks, kv_heads, batch),
        in_specs=[of_queries, of_keys, of_keys, limits, limits, of_queries, sums, sums],
        out_specs=[of_keys, of_keys],
        out_shape=[shape, shape],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"attention_d_key_{width}",
    )(query, key, value, *_whole_blocks(tile.keys, ranges.first, ranges.last), *rest)
    return d_key, d_value


# ------------------------------------------------------------------------------------ kernels


def _forward_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    output_ref: Any,
    statistics_ref: Any,
    *,
    tile: Tile,
    length: int,
    keys: int,
) -> None:
    rows = _Block((pl.num_programs(0) - 1 - pl.program_id(0)) * tile.queries, tile.queries, length)
    query, begin, end = rows.load(query_ref), begin_ref[...], end_ref[...]
    scale = query.shape[-1] ** -0.5 * LOG2_E

    def visit(columns: "_Block", masked: bool, carry: Any) -> Any:
        output, largest, total = carry
        scores = plgpu.dot(query, columns.load_from(key_ref).T) * scale
        if masked:
            scores = jnp.where(_inside(columns, begin, end), scores, HIDDEN)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights = jnp.exp2(scores - new[:, None])
        correction = jnp.exp2(largest - new)
        value = columns.load_from(value_ref)
        output = output * correction[:, None] + plgpu.dot(weights.astype(value.dtype), value)
        return output, new, total * correction + jnp.sum(weights, axis=-1)

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((tile.queries,), LOWEST, jnp.float32),
        jnp.zeros((tile.queries,), jnp.float32),
    )
    output, largest, total = _over_blocks(visit, start, begin, end, tile.keys, keys)
    rows.store(output_ref, (output / total[:, None]).astype(output_ref.dtype))
    rows.store(statistics_ref, largest + jnp.log2(total))


def _d_query_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    d_output_ref: Any,
    statistics_ref: Any,
    expected_ref: Any,
    d_query_ref: Any,
    *,
    tile: Tile,
    length: int,
    keys: int,
) -> None:
    rows = _Block((pl.num_programs(0) - 1 - pl.program_id(0)) * tile.queries, tile.queries, length)
    query, begin, end = rows.load(query_ref), begin_ref[...], end_ref[...]
    d_output, statistics, expected = rows.load(d_output_ref), rows.load(statistics_ref), rows.load(expected_ref)
    scale = query.shape[-1] ** -0.5

    def visit(columns: "_Block", masked: bool, d_query: Any) -> Any:
        key = columns.load_from(key_ref)
        scores = plgpu.dot(query, key.T) * (scale * LOG2_E)
        if masked:
            scores = jnp.where(_inside(columns, begin, end), scores, HIDDEN)
        weights = jnp.exp2(scores - statistics[:, None])
        d_weights = plgpu.dot(d_output, columns.load_from(value_ref).T)
        d_scores = weights * (d_weights - expected[:, None])
        return d_query + plgpu.dot(d_scores.astype(key.dtype), key)

    d_query = _over_blocks(visit, jnp.zeros(query.shape, jnp.float32), begin, end, tile.keys, keys)
    rows.store(d_query_ref, (d_query * scale).astype(d_query_ref.dtype))


def _d_key_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    first_ref: Any,
    last_ref: Any,
    d_output_ref: Any,
    statistics_ref: Any,
    expected_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    tile: Tile,
    groups: int,
    length: int,
    keys: int,
) -> None:
    rows = _Block(pl.program_id(0) * tile.keys, tile.keys, keys)
    key, value, first, last = rows.load(key_ref), rows.load(value_ref), first_ref[...], last_ref[...]
    scale = key.shape[-1] ** -0.5

    def of_head(head: Any, sums: Any) -> Any:
        def visit(columns: "_Block", masked: bool, sums: Any) -> Any:
            d_key, d_value = sums
            query, d_output = columns.load_from(query_ref, head), columns.load_from(d_output_ref, head)
            scores = plgpu.dot(key, query.T) * (scale * LOG2_E)  # transposed: [keys, queries]
            if masked:
                scores = jnp.where(_inside(columns, first, last), scores, HIDDEN)
            weights = jnp.exp2(scores - columns.load_sums(statistics_ref, head)[None, :])
            d_value = d_value + plgpu.dot(weights.astype(d_output.dtype), d_output)
            d_weights = plgpu.dot(value, d_output.T)
            d_scores = weights * (d_weights - columns.load_sums(expected_ref, head)[None, :])
            return d_key + plgpu.dot(d_scores.astype(query.dtype), query), d_value

        return _over_blocks(visit, sums, first, last, tile.queries, length)

    zeros = jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = jax.lax.fori_loop(0, groups, of_head, (zeros, zeros))
    rows.store(d_key_ref, (d_key * scale).astype(d_key_ref.dtype))
    rows.store(d_value_ref, d_value.astype(d_value_ref.dtype))


class _Block:
    """A block of the rows, or of the columns, of the matrix of scores: `size` of `length` from `start` on."""

    def __init__(self, start: Any, size: int, length: int, bounded: bool = True) -> None:
        self._start, self._size = start, size
        self.index = start + jnp.arange(size, dtype=jnp.int32)
        self._there = self.index < length if bounded and length % size else None

    def load(self, ref: Any) -> Any:
        """All of a reference to this block; zeros for what is beyond the end."""
        if self._there is None:
            return ref[...]
        return plgpu.load(ref, mask=_rows_of(self._there, ref), other=0)

    def load_from(self, ref: Any, *of: Any) -> Any:
        """This block of a reference to all blocks; zeros for what is beyond the end."""
        return self.load(ref.at[(pl.ds(self._start, self._size), *of)])

    def load_sums(self, ref: Any, head: Any) -> Any:
        """This block of a reference to a number for every head and token."""
        return self.load(ref.at[head, pl.ds(self._start, self._size)])

    def store(self, ref: Any, x: Any) -> None:
        """Write a reference to this block, without what is beyond the end."""
        if self._there is None:
            ref[...] = x
        else:
            plgpu.store(ref, x, mask=_rows_of(self._there, x))


def _rows_of(there: Any, x: Any) -> Any:
    """What is said of rows, of every element of an array of one or two dimensions."""
    return jnp.broadcast_to(there if len(x.shape) == 1 else there[:, None], x.shape)


def _over_blocks(
    visit: Callable[[_Block, bool, Any], Any], carry: Any, begin: Any, end: Any, size: int, length: int
) -> Any:
    """visit(columns, masked, carry) for every block of `size` of the columns that a row sees from `begin` up to `end`.

    Blocks that all rows see in whole are not masked, nor are they cut by the end of the columns.
    """
    first, last = jax.lax.div(jnp.min(begin), size), jax.lax.div(jnp.max(end) + (size - 1), size)
    whole = jnp.minimum(jax.lax.div(jnp.max(begin) + (size - 1), size), last)
    ended = jnp.maximum(jax.lax.div(jnp.min(end), size), whole)
    edge = lambda i, carry: visit(_Block(i * size, size, length), True, carry)  # noqa: E731
    inside = lambda i, carry: visit(_Block(i * size, size, length, bounded=False), False, carry)  # noqa: E731
    carry = jax.lax.fori_loop(first, whole, edge, carry)
    carry = jax.lax.fori_loop(whole, ended, inside, carry)
    return jax.lax.fori_loop(ended, last, edge, carry)


def _inside(columns: _Block, begin: Any, end: Any) -> Any:
    """Which columns every row sees."""
    return (begin[:, None] <= columns.index[None, :]) & (columns.index[None, :] < end[:, None])


def _whole_blocks(size: int, *limits: Int[Array, "B T"]) -> list[Int[Array, "B padded"]]:
    """Limits of a whole number of blocks; what is beyond the end has those of the last row."""
    return [jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)], mode="edge") for x in limits]
