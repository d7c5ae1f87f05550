"""The kernels for GPUs, interpreted: the plain formula on random packings, no leak, no block visited in vain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.models import attention as module
from kangaroo_jax.models import attention_tokamax
from kangaroo_jax.models.attention_context import halves_of
from kangaroo_jax.models.attention_triton import Tile, Tiles, ranges_of, tiles_for, triton, visited_share
from tests.models.test_attention import plain

LENGTH, WIDTH = 208, 16
WIDE, TALL = Tile(16, 32, 4, 2), Tile(32, 16, 4, 2)
run = functools.partial(triton, interpret=True, tiles=Tiles(WIDE, TALL, WIDE))


def operands(rows, length=LENGTH, heads=4, kv_heads=2):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(rows, length, n, WIDTH)), jnp.float32) for n in (heads, kv_heads, kv_heads)]


def packings(counts, length=LENGTH):
    """int32[len(counts), length]: rows of so many segments, cut at random; the last one is padding, segment 0."""
    random = np.random.default_rng(1)
    rows = np.zeros((len(counts), length), np.int32)
    for row, count in zip(rows, counts, strict=True):
        cuts = np.sort(random.choice(np.arange(1, length), count - 1, replace=False))
        row[:] = 1 + (np.arange(length)[:, None] >= cuts).sum(axis=1)
        row[row == count] = 0
    return rows


def mask_of(segments, causal):
    mask = segments[:, :, None] == segments[:, None, :]
    return mask & np.tri(segments.shape[1], dtype=bool) if causal else mask


def value_and_gradients(function, qkv, weight):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x) * weight), argnums=(0, 1, 2)))(*qkv)


def assert_equal_trees(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("length", [LENGTH, 201], ids=["whole_blocks", "a_block_cut_off"])
def test_random_packings_equal_the_plain_formula(causal, length):
    """Rows of 1 to 40 segments, grouped heads, blocks of several shapes."""
    segments = packings([1, 2, 3, 7, 16, 40], length)
    qkv = operands(len(segments), length)
    weight = np.random.default_rng(2).normal(size=qkv[0].shape)
    actual = value_and_gradients(lambda *x: run(*x, (segments, segments), causal=causal), qkv, weight)
    expected = value_and_gradients(lambda *x: plain(*x, mask_of(segments, causal)), qkv, weight)
    assert_equal_trees(actual, expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "frames"])
def test_rows_without_segments(causal):
    """Like a ViT's odd number of tokens; its kernels see no padding."""
    qkv = operands(2, 65, heads=2)
    weight = np.random.default_rng(2).normal(size=qkv[0].shape)
    mask = np.tri(65, dtype=bool)[None] if causal else None
    actual = value_and_gradients(lambda *x: run(*x, None, causal=causal), qkv, weight)
    assert_equal_trees(actual, value_and_gradients(lambda *x: plain(*x, mask), qkv, weight))


def test_blocks_of_other_segments_are_not_visited_forward_or_backward():
    """What is not a number there would spoil every product that it is in, masked or not."""
    segments = np.repeat([[1, 2, 3]], [64, 64, 80], axis=1).astype(np.int32)  # cut where blocks are cut
    qkv, other = operands(1), (segments == 2)[..., None, None]
    spoilt = [jnp.where(other, jnp.nan, x) for x in qkv]
    weight = np.random.default_rng(2).normal(size=qkv[0].shape)
    function = lambda *x: run(*x, (segments, segments), causal=True)  # noqa: E731
    gradients = jax.jit(lambda *x: jax.vjp(function, *x)[1](jnp.asarray(weight, jnp.float32)))
    kept = np.asarray(segments != 2)
    np.testing.assert_array_equal(np.asarray(function(*qkv))[kept], np.asarray(function(*spoilt))[kept])
    for a, b in zip(gradients(*qkv), gradients(*spoilt), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[kept], np.asarray(b)[kept])


def test_nothing_leaks_from_one_segment_into_another():
    segments = packings([5, 9])
    (query, key, value), other = operands(2), (segments == 2)[..., None, None]
    function = jax.jit(lambda *x: run(*x, (segments, segments), causal=True))
    before = function(query, key, value)
    after = function(query, jnp.where(other, 9.0, key), jnp.where(other, -9.0, value))
    np.testing.assert_array_equal(np.asarray(before)[segments != 2], np.asarray(after)[segments != 2])
    assert np.abs(np.asarray(before - after)[segments == 2]).max() > 0.1


def test_ranges_name_what_sees_what():
    segments = packings([3, 12])
    for causal in (True, False):
        begin, end, first, last = (
            np.asarray(x)[:, :, None] for x in ranges_of(jnp.asarray(segments), segments.shape, LENGTH, causal)[0]
        )
        index, mask = np.arange(LENGTH), mask_of(segments, causal)
        np.testing.assert_array_equal((begin <= index) & (index < end), mask)
        np.testing.assert_array_equal(((first <= index) & (index < last)).swapaxes(1, 2), mask)


