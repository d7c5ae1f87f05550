"""Attention by the splash kernel of JAX on TPU: block-sparse FlashAttention in Pallas, segments honoured.

Blocks of queries and keys that the causal order or the segments hide are skipped, in the forward and the backward
pass; inside a visited block order and segments are masked. Every key-value head, with the query heads that read it,
is an item of a mapped dimension, so that the kernels of the backward use both cores of a chip that has two. The
kernel is `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Bool, Float, Int

from kangaroo_jax.chips import find_chip
from kangaroo_jax.conventions import Array
from kangaroo_jax.sharding import device_kind

LANES = 128  # lengths are padded to a multiple of this
BLOCKS = (1024, 512, 384, 256, 128)  # of queries and of keys; the largest that divides the length
COMPUTED = 512  # keys whose scores exist at a time, in a row of several blocks
# A row without order of at most so many tokens, like a ViT's, is one block: its softmax needs no second pass, and its
# backward no sum over blocks. Cycles of the two kernels for 1,152 tokens and heads of 64 on v5e: see docs/plan.md.
WHOLE = 1152
# Half of every block on the diagonal of a causal row is computed for nothing. Blocks of more than COMPUTED are for
# rows of at least so many of them, where that is at most a 16th of the row's scores.
CAUSAL_BLOCKS = 16
# The fused backward kernel computes the scores once instead of twice, but holds a query gradient for every block of
# keys (of one causal row at a time). Where those take more than this share of the device's memory heads are computed in
# groups, one after another, and where a group's still do the two separate kernels are used.
FUSED_SHARE = 1 / 8
DEVICE_GIB = 16.0  # of a device that is not known
PADDING = -1  # segment of the padding


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    causal: bool,
    positions: Int[Array, " T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention as in `attention.attention`.

    With `causal` the two arrays of segments are of one row, in which every segment is a run: its tokens stand side
    by side. `positions` are the queries' in the row, where a device has only some of its tokens (see
    `attention_context`); then S is a multiple of T. `interpret` runs the kernel on any device, slowly, for tests.

    Raises ValueError where a part of a row is not a multiple of LANES.
    """
    (batch, length, heads, width), (keys, kv_heads) = query.shape, key.shape[1:3]
    segments = _padded_segments(segments, query.shape[:2], key.shape[:2])
    query, key, value = (_pad(x, LANES) for x in (query * width**-0.5, key, value))
    padded, padded_keys = query.shape[1], key.shape[1]
    if positions is not None and (padded != length or padded_keys != keys):
        raise ValueError(f"context parallelism: {length} of {keys} tokens a device are no multiple of {LANES}")
    query = query.reshape(batch, padded, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    key, value = (x.swapaxes(1, 2) for x in (key, value))
    blocks_of_keys = padded_keys // _block(padded_keys, padded_keys, causal)
    at_a_time = query.size // batch if causal else query.size  # causal rows follow one another
    groups = _groups(kv_heads, at_a_time * query.dtype.itemsize * blocks_of_keys) if causal else 1
    fused = at_a_time // groups * query.dtype.itemsize * blocks_of_keys <= _fused_bytes()
    groups = groups if fused else 1
    sizes = block_sizes(padded, padded_keys, causal, fused)
    order = jnp.arange(padded, dtype=jnp.int32) if positions is None else positions

    def row(query: Array, key: Array, value: Array, segments: Any) -> Any:
        infos = _everything(sizes)
        if causal:
            begins = jnp.zeros(padded_keys, jnp.int32) if segments is None else begins_of(segments[1])
            infos = _visits(visited_blocks(begins, order, sizes.block_q, sizes.block_kv), order, sizes)
        kernel = make_kernel(infos, sizes, causal, interpret)
        ids = None if segments is None else kernels.SegmentIds(*segments)
        some: Any = jax.vmap(kernel, (0, 0, 0, None))  # gives an array, as no residuals are asked for
        parts = zip(*(jnp.split(x, groups) for x in (query, key, value)), strict=True)
        done = [some(*part, ids) for part in parts]
        return jnp.concatenate(done) if len(done) > 1 else done[0]

    with jax.named_scope("splash_causal" if causal else "splash_full"):
        run = _row_by_row if causal else jax.vmap
        context = run(row)(query, key, value, segments)
    return context.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, width)[:, :length]


