"""Rotary and temporal encodings, norms and the position resize against numpy; stacked layers and their axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.models import layers
from kangaroo_jax.models.eva_clip import normalise, resize_matrix
from kangaroo_jax.models.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    RopeScaling,
    lookup,
    product,
    rotary_1d,
    rotary_2d,
    rotary_frequencies,
    rotate_half,
    rotate_pairs,
    side_by_side,
)
from kangaroo_jax.models.patchify import Projector, time_encoding
from kangaroo_jax.models.stack import keep, run_layers, stack_layers
from kangaroo_jax.sharding import constrain, make_mesh, sharding


def test_time_encoding_is_the_sinusoid_of_the_seconds():
    seconds, width, theta = np.asarray([0.0, 0.04, 1.0, 159.96]), 12, 10_000.0
    encoding = time_encoding(jnp.asarray(seconds), width, theta)
    for i in range(width // 2):
        angle = seconds / theta ** (2 * i / width)
        np.testing.assert_allclose(encoding[:, 2 * i], np.sin(angle), atol=2e-5)
        np.testing.assert_allclose(encoding[:, 2 * i + 1], np.cos(angle), atol=2e-5)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_angles_are_those_of_float64_to_the_end_of_an_hour(theta):
    positions = np.asarray([0, 1, 2, 8191, 26_623, 466_943, 1_048_575, 2**21 - 1])
    angles = positions[:, None] * theta ** -(np.arange(0, 128, 2) / 128)
    cos, sin = jax.jit(lambda p: rotary_1d(p, 128, theta))(jnp.asarray(positions[None], jnp.int32))
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(angles), atol=1e-6)


def test_rotary_products_depend_on_the_distance_alone():
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(i, j):
        turned = [rotate_half(x, *rotary_1d(jnp.asarray([[p]]), 16, 500_000.0)) for x, p in ((query, i), (key, j))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert np.isclose(product(3, 1), product(1003, 1001), atol=1e-3)
    assert not np.isclose(product(3, 1), product(3, 2), atol=1e-3)


def test_a_scaled_pair_is_slowed_down_by_how_often_it_turns_within_the_original_length():
    """Half-way between 1 and 4 turns, above 4, and below 1 (Llama 3.1)."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=1000)
    for turns, kept in ((2.5, 0.5), (1.75, 0.25), (4.5, 1.0), (0.9, 0.0)):
        frequency = 2 * np.pi * turns / 1000
        found = rotary_frequencies(4, frequency**-2.0, scaling)
        np.testing.assert_allclose(found, [1.0, frequency * (kept + (1 - kept) / 8)], rtol=1e-6)


def test_pairs_turn_with_the_row_then_with_the_column():
    cos, sin = rotary_2d(3, 8, 10_000.0, 6)
    assert cos.shape == (9, 4)
    unit = np.zeros((1, 9, 1, 8), np.float32)
    unit[..., 0] = 1.0
    turned = np.asarray(rotate_pairs(unit, cos, sin))[0, :, 0]
    for patch in range(9):
        angle = (patch // 3) / 3 * 6
        np.testing.assert_allclose(turned[patch, :2], [np.cos(angle), np.sin(angle)], atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_2d(3, 6, 10_000.0, 6)


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpu_turns_pairs_by_a_product_and_to_the_same_values(monkeypatch, dtype, heads):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 9, heads, 64)), dtype)
    weight = random.normal(size=x.shape)
    grid = rotary_2d(3, 64, 10_000.0, 16)
    row = rotary_1d(jnp.asarray(random.integers(0, 30_000, (2, 9))), 64, 10_000.0)

    def results() -> list[np.ndarray]:
        found = []
        for turn, tables in ((rotate_pairs, grid), (rotate_half, row)):
            turned = lambda x, turn=turn, tables=tables: turn(x, *tables)  # noqa: E731
            found += [turned(x), jax.grad(lambda x, turned=turned: jnp.sum(turned(x) * weight))(x)]
        return [np.asarray(one, np.float32) for one in found]

    expected = results()
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    for found, value in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6 if dtype == "float32" else 0.02)


