"""Attention with segments: one entry, several implementations, each of which honours segments or refuses."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.stack import keep
from kangaroo_jax.sharding import compute_capability, divides, per_device, platform, shards, split_mesh

CHUNK = 128  # queries (of every head) whose scores exist at a time
STRIPES = 8  # causal attention by index: so many ranges of queries, each with only the keys that it can see
MASKED = -1e30  # finite, so that a query that sees nothing gives no NaN

# Where an implementation runs.
PLATFORMS = {
    "xla_chunked": ("cpu", "gpu", "tpu"),
    "splash": ("tpu",),
    "triton": ("gpu",),
    "tokamax": ("gpu",),
    "cudnn": (),
}
IMPLEMENTATIONS = ("auto", *PLATFORMS)
TRITON_SINCE = 8.0  # compute capability of the first GPUs that its compiler writes matrix instructions for

# How rows of queries and keys lie on a mesh: packs of text, whose tokens may be cut too, or frames.
LAYOUTS: dict[str, tuple[str, str | None, str | None]] = {
    "text": ("batch", "tokens", "activation_heads"),
    "frames": ("frames", None, None),
}


Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]  # or values
Pair = tuple[Array, Array]  # of the queries and of the keys, or of keys and values


class Labels(NamedTuple):
    """What tells who sees whom, int32[B, T] for queries and int32[B, S] for keys; None where it plays no part."""

    segments: Int[Array, "..."] | None
    positions: Int[Array, "..."] | None


# What the backward pass needs: query, key, value, labels of queries and keys, output, log of the softmax's sums.
Residuals = tuple[Array, Array, Array, Labels, Labels, Array, Array]


def attention(
    query: Queries,
    key: Keys,
    value: Keys,
    *,
    segment_ids: Pair | None,
    causal: bool,
    implementation: str = "auto",
    layout: str = "text",
) -> Queries:
    """Scaled dot-product attention with grouped key-value heads.

    N is a multiple of K and query
    head n reads key-value head n // (N / K). `segment_ids`, of the queries int32[B, T] and of the keys
    int32[B, S], must be given: a query sees only keys of its own segment; None says that every row is
    one segment without padding. `causal` hides keys that come later by index (then T = S). Softmax is computed
    in float32.
    `layout`, a key of LAYOUTS, says how the rows lie on a mesh; nothing depends on it without one.

    Raises UserError for an unknown implementation, and for one that does not run here or would not
    honour the segments; ValueError where the shapes do not fit.
    """
    if query.shape[2] % key.shape[2] or key.shape != value.shape:
        raise ValueError(f"attention of query {query.shape}, key {key.shape}, value {value.shape}")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal by index: {query.shape[1]} queries need as many keys, not {key.shape[1]}")
    chosen = choose(implementation, query.shape[-1])
    one_array = segment_ids is None or segment_ids[0] is segment_ids[1]
    if not one_array and (chosen in ("triton", "tokamax") or (chosen == "splash" and causal)):
        raise UserError(f"attention {chosen!r} knows one array of segments for queries and keys: set xla_chunked")
    if split_mesh() is None:
        return _local(chosen, query, key, value, segment_ids, causal)
    return _on_mesh(chosen, query, key, value, segment_ids, causal, LAYOUTS[layout])


def padding(implementation: str, length: int, head_dim: int) -> int:
    """How many tokens `attention` adds to a row for what it chooses here, and takes off again. Raises UserError."""
    if choose(implementation, head_dim) != "splash":
        return 0
    from kangaroo_jax.models.attention_splash import LANES

    return -length % LANES


def whole_frames(implementation: str, tokens: int, heads: tuple[int, ...]) -> int:
    """For `attention_of_frames` of so many tokens, of heads (N, H): how many queries, keys and values take turns.

    0 where it is not for these here. Raises UserError.
    """
    if choose(implementation, heads[1]) != "splash":
        return 0
    from kangaroo_jax.models.attention_frames import LANES, fits

    return LANES if fits(tokens, *heads) else 0


def attention_of_frames(taken: Array, cos: Any, sin: Any, tokens: int) -> Float[Array, "n T D"]:
    """Full attention of a ViT's frames, of what is taken from them [n, T, 3 * D]; see `attention_frames.frames`.

    Raises UserError where the frames do not divide by a mesh's devices.
    """
    from kangaroo_jax.models.attention_frames import frames

    axes = (LAYOUTS["frames"][0], None, None)
    if split_mesh() is not None and not divides(taken.shape, axes):
        raise UserError(f"attention 'splash': {len(taken)} frames do not divide by {shards(axes[0])} devices")

    def run(taken: Array) -> Array:
        return frames(taken, cos, sin, tokens)

    output: jax.Array = per_device(run, (axes,), axes)(taken)
    return output


def choose(implementation: str, head_dim: int) -> str:
    """The implementation that a name (or `auto`) means on the platform compiled for. Raises UserError."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention {implementation!r} is unknown: set model.attention to one of {IMPLEMENTATIONS}")
    if implementation == "cudnn":
        raise UserError("attention 'cudnn' would not honour segments: set model.attention to triton or xla_chunked")
    here = platform()
    chosen = implementation
    if implementation == "auto":
        chosen = _automatic(here, head_dim)
    if here not in PLATFORMS[chosen]:
        raise UserError(f"attention {chosen!r} does not run on this device ({here}): set model.attention to auto")
    return chosen


