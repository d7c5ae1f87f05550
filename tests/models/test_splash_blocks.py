"""Which blocks the splash kernel is given, and what it visits: numbers only, no kernel runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.models import attention_splash as module
from kangaroo_jax.models.attention_splash import (
    BLOCKS,
    begins_of,
    block_sizes,
    query_order,
    splash,
    visited_blocks,
    visited_share,
)


@pytest.mark.parametrize(
    ("length", "keys", "causal", "queries", "block"),
    [
        (2048, 2048, False, 1024, 1024),
        (2048, 2048, True, 512, 512),  # larger ones only where a row has 16 of them
        (16_384, 16_384, True, 1024, 1024),
        (8192, 16_384, True, 1024, 1024),
        (13_312, 13_312, True, 512, 512),
        (10_240, 10_240, True, 512, 512),
        (384 * 3, 384 * 3, True, 384, 384),
        (768, 1536, False, 384, 512),
        (1280, 1280, False, 256, 256),
        (1152, 1152, False, 1152, 1152),  # a ViT's 1,025 tokens, padded
        (640, 640, False, 640, 640),
        (256, 256, True, 256, 256),
    ],
)
def test_blocks_are_the_largest_that_divide_the_length(length, keys, causal, queries, block):
    for fused in (True, False):
        sizes = block_sizes(length, keys, causal, fused)
        assert (sizes.block_q, sizes.block_q_dkv, sizes.block_kv, sizes.block_kv_dkv) == (
            queries,
            queries,
            block,
            block,
        )
        computed = block if block == keys and not causal else {1024: 512, 384: 128}.get(block, block)
        assert (sizes.block_kv_compute, sizes.block_kv_dkv_compute) == (computed, computed)
        assert (sizes.block_q_dq, sizes.block_kv_dq) == ((None, None) if fused else (queries, block))
        assert sizes.use_fused_bwd_kernel == fused
    assert all(block % 128 == 0 for block in BLOCKS)


def test_the_order_of_queries_is_the_row_or_that_of_the_devices_halves():
    np.testing.assert_array_equal(query_order(8, 1), np.arange(8))
    np.testing.assert_array_equal(query_order(16, 2), [0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7])


def test_a_run_of_segments_begins_where_the_id_changes():
    np.testing.assert_array_equal(begins_of(jnp.asarray([3, 3, 1, 1, 1, 0, 0, -1])), [0, 0, 2, 2, 2, 5, 5, 7])
    np.testing.assert_array_equal(begins_of(jnp.asarray([0])), [0])


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("blocks", [(8, 8), (4, 16), (16, 4), (12, 6)], ids=str)
def test_exactly_the_blocks_with_a_visible_pair_are_visited(blocks, pieces):
    """On random rows of 1 to 40 segments, padding among them; (12, 6) has blocks across both halves of a device."""
    keys, random = 192, np.random.default_rng(sum(blocks))
    for count in (1, 2, 7, 40):
        cuts = np.sort(random.integers(0, keys, count - 1))
        segments = (np.arange(keys)[:, None] >= cuts).sum(axis=1).astype(np.int32)
        for order in query_order(keys, pieces).reshape(pieces, -1):
            if len(order) % blocks[0]:
                continue
            seen = (segments[order][:, None] == segments) & (np.arange(keys) <= order[:, None])
            grid = seen.reshape(len(order) // blocks[0], blocks[0], keys // blocks[1], blocks[1]).any(axis=(1, 3))
            visited = visited_blocks(begins_of(jnp.asarray(segments)), jnp.asarray(order), *blocks)
            assert not np.any(grid & ~np.asarray(visited)), "a needed block is skipped"
            if len(order) // 2 % blocks[0] == 0:
                np.testing.assert_array_equal(visited, grid)


def test_a_skipped_step_fetches_what_the_next_visited_one_needs():
    visited = jnp.asarray([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(module._next_visited(visited), [[1, 1, 3, 3], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_the_share_that_is_visited_is_counted_by_blocks():
    assert visited_share(1024, 1024, False) == 1
    assert visited_share(1024, 1024, True) == 0.75  # 3 of 4 blocks of 512
    assert visited_share(2048, 2048, True) == 10 / 16
    # Two devices with 1024 of 2048 tokens each: halves 0 and 3, 2 and 1, that is 1 + 4 and 3 + 2 blocks of 8.
    assert visited_share(1024, 2048, True, 2) == 5 / 8


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("heads", "fused", "groups"), [(64, True, 1), (66, True, 2), (67, False, 1), (130, True, 5)])
def test_the_backward_kernel_is_fused_while_a_rows_query_gradients_fit_an_eighth_of_the_memory(
    rows, heads, fused, groups, monkeypatch
):
    """Of 16 GiB, where the device is not known: 16 blocks of keys, 2 MiB of bfloat16 a head and block.

    Those of more heads are computed in groups, if their number divides.
    """
    chosen, runs = [], []
    kernel = lambda q, *kv: runs.append(1) or q  # noqa: E731
    monkeypatch.setattr(
        module, "make_kernel", lambda _, sizes, *rest: chosen.append(sizes.use_fused_bwd_kernel) or kernel
    )
    query = jax.ShapeDtypeStruct((rows, 16_384, heads, 64), jnp.bfloat16)
    jax.eval_shape(functools.partial(splash, causal=True), query, query, query, None)
    assert chosen == [fused] * rows and len(runs) == groups * rows


def test_pieces_need_whole_blocks():
    query, key = jnp.zeros((1, 100, 1, 8)), jnp.zeros((1, 200, 1, 8))
    with pytest.raises(ValueError, match="100 of 200 tokens a device are no multiple of 128"):
        splash(query, key, key, None, causal=True, positions=jnp.arange(100), interpret=True)
