"""The step on a model of two numbers: the mean is over weights, parts add up, what comes back is what was done."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.training.step import TrainState, gradient, make_train_step, mean_loss

ROWS, TOKENS = 4, 6


class Line:
    """A model whose loss of a token is (slope * token + offset - target)^2; it stands for a `Binding` too."""

    axes = {"slope": (), "offset": ()}

    def bind(self, params):
        def loss(batch):
            error = params["slope"] * batch.tokens + params["offset"] - batch.targets
            return jnp.sum(batch.weights * error**2), jnp.sum(batch.weights)

        return types.SimpleNamespace(loss=loss)


def batch_of(weights: np.ndarray) -> PackedBatch:
    random, zeros = np.random.default_rng(0), np.zeros((ROWS, TOKENS), np.int32)
    return PackedBatch(
        tokens=random.integers(0, 5, zeros.shape).astype(np.int32),
        segment_ids=zeros,
        positions=zeros,
        targets=random.integers(0, 5, zeros.shape).astype(np.int32),
        weights=weights.astype(np.float32),
        frames=np.zeros((ROWS, 0, 2, 2, 3), np.uint8),
        frame_times=np.zeros((ROWS, 0), np.float32),
        frame_groups=np.zeros((ROWS, 0), np.int32),
        vision_index=zeros - 1,
    )


UNEVEN = np.random.default_rng(1).choice([0.0, 0.5, 2.0], (ROWS, TOKENS)) * np.asarray([[1], [0], [2], [1]])
PARAMS, FROZEN = {"slope": np.float32(0.5)}, {"offset": np.float32(1.0)}


def expected(weights: np.ndarray) -> tuple[float, float]:
    """(loss, gradient by the slope), by hand."""
    batch = batch_of(weights)
    error = 0.5 * batch.tokens + 1.0 - batch.targets
    return (weights * error**2).sum() / weights.sum(), (2 * weights * error * batch.tokens).sum() / weights.sum()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mean_is_over_the_weights_where_they_are_few_and_of_less_than_one_over_one(accumulate):
    for total, over in ((1.5, 1.5), (0.5, 1.0)):
        weights = np.zeros((ROWS, TOKENS))
        weights[0, :2] = total / 2
        (loss, weight), _ = gradient(Line(), PARAMS, FROZEN, batch_of(weights), accumulate)
        assert float(weight) == total
        np.testing.assert_allclose(float(loss), expected(weights)[0] * total / over, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_loss_is_the_mean_over_weights_whatever_the_parts(accumulate):
    assert UNEVEN.sum() != (UNEVEN > 0).sum()
    (loss, weight), grads = gradient(Line(), PARAMS, FROZEN, batch_of(UNEVEN), accumulate)
    assert float(weight) == UNEVEN.sum() and set(grads) == {"slope"}
    np.testing.assert_allclose((loss, grads["slope"]), expected(UNEVEN), rtol=1e-6)


def test_a_batch_that_nothing_counts_in_has_no_loss_and_no_gradient():
    for accumulate in (1, 2):
        (loss, weight), grads = gradient(Line(), PARAMS, FROZEN, batch_of(np.zeros((ROWS, TOKENS))), accumulate)
        assert (float(loss), float(weight), float(grads["slope"])) == (0.0, 0.0, 0.0)


def test_mean_loss_is_what_the_gradient_is_of():
    loss, weight = mean_loss(Line(), PARAMS, FROZEN, batch_of(UNEVEN))
    np.testing.assert_allclose((loss, weight), (expected(UNEVEN)[0], UNEVEN.sum()), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_counts_itself_takes_the_update_and_keeps_what_is_frozen(accumulate):
    rate = lambda step: 0.1 / (1.0 + step)  # noqa: E731
    optimizer = optax.chain(optax.scale_by_schedule(lambda step: -rate(step)), optax.trace(decay=0.5))
    state = jax.tree.map(jnp.asarray, TrainState(np.int32(0), PARAMS, FROZEN, optimizer.init(PARAMS)))
    step, (loss, slope) = make_train_step(Line(), optimizer, rate, accumulate), expected(UNEVEN)
    new, metrics = step(state, batch_of(UNEVEN))
    assert int(new.step) == 1 and float(new.frozen["offset"]) == 1.0
    np.testing.assert_allclose(new.params["slope"], 0.5 - 0.1 * slope, rtol=1e-6)
    found = {name: float(value) for name, value in metrics.items()}
    wanted = {"loss": loss, "grad_norm": abs(slope), "learning_rate": 0.1, "target_weight": UNEVEN.sum()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    momentum = new.params["slope"] - 0.5
    kept = float(new.params["slope"])
    again, metrics = step(new, batch_of(UNEVEN))
    assert int(again.step) == 2 and float(metrics["learning_rate"]) == pytest.approx(0.05)
    error = kept * batch_of(UNEVEN).tokens + 1.0 - batch_of(UNEVEN).targets
    second = (2 * UNEVEN * error * batch_of(UNEVEN).tokens).sum() / UNEVEN.sum()
    moved = float(again.params["slope"]) - kept
    assert moved == pytest.approx(0.5 * float(momentum) - 0.05 * second, rel=1e-5)  # the optimiser's state is kept


@pytest.mark.parametrize(("accumulate", "parts"), [(1, False), (2, True)])
def test_a_batch_is_cut_only_where_it_is_asked_for(accumulate, parts):
    text = str(jax.make_jaxpr(lambda p: gradient(Line(), p, FROZEN, batch_of(UNEVEN), accumulate))(PARAMS))
    assert ("scan[" in text) == parts
