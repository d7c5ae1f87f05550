"""Attention by the splash kernel of JAX on TPU: block-sparse FlashAttention in Pallas, segments honoured.

Blocks of queries and keys that the causal order hides are skipped; inside a visited block segments are
masked. The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jaxtyping import Float, Int

from kangaroo_jax.chips import find_chip
from kangaroo_jax.conventions import Array
from kangaroo_jax.sharding import device_kind, index_on

LANES = 128  # lengths are padded to a multiple of this
BLOCKS = (1024, 512, 384, 256, 128)  # of queries and of keys; the largest that divides the length
COMPUTED = 512  # keys whose scores exist at a time
# Half of every block on the diagonal of a causal row is computed for nothing. Blocks of more than COMPUTED are for
# rows of at least so many of them, where that is at most a 16th of the row's scores.
CAUSAL_BLOCKS = 16
# The fused backward kernel computes the scores once instead of twice, but holds a query gradient for every
# block of keys. Where those take more than this share of the device's memory the two separate kernels are used.
FUSED_SHARE = 1 / 8
DEVICE_GIB = 16.0  # of a device that is not known
PADDING = -1  # segment of the padding


class Order(masks.Mask):
    """Who sees whom by index, without ever holding the [T, S] mask: query q sees key s where order[q] >= s."""

    def __init__(self, order: np.ndarray, keys: int) -> None:
        """`order` int32[T]: the last key that each query sees."""
        self.q_sequence = order.astype(np.int32)
        self._keys = keys

    @staticmethod
    def mask_function(queries: Any, keys: Any) -> Any:
        """What the kernel computes inside a partly visible block."""
        return queries >= keys

    @property
    def shape(self) -> tuple[int, int]:
        """(T, S)."""
        return len(self.q_sequence), self._keys

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """A stand-in for the block: only its any() and all() are asked for."""
        queries, (first, last, _) = self.q_sequence[index[0]], index[1].indices(self._keys)
        return np.array([[queries.max() >= first, queries.min() >= last - 1]])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Order) and self.shape == other.shape and bool((self.q_sequence == other.q_sequence).all())
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.q_sequence.tobytes()))


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    causal: bool,
    pieces: int = 1,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention as in `attention.attention`.

    With `pieces` over 1 the queries are those of this device (see
    `attention_context`), S = pieces * T, and `causal` is by index in the whole. `interpret` runs the kernel
    on any device, slowly, for tests.
    """
    length, keys = query.shape[1], key.shape[1]
    segments = _padded_segments(segments, query.shape[:2], key.shape[:2])
    query, key, value = (_pad(x, LANES).swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    _, heads, padded, _ = query.shape
    if pieces > 1 and (padded != length or key.shape[2] != keys):
        raise ValueError(f"context parallelism needs {keys} tokens to divide by {pieces} pieces of whole {LANES}s")
    blocks = key.shape[2] // _block(key.shape[2], key.shape[2], causal)
    fused = query.size * query.dtype.itemsize * blocks <= _fused_bytes()
    kernel = make_kernel(heads, padded, key.shape[2], causal, pieces, fused, interpret)
    if pieces > 1:
        kernel = _piece_of(kernel, index_on("tokens"), pieces)
    ids = None if segments is None else kernels.SegmentIds(*segments)
    with jax.named_scope("splash_causal" if causal else "splash_full"):
        output: Any = jax.vmap(kernel)(query, key, value, ids)  # an array, as no residuals are asked for
    context: jax.Array = output.swapaxes(1, 2)[:, :length]
    return context


@functools.cache
def make_kernel(
    heads: int, length: int, keys: int, causal: bool, pieces: int, fused: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for `length` queries a device, with the visited blocks of all `pieces` as NumPy arrays."""
    order = query_order(keys, pieces) if causal else np.full(length, keys - 1)
    mask = masks.MultiHeadMask([Order(order, keys)] * heads)
    blocks, cut = block_sizes(length, keys, causal, fused), dict(head_shards=1, q_seq_shards=pieces)
    forward, function = mask_info.process_mask(mask, (blocks.block_q, blocks.block_kv), **cut)
    d_query = None if fused else mask_info.process_mask(mask, (blocks.block_q_dq, blocks.block_kv_dq), **cut)[0]
    sizes = (blocks.block_q_dkv, blocks.block_kv_dkv)
    d_keys, _ = mask_info.process_mask_dkv(mask, sizes, shrink_grid=not fused, **cut)
    return kernels.SplashAttentionKernel(
        forward,
        d_query,
        d_keys,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="context",
        mask_function=function,
        interpret=interpret,
    )


def block_sizes(length: int, keys: int, causal: bool, fused: bool) -> kernels.BlockSizes:
    """Blocks for `length` queries a device and `keys`."""
    queries, block = _block(length, keys, causal), _block(keys, keys, causal)
    computed = math.gcd(block, COMPUTED)
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


def _block(length: int, keys: int, causal: bool) -> int:
    """Size of a block of `length` queries or keys, in a row of `keys`."""
    most = max(COMPUTED, keys // CAUSAL_BLOCKS) if causal else BLOCKS[0]
    return next((block for block in BLOCKS if block <= most and length % block == 0), LANES)


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


def _piece_of(kernel: kernels.SplashAttentionKernel, index: jax.Array, pieces: int) -> kernels.SplashAttentionKernel:
    """The kernel whose visited blocks are those of piece `index`."""

    def cut(x: Any, axis: int) -> Any:
        size = x.shape[axis] // pieces
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), index * size, size, axis)

    def cut_info(info: Any) -> Any:
        if info is None:
            return None
        fields = {name: x for name, x in info._asdict().items() if x is not None and not isinstance(x, bool)}
        return info._replace(**{name: cut(x, 0 if name == "q_sequence" else 1) for name, x in fields.items()})

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return kernels.SplashAttentionKernel(*map(cut_info, infos), **kernel.kwargs)