def _automatic(here: str, head_dim: int) -> str:
    """The fastest implementation of a platform that honours segments, for heads of a width."""
    if here == "tpu" and head_dim % 64 == 0:
        return "splash"
    if here == "gpu" and head_dim in (64, 128) and compute_capability() >= TRITON_SINCE:
        from kangaroo_jax.models.attention_tokamax import CAPABILITIES, installed

        return "tokamax" if compute_capability() in CAPABILITIES and installed() else "triton"
    return "xla_chunked"


def _local(
    chosen: str,
    query: Queries,
    key: Keys,
    value: Keys,
    segments: Pair | None,
    causal: bool,
    positions: Int[Array, " T"] | None = None,
) -> Queries:
    """Attention of what one device holds; `positions` of the queries in the row, where it has only some of them."""
    if chosen == "splash":
        from kangaroo_jax.models.attention_splash import splash

        return splash(query, key, value, segments, causal=causal, positions=positions)
    if chosen == "tokamax":
        from kangaroo_jax.models.attention_tokamax import fits, tokamax

        if fits(query, causal, positions):
            return tokamax(query, key, value, segments)
    if chosen in ("triton", "tokamax"):
        from kangaroo_jax.models.attention_triton import triton

        return triton(query, key, value, segments, causal=causal, positions=positions)
    ids: Any = segments or (None, None)
    if positions is None:
        return xla_chunked(query, key, value, Labels(ids[0], None), Labels(ids[1], None), causal)
    queries, keys = jnp.broadcast_to(positions, query.shape[:2]), jnp.arange(key.shape[1], dtype=jnp.int32)
    keys = jnp.broadcast_to(keys, key.shape[:2])
    return xla_chunked(query, key, value, Labels(ids[0], queries), Labels(ids[1], keys), False)


def _on_mesh(
    chosen: str,
    query: Queries,
    key: Keys,
    value: Keys,
    segments: Pair | None,
    causal: bool,
    layout: tuple[str, str | None, str | None],
) -> Queries:
    """Every device computes its rows, heads and share of the tokens."""
    heads = shards(layout[2]) if layout[2] else 1
    if key.shape[2] % heads:  # more devices than key-value heads: some have the same one
        repeats = math.lcm(key.shape[2], heads) // key.shape[2]
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    axes = (*layout, None)
    if not (divides(query.shape, axes) and divides(key.shape, axes)):
        if chosen != "xla_chunked":
            sizes = [shards(axis) for axis in layout if axis]
            raise UserError(f"attention {chosen!r}: {query.shape} rows, tokens, heads do not divide by {sizes} devices")
        return _local(chosen, query, key, value, segments, causal)
    cut = causal and layout[1] is not None and shards(layout[1]) > 1

    def run(query: Array, key: Array, value: Array, segments: Pair | None) -> Array:
        if not cut:
            return _local(chosen, query, key, value, segments, causal)
        from kangaroo_jax.models.attention_context import context_parallel

        function = functools.partial(_local, chosen)
        return context_parallel(
            lambda q, k, v, ids, positions: function(q, k, v, ids, True, positions), query, key, value, segments
        )

    ids = None if segments is None else (layout[:2], layout[:2])
    output: jax.Array = per_device(run, (axes, axes, axes, ids), axes)(query, key, value, segments)
    return output


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def xla_chunked(
    query: Queries,
    key: Keys,
    value: Keys,
    queries: Labels,
    keys: Labels,
    by_index: bool,
) -> Queries:
    """Attention in plain XLA, for any device: scores exist for CHUNK queries at a time, forward and backward.

    Shapes as in `attention`. `by_index` is causal by index. The backward computes the scores again, as
    FlashAttention does (Dao et al. 2022); products are arranged so that no matrix of scores is ever
    transposed, which is what costs time on a CPU.
    """
    return _forward(query, key, value, queries, keys, by_index)[0]


