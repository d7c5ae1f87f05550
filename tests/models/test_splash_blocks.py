"""Which blocks the splash kernel is given, and what it visits: numbers only, no kernel runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.models import attention_splash as module
from kangaroo_jax.models.attention_splash import (
    BLOCKS,
    Order,
    block_sizes,
    make_kernel,
    query_order,
    splash,
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
        (640, 640, False, 128, 128),
        (768, 768, False, 384, 384),
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
        computed = {1024: 512, 384: 128}.get(block, block)  # divides the block and 512
        assert (sizes.block_kv_compute, sizes.block_kv_dkv_compute) == (computed, computed)
        assert (sizes.block_q_dq, sizes.block_kv_dq) == ((None, None) if fused else (queries, block))
        assert sizes.use_fused_bwd_kernel == fused
    assert all(block % 128 == 0 for block in BLOCKS)


def test_the_order_of_queries_is_the_row_or_that_of_the_devices_halves():
    np.testing.assert_array_equal(query_order(8, 1), np.arange(8))
    np.testing.assert_array_equal(query_order(16, 2), [0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7])


def test_a_block_is_visited_where_a_query_sees_a_key_and_whole_where_each_sees_all():
    order = Order(np.asarray([0, 1, 2, 3, 4, 5, 6, 7]), 8)
    assert order.shape == (8, 8)
    seen = {(q, k): order[slice(q, q + 4), slice(k, k + 4)].ravel().tolist() for q in (0, 4) for k in (0, 4)}
    assert seen == {(0, 0): [True, False], (0, 4): [False, False], (4, 0): [True, True], (4, 4): [True, False]}
    same, other = Order(np.arange(8), 8), Order(np.arange(8), 16)
    assert order == same and hash(order) == hash(same)
    assert order != other and order != Order(np.arange(8)[::-1], 8) and order != "order"
    assert bool(Order.mask_function(3, 3)) and not Order.mask_function(2, 3)


def test_the_share_that_is_visited_is_counted_by_blocks():
    assert visited_share(1024, 1024, False) == 1
    assert visited_share(1024, 1024, True) == 0.75  # 3 of 4 blocks of 512
    assert visited_share(2048, 2048, True) == 10 / 16
    # Two devices with 1024 of 2048 tokens each: halves 0 and 3, 2 and 1, that is 1 + 4 and 3 + 2 blocks of 8.
    assert visited_share(1024, 2048, True, 2) == 5 / 8


@pytest.mark.parametrize("fused", [True, False])
def test_the_kernel_has_the_masks_of_every_piece(fused):
    kernel = make_kernel(2, 512, 1024, True, 2, fused, True)
    blocks = np.asarray(kernel.fwd_mask_info.block_mask)
    assert (kernel.dq_mask_info is None) == fused
    assert (blocks > 0).sum(axis=-1).tolist() == [[2, 2]]  # late halves see keys of both blocks
    piece = module._piece_of(kernel, jnp.int32(1), 2)
    assert piece.fwd_mask_info.block_mask.shape[1] == 1


@pytest.mark.parametrize(("heads", "fused"), [(64, True), (65, False)])
def test_the_backward_kernel_is_fused_while_its_query_gradients_fit_an_eighth_of_the_memory(heads, fused, monkeypatch):
    """Of 16 GiB, where the device is not known: 16 blocks of keys, 2 MiB of bfloat16 a head and block."""
    chosen = []
    monkeypatch.setattr(module, "make_kernel", lambda *given: chosen.append(given[5]) or (lambda q, k, v, ids: q))
    query = jax.ShapeDtypeStruct((1, 16_384, heads, 64), jnp.bfloat16)
    jax.eval_shape(functools.partial(splash, causal=False), query, query, query, None)
    assert chosen == [fused]


def test_pieces_need_whole_blocks():
    query, key = jnp.zeros((1, 100, 1, 8)), jnp.zeros((1, 200, 1, 8))
    with pytest.raises(ValueError, match="200 tokens to divide by 2 pieces of whole 128s"):
        splash(query, key, key, None, causal=True, pieces=2, interpret=True)
