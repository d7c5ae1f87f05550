"""Attention with segments: one entry, several implementations, each of which honours segments or refuses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kangaroo_jax.conventions import UserError

IMPLEMENTATIONS = ("auto", "xla_chunked", "splash", "cudnn")
QUERY_CHUNK = 128
MASKED = -1e30  # finite, so that a row in which everything is masked gives no NaN


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: tuple[jax.Array, jax.Array] | None,
    causal: bool,
    positions: tuple[jax.Array, jax.Array] | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key-value heads.

    query [B, T, N, H], key and value [B, S, K, H] -> [B, T, N, H], where N is a multiple of K and query
    head n reads key-value head n // (N / K). `segment_ids`, of the queries int32[B, T] and of the keys
    int32[B, S], must be given: a query sees only keys of its own segment; None says that every row is
    one segment with no padding. `causal` hides keys that come later: by index (then T = S), or, where
    `positions` (int32[B, T], int32[B, S]) are given, by position. Softmax is computed in float32.

    Raises UserError for an unknown implementation, and for one that would not honour the segments.
    """
    function = _choose(implementation, segment_ids)
    return function(query, key, value, segment_ids, causal, positions)


def _choose(implementation: str, segment_ids: tuple[jax.Array, jax.Array] | None) -> Callable[..., jax.Array]:
    if implementation in ("auto", "xla_chunked"):
        return _xla_chunked
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention {implementation!r} is unknown: set model.attention to one of {IMPLEMENTATIONS}")
    raise UserError(f"attention {implementation!r} is not available on this device: set model.attention to xla_chunked")


def _xla_chunked(query, key, value, segment_ids, causal, positions):
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, width) * width**-0.5
    chunk = min(QUERY_CHUNK, length) if causal and positions is None else length
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        end = stop if causal and positions is None else key.shape[1]
        scores = jnp.einsum("btkgh,bskh->bkgts", query[:, start:stop], key[:, :end], preferred_element_type=jnp.float32)
        mask = _mask(start, stop, end, segment_ids, causal, positions)
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, MASKED)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        outputs.append(jnp.einsum("bkgts,bskh->btkgh", probabilities, value[:, :end]))
    output = jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]
    return output.reshape(batch, length, heads, width)


def _mask(start, stop, end, segment_ids, causal, positions):
    """bool[B or 1, t, s] of the queries start..stop and keys 0..end: True where the query sees the key."""
    mask = None
    if segment_ids is not None:
        mask = segment_ids[0][:, start:stop, None] == segment_ids[1][:, None, :end]
    if causal:
        if positions is not None:
            seen = positions[1][:, None, :end] <= positions[0][:, start:stop, None]
        else:
            seen = (jnp.arange(end) <= jnp.arange(start, stop)[:, None])[None]
        mask = seen if mask is None else mask & seen
    return mask
