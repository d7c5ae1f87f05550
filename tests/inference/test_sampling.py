"""Sampling against numpy, and against what was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import sampling
from kangaroo_jax.inference.sampling import Sampling

nucleus, sample = jax.jit(sampling.nucleus), jax.jit(sampling.sample)


def numpy_nucleus(logits: np.ndarray, top_p: float) -> dict[int, float]:
    """Token -> probability within the nucleus of one row, the slow way."""
    probabilities = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    kept, total = {}, 0.0
    for token in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        kept[token] = probabilities[token]
        total += probabilities[token]
        if total >= top_p:
            break
    return {token: p / total for token, p in kept.items()}


def keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0.01, 0.99))
def test_nucleus_is_numpys(seed, top_p):
    logits = np.random.default_rng(seed).normal(size=(3, 50)).astype(np.float32) * 3
    ordered, order = nucleus(logits, top_p)
    for row in range(3):
        want = numpy_nucleus(logits[row], top_p)
        kept = np.isfinite(np.asarray(ordered[row]))
        have = set(np.asarray(order[row])[kept].tolist())
        # the cumulative sums are float32: a token that lies on the edge may fall on either side
        assert len(have ^ set(want)) <= 1
        np.testing.assert_array_equal(np.asarray(ordered[row])[kept], logits[row][np.asarray(order[row])[kept]])


def test_frequencies_are_those_of_the_nucleus():
    logits = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05], np.float32))
    count = 20_000
    drawn = sample(jnp.tile(jnp.asarray(logits), (count, 1)), keys(0, count), 2.0, 0.7)
    want = numpy_nucleus(logits / 2, 0.7)
    frequencies = np.bincount(np.asarray(drawn), minlength=5) / count
    for token in range(5):
        assert abs(frequencies[token] - want.get(token, 0.0)) < 4 * (0.25 / count) ** 0.5
    assert set(want) == {0, 2, 3}


def test_greedy_takes_the_first_of_the_largest_and_ignores_keys():
    logits = jnp.array([[0.0, 5.0, 5.0], [1.0, 0.0, -2.0]])
    for seed in range(3):
        np.testing.assert_array_equal(sample(logits, keys(seed, 2), 0.0, 0.5), [1, 0])


def test_a_tiny_top_p_is_greedy_and_top_p_of_one_keeps_everything():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 30)), jnp.float32)
    np.testing.assert_array_equal(sample(logits, keys(1, 64), 5.0, 1e-6), np.argmax(logits, axis=-1))
    assert np.isfinite(np.asarray(nucleus(logits, 1.0)[0])).all()


def test_the_same_key_gives_the_same_token_and_rows_are_independent():
    logits = jnp.zeros((8, 100))
    first = np.asarray(sample(logits, keys(3, 8), 1.0, 1.0))
    np.testing.assert_array_equal(first, sample(logits, keys(3, 8), 1.0, 1.0))
    assert len(set(first.tolist())) > 4
    assert (first != np.asarray(sample(logits, keys(4, 8), 1.0, 1.0))).any()


@pytest.mark.parametrize(
    "values", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_values_out_of_range_are_one_line(values):
    with pytest.raises(UserError, match=next(iter(values))) as error:
        Sampling(**values)
    assert "\n" not in str(error.value)