def _forward(
    query: Queries,
    key: Keys,
    value: Keys,
    queries: Labels,
    keys: Labels,
    by_index: bool,
) -> tuple[Queries, Residuals]:
    plan = _Plan(query.shape, key.shape, by_index)
    scale = query.shape[-1] ** -0.5
    key_bkhs, value_bksh = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)

    def chunk(end: int, _: None, part: tuple[Array, Labels]) -> tuple[None, Pair]:
        query, labels = part
        scores = plan.scores(query, key_bkhs[..., :end], labels, plan.key_labels(keys, end))
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        output = jnp.einsum("bktgs,bksh->bktgh", weights.astype(value.dtype), value_bksh[:, :, :end])
        return None, ((output / total).astype(value.dtype), (largest + jnp.log(total))[..., 0])

    parts = (plan.split(query * scale), plan.split_labels(queries))
    _, (output, statistics) = plan.run(chunk, lambda end: None, parts)
    output, statistics = keep(plan.join(output), "context"), keep(statistics, "attention_statistics")
    return output, (query, key, value, queries, keys, output, statistics)


def _backward(by_index: bool, residuals: Residuals, d_output: Queries) -> tuple[Queries, Keys, Keys, None, None]:
    query, key, value, queries, keys, output, statistics = residuals
    plan = _Plan(query.shape, key.shape, by_index)
    scale = query.shape[-1] ** -0.5
    key_bksh, key_bkhs, value_bkhs = key.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)

    def chunk(end: int, sums: Pair, part: Any) -> tuple[Pair, Array]:
        query, labels, output, d_output, statistics = part
        scores = plan.scores(query, key_bkhs[..., :end], labels, plan.key_labels(keys, end))
        weights = jnp.exp(scores - statistics[..., None])
        expected = jnp.sum(output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1, keepdims=True)
        d_weights = jnp.einsum("bktgh,bkhs->bktgs", d_output, value_bkhs[..., :end], preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - expected)).astype(query.dtype)
        d_query = jnp.einsum("bktgs,bksh->bktgh", d_scores, key_bksh[:, :, :end])
        d_key = jnp.einsum("bktgh,bktgs->bkhs", query, d_scores, preferred_element_type=jnp.float32)
        d_value = jnp.einsum(
            "bktgh,bktgs->bkhs", d_output, weights.astype(d_output.dtype), preferred_element_type=jnp.float32
        )
        return (sums[0] + d_key, sums[1] + d_value), d_query

    def zeros(end: int) -> Pair:
        return (jnp.zeros((*key_bkhs.shape[:3], end), jnp.float32),) * 2

    parts = (
        plan.split(query * scale),
        plan.split_labels(queries),
        plan.split(output),
        plan.split(d_output),
        statistics,
    )
    sums, d_query = plan.run(chunk, zeros, parts)
    zero = jnp.zeros((), jnp.float32)
    d_key, d_value = (
        sum((jnp.pad(part, [(0, 0)] * 3 + [(0, key.shape[1] - part.shape[3])]) for part in stripes), zero)
        for stripes in zip(*sums, strict=True)
    )
    d_key, d_value = (x.transpose(0, 3, 1, 2).astype(key.dtype) for x in (d_key, d_value))
    return (plan.join(d_query) * scale).astype(query.dtype), d_key, d_value, None, None


