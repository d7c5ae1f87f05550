"""Attention against a plain formula; segments are honoured, or the implementation refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.models import attention as module
from kangaroo_jax.models.attention import attention


def plain(query, key, value, mask):
    """Softmax attention with a whole mask bool[B, T, S] (or None)."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)


def operands(length, keys=None, heads=4, kv_heads=2, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(2, length, heads, 8), (2, keys or length, kv_heads, 8), (2, keys or length, kv_heads, 8)]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def segments_of(length, seed=0):
    cuts = np.sort(np.random.default_rng(seed).integers(1, length, (2, 3)), axis=1)
    return (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)


@pytest.fixture(params=[(128, 8), (16, 8), (16, 2)], ids=["one_chunk", "stripes", "scanned_chunks"])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param[0])
    monkeypatch.setattr(module, "STRIPES", request.param[1])


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_equal_the_plain_formula(small_chunks, length, causal):
    qkv, segments = operands(length), segments_of(length)
    mask = segments[:, :, None] == segments[:, None, :]
    if causal:
        mask = mask & np.tri(length, dtype=bool)
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)

    def value(function):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x) * weight), argnums=(0, 1, 2)))(*qkv)

    actual = value(lambda *x: attention(*x, segment_ids=(segments, segments), causal=causal))
    expected = value(lambda *x: plain(*x, mask))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-6)  # the sum is of thousands of values


def test_no_segments_and_unequal_lengths(small_chunks):
    qkv = operands(37, keys=50, heads=3, kv_heads=3)
    np.testing.assert_allclose(attention(*qkv, segment_ids=None, causal=False), plain(*qkv, None), atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "xla_chunked"])
def test_nothing_leaks_from_one_segment_into_another(implementation):
    query, key, value = operands(150)
    segments = segments_of(150, seed=3)
    run = jax.jit(
        lambda *x: attention(*x, segment_ids=(segments, segments), causal=True, implementation=implementation)
    )
    other = (segments == 1)[..., None, None]
    before, after = run(query, key, value), run(query, jnp.where(other, 9.0, key), jnp.where(other, -9.0, value))
    kept = segments != 1
    np.testing.assert_array_equal(np.asarray(before)[kept], np.asarray(after)[kept])
    assert np.abs(np.asarray(before - after)[~kept]).max() > 0.1


def test_a_query_that_sees_nothing_gives_no_nan():
    qkv = operands(8)
    ids = (np.full((2, 8), 7, np.int32), np.ones((2, 8), np.int32))
    total = lambda *x: jnp.sum(attention(*x, segment_ids=ids, causal=True))  # noqa: E731
    for leaf in jax.tree.leaves(jax.value_and_grad(total, argnums=(0, 1, 2))(*qkv)):
        assert np.all(np.isfinite(leaf))


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    qkv = operands(64)
    actual = attention(*(x.astype(jnp.bfloat16) for x in qkv), segment_ids=None, causal=True)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(jnp.float32), plain(*qkv, np.tri(64, dtype=bool)[None]), atol=0.03)


@pytest.mark.parametrize("implementation", ["splash", "cudnn", "flash"])
def test_an_implementation_that_cannot_run_here_refuses_by_name(implementation):
    with pytest.raises(UserError, match=implementation):
        attention(*operands(8), segment_ids=None, causal=True, implementation=implementation)


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="query"):
        attention(*operands(8, heads=3), segment_ids=None, causal=True)
    with pytest.raises(ValueError, match="causal by index"):
        attention(*operands(8, keys=9), segment_ids=None, causal=True)
