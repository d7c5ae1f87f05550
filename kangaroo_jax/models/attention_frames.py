"""Attention of a ViT's frames on TPU, in Pallas: a frame is one block, and heads of 64 are taken two at a time.

Two such heads fill the lanes of a TPU. The kernels read queries, keys and values as one product before attention
writes them: of each two heads the queries, the keys and the values, [n, T, N / 2 * 3 * LANES]. So nothing is turned
head by head or padded to whole lanes between, and the gradient is what one product takes; rows of each of the two
heads have zeros in the lanes of the other. Queries and keys are rotated inside. The backward kernel has all scores of
a frame and needs nothing of the forward pass but what went in.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32

from kangaroo_jax.conventions import Array

LANES = 128
HEADS = 2  # in the lanes of one vector
WIDTH = LANES // HEADS
LONGEST = 1152  # tokens of a frame
QUERIES = 384  # whose scores with all keys exist at a time
MASKED = -1e30  # finite, so that what is seen by nobody gives no NaN
LOG2_E = math.log2(math.e)

TAKEN = 3 * LANES  # of a pair of heads
QUERY, KEY, VALUE = (slice(first, first + LANES) for first in range(0, TAKEN, LANES))  # where they stand among these

Frames = Float[Array, "n T D"]
Taken = Float[Array, "n T taken"]
Table = Float32[np.ndarray, "T pairs"]


def fits(tokens: int, heads: int, width: int) -> bool:
    """Whether the kernels take frames of so many tokens, padding with them, and so many heads of a width."""
    return width == WIDTH and heads % HEADS == 0 and tokens <= LONGEST and tokens % LANES == 0


def frames(taken: Taken, cos: Table, sin: Table, tokens: int, *, interpret: bool = False) -> Frames:
    """Full attention of each frame's first `tokens` tokens among themselves; D is of heads of WIDTH, side by side.

    `taken` has queries, keys and values, LANES of each in turns: those of HEADS heads. `cos` and `sin`, [T, WIDTH / 2],
    rotate the neighbours (2i, 2i + 1) of queries and keys before. T is a multiple of LANES by less than one of them;
    its last tokens are padding, which nobody sees, and what is computed for them means nothing. `interpret` runs the
    kernels on any device, slowly, for tests.
    """
    signs = np.tile([-1.0, 1.0], WIDTH // 2)  # of each element's neighbour
    tables = (np.repeat(cos, 2, axis=-1), np.repeat(sin, 2, axis=-1) * signs)
    wide = (jnp.asarray(np.tile(table, (1, HEADS)), taken.dtype) for table in tables)
    return _attention(taken, *wide, tokens, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(taken: Taken, cos: Any, sin: Any, tokens: int, interpret: bool) -> Frames:
    return _forward(taken, cos, sin, tokens, interpret)[0]


def _forward(taken: Taken, cos: Any, sin: Any, tokens: int, interpret: bool) -> tuple[Frames, Any]:
    run = _call(_forward_kernel, "frames_fwd", tokens, interpret)
    return run((taken,), (cos, sin), LANES), (taken, cos, sin)


def _backward(tokens: int, interpret: bool, kept: Any, d_output: Frames) -> tuple[Any, ...]:
    taken, cos, sin = kept
    run = _call(_backward_kernel, "frames_bwd", tokens, interpret)
    return run((taken, d_output), (cos, sin), TAKEN), None, None


_attention.defvjp(_forward, _backward)


def _call(kernel: Any, name: str, tokens: int, interpret: bool) -> Any:
    """A kernel, over frames and pairs of heads, as a function of frames, tables and the lanes it makes of a pair."""

    def run(frames: tuple[Array, ...], tables: tuple[Any, ...], lanes: int) -> Any:
        n, length, width = frames[0].shape
        pairs = width // TAKEN

        def block(lanes: int) -> Any:
            return pl.BlockSpec((None, length, lanes), lambda frame, pair: (frame, 0, pair))

        table = pl.BlockSpec((length, LANES), lambda frame, pair: (0, 0))
        return pl.pallas_call(
            functools.partial(kernel, tokens),
            name=name,
            grid=(n, pairs),
            in_specs=[*(block(x.shape[-1] // pairs) for x in frames), *[table] * len(tables)],
            out_specs=block(lanes),
            out_shape=jax.ShapeDtypeStruct((n, length, pairs * lanes), frames[0].dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            interpret=interpret,
        )(*frames, *tables)

    return run


def _forward_kernel(tokens: int, taken: Any, cos: Any, sin: Any, output: Any) -> None:
    queries = _rotated(taken[:, QUERY], cos[...], sin[...], WIDTH**-0.5 * LOG2_E)
    keys = _rotated(taken[:, KEY], cos[...], sin[...])
    for here in _chunks(tokens):
        scores = _seen(_product(_apart(queries[here]), keys, 1, 1), tokens, 1)
        weights = jnp.exp2(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        found = _product(weights.astype(keys.dtype), taken[:, VALUE], 1, 0) / total
        output[here, :] = _together(found).astype(output.dtype)


def _backward_kernel(tokens: int, taken: Any, d_output: Any, cos: Any, sin: Any, d_taken: Any) -> None:
    """Scores stand keys by queries, so that sums over keys need no lanes to be moved."""
    queries = _rotated(taken[:, QUERY], cos[...], sin[...], WIDTH**-0.5 * LOG2_E)
    keys = _rotated(taken[:, KEY], cos[...], sin[...])
    d_keys: Any = 0.0
    d_values: Any = 0.0
    for here in _chunks(tokens):
        part, d_part = _apart(queries[here]), _apart(d_output[here, :])
        scores = _seen(_product(keys, part, 1, 1), tokens, 0)
        weights = jnp.exp2(scores - jnp.max(scores, axis=0, keepdims=True))
        weights = weights * (1 / jnp.sum(weights, axis=0, keepdims=True))
        d_weights = _product(taken[:, VALUE], d_part, 1, 1)
        expected = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        d_scores = (weights * (d_weights - expected)).astype(keys.dtype)
        d_values += _product(weights.astype(keys.dtype), d_part, 1, 0)
        d_keys += _product(d_scores, part, 1, 0)
        d_queries = _together(_product(d_scores, keys, 0, 0))
        d_queries = _rotated_back(d_queries, cos[here, :], sin[here, :], WIDTH**-0.5)
        d_taken[here, QUERY] = d_queries.astype(d_taken.dtype)
    d_taken[:, KEY] = _rotated_back(d_keys, cos[...], sin[...], 1 / LOG2_E).astype(d_taken.dtype)
    d_taken[:, VALUE] = d_values.astype(d_taken.dtype)


def _chunks(tokens: int) -> list[slice]:
    """The padded tokens of a frame, QUERIES at a time."""
    length = -(-tokens // LANES) * LANES
    return [slice(first, min(first + QUERIES, length)) for first in range(0, length, QUERIES)]


def _apart(x: Any) -> Any:
    """Rows of each head, one head after another, with zeros in the lanes of the others."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.concatenate([jnp.where(lane // WIDTH == head, x, jnp.zeros_like(x)) for head in range(HEADS)])