def test_norms():
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 16)).astype(np.float32)
    options = dict(eps=1e-6, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    y = LayerNorm(16, **options)(x)
    np.testing.assert_allclose(y, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), atol=1e-4)
    y = RMSNorm(16, **options)(x)
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True)), atol=1e-4)
    assert RMSNorm(16, **options)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_tpu_sums_for_a_norm_in_one_pass_and_to_the_same_values(monkeypatch):
    norm = LayerNorm(16, eps=1e-6, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    x = np.random.default_rng(0).normal(20.0, 3.0, (5, 16)).astype(np.float32)
    x[0] = 7.0  # without any variance
    weight = np.random.default_rng(1).normal(size=x.shape)
    results = lambda: (norm(x), jax.grad(lambda x: jnp.sum(norm(x) * weight[1:]))(x[1:]))  # noqa: E731
    expected = results()
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    for found, value in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_tpu_a_product_is_normalised_afterwards_and_means_the_same(monkeypatch, dtype):
    random = np.random.default_rng(0)
    options = dict(rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    norm, linear = LayerNorm(16, eps=1e-6, **options), Linear((16,), (8,), ("mlp", "embed"), bias=True, **options)
    for weight in (norm.scale, norm.bias, linear.bias):
        weight[...] = jnp.asarray(random.normal(size=weight.shape), jnp.float32)
    x = jnp.asarray(random.normal(3.0, 2.0, (40, 16)), dtype)
    weight = random.normal(size=(40, 8))
    graph, state = nnx.split((norm, linear))

    def results():
        def loss(state, x):
            norm, linear = nnx.merge(graph, state)
            y = norm.before(linear, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)) * weight), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    expected = results()
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(LayerNorm, "__call__", None)  # nothing is normalised before
    found = results()
    scale = lambda x: np.abs(np.asarray(x, np.float32)).max()  # noqa: E731
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = (1e-5 if dtype == jnp.float32 else 2e-2) * max(scale(b), 1.0)
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)
    linear.lora_a, linear.lora_b = nnx.Param(jnp.ones((16, 2))), nnx.Param(jnp.ones((2, 8)))
    monkeypatch.undo()
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    np.testing.assert_array_equal(norm.before(linear, x), linear(norm(x)))


