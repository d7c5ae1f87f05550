"""AdamW against the published formula, the schedule, decay and the rates of groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kangaroo_jax.config import ModelConfig, OptimizerConfig, model_config
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.optimizer import decayed, make_optimizer, make_schedule


def optimizer_config(**changes):
    return dataclasses.replace(OptimizerConfig(), **changes)


def test_schedule_warms_up_to_the_peak_and_ends_at_the_final_fraction():
    schedule = make_schedule(optimizer_config(learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.1), 100)
    assert np.isclose(schedule(10), 2.0)
    assert schedule(0) > 0
    assert np.isclose(schedule(100), 0.2)
    assert np.isclose(schedule(55), 0.2 + 1.8 * 0.5)


def test_update_is_adamw_with_each_groups_rate():
    """Loshchilov & Hutter, algorithm 2, first step: m/(1-b1)=g, v/(1-b2)=g^2, so Adam's part is sign(g)."""
    config = optimizer_config(
        learning_rate=0.1,
        warmup_fraction=0.0,
        weight_decay=0.5,
        clip_norm=1e9,
        trainable=(("slow/.*", 0.25), (".*", 1.0)),
    )
    params = {"fast/kernel": jnp.array([2.0, -4.0]), "slow/kernel": jnp.array([2.0]), "fast/bias": jnp.array([3.0])}
    grads = {"fast/kernel": jnp.array([1.0, -3.0]), "slow/kernel": jnp.array([5.0]), "fast/bias": jnp.array([-1.0])}
    optimizer = make_optimizer(config, 10, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    rate = float(make_schedule(config, 10)(0))
    np.testing.assert_allclose(updates["fast/kernel"], [-rate * (1 + 1.0), -rate * (-1 - 2.0)], rtol=1e-5)
    np.testing.assert_allclose(updates["slow/kernel"], [-0.25 * rate * (1 + 1.0)], rtol=1e-5)
    np.testing.assert_allclose(updates["fast/bias"], [rate], rtol=1e-5)  # no decay


def test_adams_epsilon_is_that_of_the_config():
    config = optimizer_config(eps=1.0, weight_decay=0.0, clip_norm=0.0, warmup_fraction=0.0)
    params, grads = {"a/kernel": jnp.zeros(2)}, {"a/kernel": jnp.array([1.0, -3.0])}
    optimizer = make_optimizer(config, 10, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    rate = float(make_schedule(config, 10)(0))
    np.testing.assert_allclose(updates["a/kernel"], [-rate / 2, rate * 3 / 4], rtol=1e-5)  # g / (|g| + eps)


def test_clipping_is_by_the_global_norm():
    config = optimizer_config(clip_norm=1.0, weight_decay=0.0)
    params = {"a/kernel": jnp.zeros(1), "b/kernel": jnp.zeros(1)}
    big = {"a/kernel": jnp.array([300.0]), "b/kernel": jnp.array([400.0])}
    small = {"a/kernel": jnp.array([0.6]), "b/kernel": jnp.array([0.8])}
    optimizer = make_optimizer(config, 10, params)
    _, one = optimizer.update(big, optimizer.init(params), params)
    _, two = optimizer.update(small, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.get(one, "mu")["a/kernel"], optax.tree.get(two, "mu")["a/kernel"], rtol=1e-5)


def test_norms_biases_and_embeddings_of_position_are_not_decayed():
    model = abstract_model(ModelConfig.from_config(model_config("tiny")))
    kept = {path.split("/")[-1] for path, flag in decayed(model.shapes).items() if not flag}
    assert kept == {"bias", "scale", "position_embedding", "cls_token", "special_embedding"}
    touched = {path.split("/")[-1] for path, flag in decayed(model.shapes).items() if flag}
    assert touched == {"kernel", "embedding"}


def test_moments_in_bfloat16_take_half_the_memory_and_nearly_the_same_steps():
    params = {"a/kernel": jnp.linspace(-1, 1, 256).reshape(16, 16)}
    moved = {}
    for dtype in ("float32", "bfloat16"):
        config = optimizer_config(learning_rate=1e-2, weight_decay=0.0, warmup_fraction=0.0, moment_dtype=dtype)
        optimizer = make_optimizer(config, 20, params)

        @jax.jit
        def take(now, state, step, optimizer=optimizer):
            grads = {"a/kernel": jnp.cos(now["a/kernel"] * (step + 1))}
            updates, state = optimizer.update(grads, state, now)
            return optax.apply_updates(now, updates), state

        state, now = optimizer.init(params), params
        moments = [x for x in jax.tree.leaves(state) if x.shape == (16, 16)]
        assert len(moments) == 2 and all(x.dtype == dtype for x in moments)
        for step in range(20):
            now, state = take(now, state, step)
        assert all(x.dtype == dtype for x in jax.tree.leaves(state) if x.shape == (16, 16))
        moved[dtype] = np.asarray(now["a/kernel"] - params["a/kernel"])
    assert np.abs(moved["float32"]).max() > 0.02
    assert np.abs(moved["bfloat16"] - moved["float32"]).max() < 0.05 * np.abs(moved["float32"]).max()


def test_adafactor_learns_with_a_state_of_rows_and_columns():
    config = optimizer_config(kind="adafactor", learning_rate=3e-2, weight_decay=0.0)
    params = {"a/kernel": jnp.ones((256, 128))}
    optimizer = make_optimizer(config, 50, params)
    state, start = optimizer.init(params), params
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.02 * 256 * 128
    loss = lambda p: jnp.mean(jnp.square(p["a/kernel"] - 0.3))  # noqa: E731

    @jax.jit
    def take(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(50):
        params, state = take(params, state)
    assert loss(params) < 0.2 * loss(start)


def test_muon_takes_orthogonal_steps_of_adams_size_inside_the_network_and_adams_elsewhere():
    """Against the polar factor of the gradient by SVD; Newton-Schulz brings singular values to 0.7 to 1.2 of 1."""
    config = optimizer_config(kind="muon", learning_rate=1.0, weight_decay=0.0, warmup_fraction=0.0, clip_norm=1e9)
    shapes = {"llm/layers/attention/out/kernel": (2, 4, 8, 24), "llm/layers/mlp/up/kernel": (2, 24, 40)}
    shapes |= {"projector/first/kernel": (12, 24), "llm/head/kernel": (24, 60), "llm/layers/mlp_norm/scale": (2, 24)}
    random = np.random.default_rng(0)
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    gradient = {path: jnp.asarray(random.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    optimizer = make_optimizer(config, 10, params)
    updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    matrices = {"llm/layers/attention/out/kernel": (2, 32, 24), "llm/layers/mlp/up/kernel": (2, 24, 40)}
    for path, shape in (matrices | {"projector/first/kernel": (1, 12, 24)}).items():
        for step, grad in zip(updates[path].reshape(shape), gradient[path].reshape(shape), strict=True):
            size = 0.2 * max(shape[1:]) ** 0.5
            u, _, v = np.linalg.svd(grad, full_matrices=False)
            np.testing.assert_allclose(np.linalg.svd(step, compute_uv=False), size, rtol=0.4)
            assert np.sum(-step * (u @ v)) > 0.98 * np.linalg.norm(step) * np.linalg.norm(u @ v)
    for path in ("llm/head/kernel", "llm/layers/mlp_norm/scale"):
        np.testing.assert_allclose(updates[path], -np.sign(gradient[path]), rtol=1e-3)
    moments = {path: x for path, x in jax.tree_util.tree_leaves_with_path(state) if x.ndim > 1}
    assert sum(x.size for x in moments.values()) == 2 * 4 * 8 * 24 + 2 * 24 * 40 + 12 * 24 + 2 * 24 * 60 + 2 * 2 * 24


@pytest.mark.parametrize("change", [{"kind": "sgd"}, {"moment_dtype": "int8"}])
def test_unknown_optimisers_are_one_line(change):
    config = optimizer_config(**change)
    with pytest.raises(UserError, match=next(iter(change.values()))):
        make_optimizer(config, 5, {"a/kernel": jnp.ones(3)})