def _together(x: Any) -> Any:
    """The inverse of `_apart`; what is not zero in the lanes of other heads is dropped."""
    rows = x.shape[0] // HEADS
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    return jnp.where(lane < WIDTH, x[:rows], x[rows:])


def _rotated(x: Any, cos: Any, sin: Any, scale: float = 1.0) -> Any:
    """Neighbours rotated, times a scale; `sin` is negative for the first of each two."""
    wide, cos, sin = (each.astype(jnp.float32) for each in (x, cos, sin))
    return ((wide * cos + _partners(wide) * sin) * scale).astype(x.dtype)


def _rotated_back(x: Any, cos: Any, sin: Any, scale: float) -> Any:
    """The gradient of `_rotated`, in float32."""
    cos, sin = cos.astype(jnp.float32), sin.astype(jnp.float32)
    return (x * cos - _partners(x) * sin) * scale


def _partners(x: Any) -> Any:
    """Each element's neighbour of its pair."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane % 2 == 0, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))


def _product(left: Any, right: Any, left_axis: int, right_axis: int) -> Any:
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, precision=exact, preferred_element_type=jnp.float32)


def _seen(scores: Any, tokens: int, axis: int) -> Any:
    """Scores with those of padded keys, which lie along `axis`, MASKED."""
    whole = scores.shape[axis] - LANES
    if tokens == scores.shape[axis]:
        return scores
    kept, rest = jax.lax.slice_in_dim(scores, 0, whole, axis=axis), jax.lax.slice_in_dim(scores, whole, None, axis=axis)
    index = jax.lax.broadcasted_iota(jnp.int32, rest.shape, axis)
    rest = jnp.where(index < tokens - whole, rest, MASKED)
    return jnp.concatenate([kept, rest], axis=axis) if whole else rest