@pytest.mark.parametrize("ranked", [False, True])
def test_what_several_maps_make_takes_turns(ranked):
    random = np.random.default_rng(0)
    options = dict(rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    maps = nnx.List([Linear((6,), (4, 2), ("embed", "heads", "head_dim"), bias=i != 1, **options) for i in range(3)])
    for each in (maps[0], maps[2]):
        each.bias[...] = jnp.asarray(random.normal(size=(4, 2)), jnp.float32)
    if ranked:
        maps[1].lora_a, maps[1].lora_b = (
            nnx.Param(jnp.asarray(random.normal(size=shape), jnp.float32)) for shape in ((6, 3), (3, 4, 2))
        )
    x = random.normal(size=(3, 5, 6)).astype(np.float32)
    weight = random.normal(size=(3, 5, 24))
    graph, state = nnx.split(maps)

    def one_after_another(maps):
        apart = [each(x).reshape(3, 5, 8) for each in maps]  # four outputs of each: two heads
        return jnp.concatenate([y[..., first : first + 4] for first in (0, 4) for y in apart], axis=-1)

    def results(make):
        loss = lambda state: jnp.sum(jnp.sin(make(nnx.merge(graph, state))) * weight)  # noqa: E731
        return make(maps), jax.grad(loss)(state)

    found, expected = results(lambda maps: side_by_side(tuple(maps), x, 4)), results(one_after_another)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_resizing_a_grid():
    shrink, grow = resize_matrix(8, 4), resize_matrix(4, 8)
    for matrix in (shrink, grow):
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(resize_matrix(5, 5), np.eye(25), atol=1e-7)
    ramp = np.repeat(np.arange(16.0), 16)
    inner = (resize_matrix(16, 8) @ ramp).reshape(8, 8)[2:6]
    np.testing.assert_allclose(inner, np.repeat([[4.5], [6.5], [8.5], [10.5]], 8, axis=1), atol=1e-4)  # means of pairs


def test_pixels_are_normalised_with_the_statistics_of_clip():
    pixels = normalise(np.asarray([[0, 0, 0], [255, 255, 255], [128, 128, 128]], np.uint8))
    np.testing.assert_allclose(pixels[1, 0], (1 - 0.48145466) / 0.26862954, rtol=1e-5)
    np.testing.assert_allclose(pixels[0, 2], -0.40821073 / 0.27577711, rtol=1e-5)


def test_linear_projector():
    projector = Projector("linear", 6, 10, rngs=nnx.Rngs(0))
    assert projector.second is None
    assert projector(jnp.ones((2, 6))).shape == (2, 10)


def make_layer(rngs):
    return Linear((4,), (4,), ("embed", "mlp"), bias=True, rngs=rngs, param_dtype=jnp.float32)


@pytest.mark.parametrize("scan", [True, False])
def test_stacked_layers_run_one_after_another(scan):
    layers = stack_layers(make_layer, 3, rngs=nnx.Rngs(0))
    assert layers.kernel.axes == ("layers", "embed", "mlp") and layers.bias.axes == ("layers", "mlp")
    kernels = np.asarray(layers.kernel[...])
    assert not np.allclose(kernels[0], kernels[1])
    x = np.ones((2, 4), np.float32)
    y, seen = run_layers(
        layers,
        lambda layer, carry, index: (layer(carry[0]), carry[1] * 10 + index),
        (jnp.asarray(x), jnp.asarray(0)),
        scan=scan,
        remat="none",
    )
    np.testing.assert_allclose(y, x @ kernels[0] @ kernels[1] @ kernels[2], atol=1e-5)
    assert int(seen) == 12  # indices 0, 1, 2 in order


def test_unknown_names_raise():
    layers = stack_layers(make_layer, 2, rngs=nnx.Rngs(0))
    with pytest.raises(KeyError, match="some"):
        run_layers(layers, lambda layer, x, index: layer(x), jnp.ones((1, 4)), scan=True, remat="some")
    with pytest.raises(ValueError, match="keep"):
        keep(jnp.ones(1), "keep")


def saved_bytes(policy):
    layers = stack_layers(make_layer, 8, rngs=nnx.Rngs(0))

    def loss(x):
        step = lambda layer, x, index: jnp.sin(layer(jnp.sin(layer(x))))  # noqa: E731
        return jnp.sum(run_layers(layers, step, x, scan=True, remat=policy))

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((1024, 4))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_remat_saves_memory():
    assert saved_bytes("full") < saved_bytes("dots") < saved_bytes("none")


def test_where_tokens_are_cut_weights_are_joined_and_their_gradients_cut_again():
    layer = Linear((64,), (32,), ("embed", "mlp"), bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    graph, weights = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (1, 256, 64))

    def gradient(weights, x):
        def loss(weights):
            y = nnx.merge(graph, weights)(constrain(x, ("batch", "tokens", None)))
            return jnp.mean(jnp.sin(constrain(y, ("batch", "tokens", "mlp"))))

        return jax.grad(loss)(weights)

    expected = jax.jit(gradient)(weights, x)["kernel"][...]
    mesh = make_mesh((1, 1, 4, 2))
    with jax.set_mesh(mesh):
        cut = sharding(mesh, ("embed", "mlp"))
        cut_weights = jax.tree.map(lambda w: jax.device_put(w, cut), weights)
        found = jax.jit(gradient)(cut_weights, jax.device_put(x, sharding(mesh, ("batch", "tokens", None))))
    np.testing.assert_allclose(found["kernel"][...], expected, atol=1e-6)
    assert found["kernel"][...].sharding.is_equivalent_to(cut, 2)


@pytest.mark.parametrize("vocabulary", [68, 67])  # cut over the tensor axis, or whole where it does not divide
@pytest.mark.parametrize("shape", [(1, 2, 1, 4), (1, 2, 2, 2), (2, 1, 4, 1)], ids=str)
def test_rows_of_a_table_cut_over_devices_are_found_and_get_their_gradients(shape, vocabulary):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(vocabulary, 8)), jnp.float32)
    tokens = random.permutation(np.arange(4 * 20) % vocabulary).reshape(4, 20).astype(np.int32)
    weight = random.normal(size=(4, 20, 8)).astype(np.float32)
    loss = lambda table: jnp.sum(lookup(table, tokens, jnp.float32) * weight)  # noqa: E731
    expected = np.zeros(table.shape, np.float32)
    np.add.at(expected, tokens, weight)
    with jax.set_mesh(make_mesh(shape, jax.devices()[:8])):
        found, gradient = jax.jit(lambda table: (lookup(table, tokens, jnp.float32), jax.grad(loss)(table)))(table)
    np.testing.assert_array_equal(found, np.asarray(table)[tokens])
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("inputs, outputs", [((24,), (4, 8)), ((4, 6), (16,))])
def test_products_of_bfloat16_are_summed_in_float32_on_a_cpu(inputs, outputs):
    """XLA uses the CPU's own products of bfloat16 only where float32 is asked for."""
    keys, contracted = jax.random.split(jax.random.key(0), 3), len(inputs)
    x, kernel, weight = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, [(3, 5, *inputs), (*inputs, *outputs), (3, 5, *outputs)], strict=True)
    )

    def total(x, kernel):
        return jnp.sum(product(x, kernel, contracted).astype(jnp.float32) * weight.astype(jnp.float32))

    assert str(jax.make_jaxpr(jax.grad(total, (0, 1)))(x, kernel)).count("preferred_element_type=float32") == 3
    exact = [array.astype(jnp.float32) for array in (x, kernel)]
    for found, wanted in zip(jax.grad(total, (0, 1))(x, kernel), jax.grad(total, (0, 1))(*exact), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-8, atol=2**-8)