xla_chunked.defvjp(_forward, _backward)


class _Plan:
    """How the queries are cut: into chunks c of t queries, and stripes of chunks that share a range of keys."""

    def __init__(self, query_shape: tuple[int, ...], key_shape: tuple[int, ...], by_index: bool) -> None:
        self.batch, self.length, self.heads, self.width = query_shape
        self.keys, self.kv_heads = key_shape[1:3]
        self.count = -(-self.length // CHUNK)
        self.chunk = -(-self.length // self.count)
        self.by_index = by_index
        step = -(-self.count // STRIPES) if by_index else self.count
        self.stripes = [(first, min(first + step, self.count)) for first in range(0, self.count, step)]

    def split(self, x: Queries) -> Float[Array, "c B K t g H"]:
        """Padded with zeros at the end; g = N / K."""
        x = jnp.pad(x, [(0, 0), (0, self.count * self.chunk - self.length), (0, 0), (0, 0)])
        x = x.reshape(self.batch, self.count, self.chunk, self.kv_heads, -1, self.width)
        return x.transpose(1, 0, 3, 2, 4, 5)

    def join(self, x: Float[Array, "c B K t g H"]) -> Queries:
        """The inverse of `split`."""
        x = x.transpose(1, 0, 3, 2, 4, 5).reshape(self.batch, -1, self.heads, self.width)
        return x[:, : self.length]

    def split_labels(self, labels: Labels) -> Labels:
        """Labels of the queries, each [c, B or 1, t]."""
        positions = labels.positions
        if self.by_index:
            positions = jnp.arange(self.length, dtype=jnp.int32)[None]
        return Labels(*(self._split_row(x) for x in (labels.segments, positions)))

    def _split_row(self, x: Int[Array, "B T"] | None) -> Int[Array, "c B t"] | None:
        if x is None:
            return None
        x = jnp.pad(x, [(0, 0), (0, self.count * self.chunk - self.length)])
        return x.reshape(x.shape[0], self.count, self.chunk).swapaxes(0, 1)

    def key_labels(self, labels: Labels, end: int) -> Labels:
        """Labels of the first `end` keys, each [B or 1, s]."""
        positions = jnp.arange(self.keys, dtype=jnp.int32)[None] if self.by_index else labels.positions
        return Labels(*(None if x is None else x[:, :end] for x in (labels.segments, positions)))

    def scores(
        self, query: Float[Array, "B K t g H"], key: Float[Array, "B K H s"], queries: Labels, keys: Labels
    ) -> Float32[Array, "B K t g s"]:
        """MASKED where the key is not seen."""
        scores = jnp.einsum("bktgh,bkhs->bktgs", query, key, preferred_element_type=jnp.float32)
        seen = None
        if queries.segments is not None and keys.segments is not None:
            seen = queries.segments[:, :, None] == keys.segments[:, None, :]
        if queries.positions is not None and keys.positions is not None:
            earlier = keys.positions[:, None, :] <= queries.positions[:, :, None]
            seen = earlier if seen is None else seen & earlier
        return scores if seen is None else jnp.where(seen[:, None, :, None, :], scores, MASKED)

    def run(
        self, chunk: Callable[[int, Any, Any], tuple[Any, Any]], initial: Callable[[int], Any], parts: Any
    ) -> tuple[list[Any], Any]:
        """chunk(end, carry, part) -> (carry, result) over the chunks of each stripe.

        Returns the last carry of every stripe and the results, [c, ...].
        """
        carries, results = [], []
        for first, last in self.stripes:
            end = min(last * self.chunk, self.keys) if self.by_index else self.keys
            step, carry = functools.partial(chunk, end), initial(end)
            if last - first == 1:
                carry, result = step(carry, jax.tree.map(lambda x: x[first], parts))  # noqa: B023
                result = jax.tree.map(lambda x: x[None], result)
            else:
                carry, result = jax.lax.scan(step, carry, jax.tree.map(lambda x: x[first:last], parts))  # noqa: B023
            carries.append(carry)
            results.append(result)
        return carries, jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *results)