def test_devices_that_have_some_of_the_queries_make_up_the_whole():
    length, pieces = 256, 4
    segments = packings([4, 9], length)
    query, key, value = operands(2, length)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=query.shape), jnp.float32)
    half = length // (2 * pieces)

    @jax.jit
    def of_piece(positions):
        ids = segments[:, np.zeros(2 * half, int)], segments  # the queries' own are not needed
        local = lambda *x: run(*x, ids, causal=True, positions=positions)  # noqa: E731
        output, backward = jax.vjp(local, query[:, positions], key, value)
        return output, *backward(weight[:, positions])

    whole = lambda *x: run(*x, (segments, segments), causal=True)  # noqa: E731
    output, backward = jax.vjp(whole, query, key, value)
    d_query, *d_others = backward(weight)
    sums = [np.zeros_like(x) for x in d_others]
    for piece in range(pieces):
        positions = np.concatenate([h * half + np.arange(half, dtype=np.int32) for h in halves_of(piece, pieces)])
        part, d_part, *of_others = of_piece(positions)
        np.testing.assert_allclose(part, output[:, positions], atol=1e-5)
        np.testing.assert_allclose(d_part, d_query[:, positions], atol=2e-4)
        sums = [a + b for a, b in zip(sums, of_others, strict=True)]
    assert_equal_trees(sums, d_others)


def test_auto_takes_the_kernels_on_gpus_that_have_the_instructions(monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_tokamax, "installed", lambda: False)
    for capability, width, expected in ((8.0, 128, "triton"), (9.0, 64, "triton"), (9.0, 80, "xla_chunked")):
        monkeypatch.setattr(module, "compute_capability", lambda: capability)  # noqa: B023
        assert module.choose("auto", width) == expected
    monkeypatch.setattr(module, "compute_capability", lambda: 7.5)
    assert module.choose("auto", 128) == "xla_chunked"
    monkeypatch.setattr(attention_tokamax, "installed", lambda: True)
    for capability, expected in ((8.0, "triton"), (9.0, "tokamax"), (10.0, "tokamax"), (12.0, "triton")):
        monkeypatch.setattr(module, "compute_capability", lambda: capability)  # noqa: B023
        assert module.choose("auto", 128) == expected


def test_tokamax_is_left_to_whole_causal_rows_in_half_precision(monkeypatch):
    query = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    assert attention_tokamax.fits(query, True, None) and not attention_tokamax.fits(query, False, None)
    assert not attention_tokamax.fits(query[:, :200], True, None)
    assert not attention_tokamax.fits(query.astype(jnp.float32), True, None)
    assert not attention_tokamax.fits(query, True, np.arange(256))
    monkeypatch.setattr(attention_tokamax, "installed", lambda: False)
    with pytest.raises(UserError, match="tokamax.*not installed: pip install"):
        attention_tokamax.tokamax(query, query, query, None)


@pytest.mark.skipif(not attention_tokamax.installed(), reason="needs tokamax")
def test_the_mask_of_tokamax_is_ours():
    segments = packings([1, 5, 30])
    (ranges,) = ranges_of(jnp.asarray(segments), segments.shape, LENGTH, True)
    mask = attention_tokamax.mask_of(ranges).as_array(LENGTH, LENGTH)
    np.testing.assert_array_equal(mask[:, 0], mask_of(segments, True))


def test_half_precision_stays_near_float32():
    segments = packings([4])
    qkv = [x.astype(jnp.bfloat16) for x in operands(1)]
    y = run(*qkv, (segments, segments), causal=True)
    assert y.dtype == jnp.bfloat16
    expected = plain(*(x.astype(jnp.float32) for x in qkv), mask_of(segments, True))
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.03)


def test_tiles_by_gpu_and_the_share_that_they_visit():
    assert tiles_for(9.0, 128) == tiles_for(9.0, 100) != tiles_for(9.0, 64) == tiles_for(10.0, 64)
    assert tiles_for(8.0, 128) == tiles_for(8.9, 128) == tiles_for(12.0, 128) != tiles_for(9.0, 128)
    assert visited_share(64, 64, TALL, True) == (32 + 64) / 128 and visited_share(64, 64, WIDE, False) == 1
    for capability in (9.0, 8.0):
        for tile in vars(tiles_for(capability, 128)).values():
            assert 0.5 < visited_share(13_312, 13_312, tile, True) < 0.51


def test_what_the_kernels_cannot_do_is_refused():
    with pytest.raises(UserError, match="triton.*heads of 8"):
        triton(*(x[..., :8] for x in operands(1)), None, causal=True)