def _row_by_row(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`jax.vmap`, unrolled: a causal kernel is told by arrays in scalar memory what to visit, which have no batch.

    JAX would make a loop of the batch that copies all that goes into a kernel and comes out of it, query gradients of
    every block of keys among it. `split`, unlike indexing, has one concatenation as its gradient.
    """

    def run(*arrays: Any) -> jax.Array:
        leaves, structure = jax.tree.flatten(arrays)
        rows = zip(*(jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves), strict=True)
        done = [jax.vmap(function)(*jax.tree.unflatten(structure, row)) for row in rows]
        return jnp.concatenate(done) if len(done) > 1 else done[0]

    return run


Infos = tuple[MaskInfo, MaskInfo | None, MaskInfo]  # what the forward, the queries' and the keys' gradients visit


def begins_of(segments: Int[Array, " S"]) -> Int[Array, " S"]:
    """The index where the run of equal segments begins in which each token stands."""
    index = jnp.arange(len(segments), dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    return jax.lax.cummax(jnp.where(new, index, 0))


def visited_blocks(
    begins: Int[Array, " S"], order: Int[Array, " T"], block_q: int, block_kv: int
) -> Bool[Array, "queries keys"]:
    """Which blocks of keys each block of queries must see: from the first query's segment to the last query.

    `begins` as from `begins_of`; `order` holds the position of each query in the row. A later token never belongs to
    an earlier segment, so that the earliest query of a block sees the earliest key.
    """
    order = order.reshape(-1, block_q)
    earliest, latest = order.min(axis=1), order.max(axis=1)
    first, last = begins[earliest] // block_kv, latest // block_kv
    block = jnp.arange(len(begins) // block_kv, dtype=jnp.int32)
    return (first[:, None] <= block) & (block <= last[:, None])


def _visits(visited: Bool[Array, "queries keys"], order: Any, sizes: kernels.BlockSizes) -> Infos:
    """`visited` as the kernels take it: a step of the grid is done or skipped, and fetches what the next one needs.

    `order`, int32[T], is the queries'.
    """

    def info(fetched: Int[Array, "queries keys"]) -> MaskInfo:
        small = jnp.int8 if max(visited.shape) <= 2**7 else jnp.int16  # the arrays lie in the small scalar memory
        return MaskInfo(fetched[None].astype(small), None, visited[None].astype(small), None, order)

    forward, d_keys = info(_next_visited(visited)), info(_next_visited(visited.T).T)
    return forward, None if sizes.use_fused_bwd_kernel else forward, d_keys


def _next_visited(visited: Bool[Array, "rows columns"]) -> Int[Array, "rows columns"]:
    """The column of the next visited block, row after row, at or after each; 0 after the last."""
    columns = visited.shape[1]
    index = jnp.arange(visited.size, dtype=jnp.int32)
    following = jax.lax.cummin(jnp.where(visited.reshape(-1), index, visited.size), reverse=True)
    return (following % columns).reshape(visited.shape)


def _everything(sizes: kernels.BlockSizes) -> Infos:
    """Every block is visited, none is masked by order."""
    whole = MaskInfo(None, None, None, None, None)
    return whole, None if sizes.use_fused_bwd_kernel else whole, whole


def sees(queries: Any, keys: Any) -> Any:
    """What a kernel computes in a visited block of a causal row, of positions."""
    return queries >= keys


def make_kernel(
    infos: Infos, sizes: kernels.BlockSizes, causal: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for the query heads that read one key-value head."""
    return kernels.SplashAttentionKernel(
        *infos,
        block_sizes=sizes,
        is_mqa=True,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="context",
        mask_function=sees if causal else None,
        interpret=interpret,
    )


def block_sizes(length: int, keys: int, causal: bool, fused: bool) -> kernels.BlockSizes:
    """Blocks for `length` queries a device and `keys`."""
    queries, block = _block(length, keys, causal), _block(keys, keys, causal)
    computed = block if _is_whole(keys, causal) else math.gcd(block, COMPUTED)
    return kernels.BlockSizes(
        block_q=queries,
        block_kv=block,
        block_kv_compute=computed,
        block_q_dkv=queries,
        block_kv_dkv=block,
        block_kv_dkv_compute=computed,
        block_q_dq=None if fused else queries,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )


def query_order(keys: int, pieces: int) -> np.ndarray:
    """int32[S]: the index in the row of each query, device after device, in the order of `attention_context`."""
    if pieces == 1:
        return np.arange(keys, dtype=np.int32)
    from kangaroo_jax.models.attention_context import halves_of

    half = keys // (2 * pieces)
    return np.concatenate([h * half + np.arange(half) for i in range(pieces) for h in halves_of(i, pieces)])


def visited_share(length: int, keys: int, causal: bool, pieces: int = 1) -> float:
    """The share of the length x keys scores (on the busiest device) in blocks that the kernel visits."""
    if not causal:
        return 1.0
    queries, block = _block(length, keys, causal), _block(keys, keys, causal)
    last = query_order(keys, pieces).reshape(pieces, -1, queries).max(axis=-1)  # of each block of queries
    return float((last // block + 1).sum(axis=1).max() * block * queries / (length * keys))


def _fused_bytes() -> float:
    chip = find_chip(device_kind())
    return FUSED_SHARE * (chip.gib if chip else DEVICE_GIB) * 2**30


def _groups(kv_heads: int, gradients: int) -> int:
    """In how many groups, one after another, key-value heads hold no more bytes of query gradients than they may.

    `gradients` are those of all of them. A group has two heads at least, for the cores of a chip that has two.
    """
    sizes = [n for n in range(1, kv_heads // 2 + 1) if kv_heads % n == 0]
    return next((n for n in sizes if gradients // n <= _fused_bytes()), 1)


def _block(length: int, keys: int, causal: bool) -> int:
    """Size of a block of `length` queries or keys, in a row of `keys`."""
    if _is_whole(keys, causal):
        return length
    most = max(COMPUTED, keys // CAUSAL_BLOCKS) if causal else BLOCKS[0]
    return next((block for block in BLOCKS if block <= most and length % block == 0), LANES)


def _is_whole(keys: int, causal: bool) -> bool:
    return not causal and keys <= WHOLE


def _pad(x: Float[Array, "B T N H"], multiple: int) -> Float[Array, "B padded N H"]:
    """T padded with zeros to a multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)])


def _padded_segments(segments: Any, queries: tuple[int, ...], keys: tuple[int, ...]) -> Any:
    """Segments of the padded length; where there are none, only what tells the padding apart, if there is any."""
    if segments is None:
        if queries[1] % LANES == 0 and keys[1] % LANES == 0:
            return None
        segments = (jnp.zeros(queries, jnp.int32), jnp.zeros(keys, jnp.int32))
    return tuple(jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)], constant_values=PADDING) for x in segments)
