"""The kernels of TPU and GPU, interpreted on the CPU, and context parallelism: the plain formula, nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from kangaroo_jax.config import VisionConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models import attention as module
from kangaroo_jax.models import attention_frames, attention_splash
from kangaroo_jax.models.attention import attention
from kangaroo_jax.models.attention_context import halves_of
from kangaroo_jax.models.attention_splash import splash, visited_share
from kangaroo_jax.models.eva_clip import EvaClip
from kangaroo_jax.models.layers import rotate_pairs
from kangaroo_jax.sharding import make_mesh
from tests.models.test_attention import operands, plain, segments_of

KERNELS = {
    "splash": functools.partial(splash, interpret=True),
}
LENGTH = 200  # one block of 256, padded


def value_and_gradients(function, qkv, weight):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x) * weight), argnums=(0, 1, 2)))(*qkv)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_the_plain_formula_and_nothing_leaks(name):
    qkv, segments = operands(LENGTH, heads=2, kv_heads=1), jnp.asarray(segments_of(LENGTH))
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(LENGTH, dtype=bool)
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)
    run = lambda *x: KERNELS[name](*x, (segments, segments), causal=True)  # noqa: E731
    actual, expected = (
        value_and_gradients(run, qkv, weight),
        value_and_gradients(lambda *x: plain(*x, mask), qkv, weight),
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    query, key, value = qkv
    other = (segments == 1)[..., None, None]
    changed = run(query, jnp.where(other, 9.0, key), jnp.where(other, -9.0, value))
    kept = np.asarray(segments != 1)
    np.testing.assert_array_equal(np.asarray(run(*qkv))[kept], np.asarray(changed)[kept])


def test_splash_of_frames_ignores_its_own_padding_and_the_two_kernels_of_the_backward_agree(monkeypatch):
    qkv = operands(65, heads=2, kv_heads=2)  # like a ViT's odd number of tokens, no segments
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)
    run = lambda *x: KERNELS["splash"](*x, None, causal=False)  # noqa: E731
    expected = value_and_gradients(lambda *x: plain(*x, None), qkv, weight)
    for share in (attention_splash.FUSED_SHARE, 0):
        monkeypatch.setattr(attention_splash, "FUSED_SHARE", share)
        for a, b in zip(jax.tree.leaves(value_and_gradients(run, qkv, weight)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("tokens", [300, 384])
def test_kernels_of_frames_equal_the_plain_formula_and_ignore_their_padding(monkeypatch, tokens):
    monkeypatch.setattr(attention_frames, "QUERIES", 256)  # two parts, of which one is shorter
    padded, heads = 384, 4
    random = np.random.default_rng(0)
    qkv = [jnp.asarray(random.normal(size=(2, padded, heads * 64)), jnp.float32) for _ in range(3)]
    weight = random.normal(size=qkv[0].shape) * (np.arange(padded) < tokens)[:, None]
    angles = random.normal(size=(padded, 32)).astype(np.float32)
    tables = np.cos(angles), np.sin(angles)

    def expected(*qkv):
        query, key, value = (x.reshape(2, padded, heads, 64)[:, :tokens] for x in qkv)
        query, key = (rotate_pairs(x, *(table[:tokens] for table in tables)) for x in (query, key))
        y = plain(query, key, value, None).reshape(2, tokens, -1)
        return jnp.pad(y, [(0, 0), (0, padded - tokens), (0, 0)])

    def run(*qkv):
        in_turns = jnp.stack([x.reshape(2, padded, -1, 128) for x in qkv], axis=3).reshape(2, padded, -1)
        return attention_frames.frames(in_turns, *tables, tokens, interpret=True)

    found, value = value_and_gradients(run, qkv, weight), value_and_gradients(expected, qkv, weight)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(value), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_an_encoder_of_heads_of_64_is_the_same_with_the_kernels_of_frames(monkeypatch):
    config = VisionConfig(width=128, heads=2, depth=2, mlp_width=64, patch_size=14, pos_embed_grid=2)
    frames = np.random.default_rng(0).integers(0, 255, (8, 28, 28, 3), np.uint8)

    def run(attention):
        encoder = EvaClip(config, rngs=nnx.Rngs(0), attention=attention)
        return nnx.jit(lambda encoder: encoder(frames))(encoder)

    expected = run("xla_chunked")
    monkeypatch.setitem(module.PLATFORMS, "splash", ("cpu",))
    calls = []
    real = functools.partial(attention_frames.frames, interpret=True)
    monkeypatch.setattr(attention_frames, "frames", lambda *x: calls.append(1) or real(*x))
    with jax.set_mesh(make_mesh((1, 8, 1, 1))):
        found = run("splash")
    assert calls
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_splash_skips_other_segments_and_changes_no_bit(monkeypatch, fused):
    """Two rows of four blocks, grouped heads: equal to the plain formula, and to the bit to visiting all blocks."""
    monkeypatch.setattr(attention_splash, "BLOCKS", (128,))
    monkeypatch.setattr(attention_splash, "FUSED_SHARE", 1 / 8 if fused else 0)
    length = 512
    qkv = operands(length, heads=2, kv_heads=1)
    segments = np.zeros((2, length), np.int32)
    for row, cuts in enumerate(((0, 150, 256, 300, 470), (0, 384, 400))):
        segments[row] = (np.arange(length)[:, None] >= cuts).sum(axis=1)
    segments[:, 500:] = 0  # padding
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)
    ids = (jnp.asarray(segments),) * 2
    sizes = attention_splash.block_sizes(length, length, True, fused)
    assert sizes.block_kv == 128
    counts = [
        attention_splash.visited_blocks(attention_splash.begins_of(row), jnp.arange(length), 128, 128).sum()
        for row in ids[0]
    ]
    assert counts == [6, 7]  # 10 by order alone
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)
    run = lambda *x: KERNELS["splash"](*x, ids, causal=True)  # noqa: E731
    actual = value_and_gradients(run, qkv, weight)
    for a, b in zip(
        jax.tree.leaves(actual),
        jax.tree.leaves(value_and_gradients(lambda *x: plain(*x, mask), qkv, weight)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-4)
    monkeypatch.setattr(attention_splash, "begins_of", jnp.zeros_like)  # every row is taken for one segment
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(value_and_gradients(run, qkv, weight)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_heads_in_groups_change_no_bit(monkeypatch):
    """Two of them, as where all query gradients of a row would take twice the bytes that they may."""
    monkeypatch.setattr(attention_splash, "BLOCKS", (128,))
    qkv = operands(256, heads=4, kv_heads=4)
    ids = (jnp.asarray(np.arange(256) >= np.asarray([[100], [200]]), jnp.int32),) * 2
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)
    run = lambda *x: KERNELS["splash"](*x, ids, causal=True)  # noqa: E731
    together = value_and_gradients(run, qkv, weight)
    gradients = qkv[0][:1].nbytes * 2
    monkeypatch.setattr(attention_splash, "_fused_bytes", lambda: gradients / 2)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(value_and_gradients(run, qkv, weight)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("queries", "fused"),
    [(256, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((256, False), (128, True)))],
)
def test_rows_of_a_device_are_each_computed_as_if_alone(monkeypatch, queries, fused):
    """To the bit, values and gradients, and without a loop, which would copy every operand of the kernels."""
    monkeypatch.setattr(attention_splash, "BLOCKS", (128,))
    monkeypatch.setattr(attention_splash, "FUSED_SHARE", 1 / 8 if fused else 0)
    query, key, value = operands(256, heads=2, kv_heads=1)
    qkv = (query[:, :queries], key, value)
    segments = jnp.asarray(np.arange(256) >= np.asarray([[100], [200]]), jnp.int32)
    positions = None if queries == 256 else jnp.concatenate([jnp.arange(64), jnp.arange(192, 256)])
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)

    def run(rows):
        ids = (segments[rows][:, :queries] if positions is None else segments[rows][:, positions], segments[rows])
        function = lambda *x: KERNELS["splash"](*x, ids, causal=True, positions=positions)  # noqa: E731
        loss = lambda *x: jnp.sum(function(*x) * weight[rows])  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1, 2)), [x[rows] for x in qkv]

    together, given = run(slice(None))
    assert not {"while", "scan"} & primitives(jax.make_jaxpr(together)(*given).jaxpr)
    _, gradients = jax.jit(together)(*given)
    for row in range(2):
        alone, given = run(slice(row, row + 1))
        for a, b in zip(gradients, jax.jit(alone)(*given)[1], strict=True):
            np.testing.assert_array_equal(a[row : row + 1], b)


def primitives(jaxpr) -> set[str]:
    """Names of the primitives of a program, but for what kernels do inside."""
    found = {equation.primitive.name for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                found |= primitives(inner)
    return found


def test_splash_of_several_blocks_without_order_visits_them_all(monkeypatch):
    monkeypatch.setattr(attention_splash, "BLOCKS", (128,))
    monkeypatch.setattr(attention_splash, "WHOLE", 0)
    qkv = [x[:1] for x in operands(384, heads=1, kv_heads=1)]
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)
    actual = value_and_gradients(lambda *x: KERNELS["splash"](*x, None, causal=False), qkv, weight)
    expected = value_and_gradients(lambda *x: plain(*x, None), qkv, weight)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_every_device_does_the_same_share_of_causal_attention(pieces):
    halves = [halves_of(i, pieces) for i in range(pieces)]
    assert sorted(h for pair in halves for h in pair) == list(range(2 * pieces))
    assert len({sum(pair) for pair in halves}) == 1
    length = 256 * 2 * pieces * 8
    alone, busiest = visited_share(length, length, True), visited_share(length // pieces, length, True, pieces)
    assert 0.5 < alone < 0.6 and abs(busiest - alone) < 0.05


@pytest.mark.parametrize("implementation", ["xla_chunked", "splash"])
@pytest.mark.parametrize("shape", [(1, 2, 4, 1), (2, 1, 2, 2)], ids=str)
def test_context_parallel_equals_the_plain_formula_and_nothing_leaks(monkeypatch, shape, implementation):
    """Splash, interpreted, with a quarter or half of the queries of a row on a device; segments cross devices."""
    if implementation == "splash":
        if shape[2] == 4:
            pytest.skip("interpreting is slow: one mesh is enough")
        monkeypatch.setattr(attention_splash, "splash", KERNELS["splash"])
        monkeypatch.setitem(module.PLATFORMS, "splash", ("cpu",))
    length = 512 if implementation == "splash" else 72
    qkv, segments = operands(length, heads=2, kv_heads=2), jnp.asarray(segments_of(length, seed=2))
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)
    weight = np.random.default_rng(1).normal(size=qkv[0].shape)
    run = lambda *x: attention(*x, segment_ids=(segments, segments), causal=True, implementation=implementation)  # noqa: E731
    expected = value_and_gradients(lambda *x: plain(*x, mask), qkv, weight)
    with jax.set_mesh(make_mesh(shape, jax.devices()[:8])):
        actual = value_and_gradients(run, qkv, weight)
        other = (segments == 1)[..., None, None]
        query, key, value = qkv
        before, after = (jax.jit(run)(*x) for x in (qkv, (query, jnp.where(other, 9.0, key), value)))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    kept = np.asarray(segments != 1)
    np.testing.assert_array_equal(np.asarray(before)[kept], np.asarray(after)[kept])
    assert np.abs(np.asarray(before - after)[~kept]).max() > 0.01


@pytest.mark.parametrize("length", [8192, 10_240, 13_312, 26_624, 466_944])  # of the stages, and of an hour
def test_little_is_computed_beyond_the_causal_half(length):
    assert visited_share(length, length, True) <= 0.5 * (1 + 1 / 16)
    assert visited_share(length, length, False) == 1


def test_more_devices_than_key_value_heads(monkeypatch):
    qkv, local, held = operands(32, heads=4, kv_heads=2), module._local, []
    monkeypatch.setattr(module, "_local", lambda *x: held.append((x[1].shape, x[2].shape)) or local(*x))
    run = lambda *x: attention(*x, segment_ids=None, causal=True)  # noqa: E731
    with jax.set_mesh(make_mesh((1, 2, 1, 4), jax.devices()[:8])):
        actual = jax.jit(run)(*qkv)
    np.testing.assert_allclose(actual, plain(*qkv, np.tri(32, dtype=bool)[None]), atol=1e-5)
    assert held == [((1, 32, 1, 8), (1, 32, 1, 8))]  # a row and a head each, and not the whole on every device


def test_what_would_not_honour_segments_refuses():
    qkv, segments = operands(32), (np.zeros((2, 32), np.int32), np.ones((2, 32), np.int32))
    with pytest.raises(UserError, match="cudnn.*segments"):
        attention(*qkv, segment_ids=segments, causal=True, implementation="cudnn")
    with pytest.raises(UserError, match="splash.*does not run on this device"):
        attention(*qkv, segment_ids=segments, causal=True, implementation="splash")


@pytest.mark.parametrize("name", ["triton", "splash"])
def test_segments_that_differ_are_refused_by_a_kernel_that_knows_one(monkeypatch, name):
    monkeypatch.setitem(module.PLATFORMS, name, ("cpu",))
    segments = (np.zeros((2, 32), np.int32), np.ones((2, 32), np.int32))
    with pytest.raises(UserError, match=f"{name}.*one array of segments"):
        attention(*operands(32), segment_ids=segments, causal=True, implementation=name)
