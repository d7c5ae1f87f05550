"""Chunked cross-entropy equals the plain one and never holds all the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.models.losses import chunked_cross_entropy
from kangaroo_jax.sharding import make_mesh
from tests.models.small import assert_trees_close

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 96, 8, 211


def operands(share_weighted, batch=BATCH, vocabulary=VOCABULARY, width=WIDTH):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(batch, LENGTH, width)), jnp.float32)
    head = jnp.asarray(random.normal(size=(width, vocabulary)), jnp.float32)
    targets = random.integers(0, vocabulary, (batch, LENGTH)).astype(np.int32)
    weights = random.uniform(0.5, 2.0, (batch, LENGTH)) * (random.random((batch, LENGTH)) < share_weighted)
    return hidden, head, targets, weights.astype(np.float32)


def plain(hidden, head, targets, weights):
    log = jax.nn.log_softmax(hidden @ head)
    return -jnp.sum(jnp.take_along_axis(log, targets[..., None], axis=-1)[..., 0] * weights)


@pytest.mark.parametrize("share", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("chunk", [7, 32, 500])
def test_value_and_gradients_equal_plain_cross_entropy(share, chunk):
    hidden, head, targets, weights = operands(share)
    chunked = lambda *x: 3 * chunked_cross_entropy(*x, targets, weights, chunk=chunk)[0]  # noqa: E731
    expected = lambda *x: 3 * plain(*x, targets, weights)  # noqa: E731
    actual, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head) for f in (chunked, expected))
    assert_trees_close(actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 2, 1, 4), 8), ((2, 1, 2, 2), 8), ((1, 4, 1, 2), 8), ((1, 2, 2, 2), 9)], ids=str
)
def test_a_vocabulary_cut_over_devices_gives_the_plain_value_and_gradients(shape, width):
    """Every piece of the vocabulary holds some of the targets; the loss and both gradients are sums over pieces.

    A width of 9 divides by no fsdp axis, so that the head is whole in that direction.
    """
    hidden, head, targets, weights = operands(0.6, batch=4, vocabulary=212, width=width)
    chunked = lambda *x: 3 * chunked_cross_entropy(*x, targets, weights, chunk=20)[0]  # noqa: E731
    expected = jax.value_and_grad(lambda *x: 3 * plain(*x, targets, weights), argnums=(0, 1))(hidden, head)
    with jax.set_mesh(make_mesh(shape, jax.devices()[:8])):
        actual = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
    assert_trees_close(actual, expected, 1e-5)


def test_the_second_result_is_the_sum_of_weights():
    hidden, head, targets, weights = operands(0.5)
    assert np.isclose(chunked_cross_entropy(hidden, head, targets, weights, chunk=16)[1], weights.sum())


def test_a_frozen_part_has_no_gradient_and_the_other_the_right_one():
    hidden, head, targets, weights = operands(0.5)
    for argument in (0, 1):
        loss = lambda *x: chunked_cross_entropy(*x, targets, weights, chunk=16)[0]  # noqa: E731
        expected = jax.grad(lambda *x: plain(*x, targets, weights), argnums=argument)(hidden, head)
        assert_trees_close(jax.grad(loss, argnums=argument)(hidden, head), expected, 1e-5)


def shapes_in(jaxpr):
    """The shape of every value in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (value.aval.shape for value in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_what_is_not_asked_for_is_not_computed():
    """Logits are one product; the gradient of the states and that of the head are one more each."""
    hidden, head, targets, weights = operands(1.0)
    loss = lambda *x: chunked_cross_entropy(*x, targets, weights, chunk=16)[0]  # noqa: E731
    products = lambda function: str(jax.make_jaxpr(function)(hidden, head)).count("dot_general[")  # noqa: E731
    assert products(loss) == 1
    assert [products(jax.grad(loss, argnums=which)) for which in (0, 1, (0, 1))] == [2, 2, 3]


def test_all_the_logits_never_exist():
    hidden, head, targets, weights = operands(1.0)
    step = jax.value_and_grad(lambda *x: chunked_cross_entropy(*x, targets, weights, chunk=8)[0], argnums=(0, 1))
    shapes = list(shapes_in(jax.make_jaxpr(step)(hidden, head).jaxpr))
    assert (BATCH, 8, VOCABULARY) in shapes
    assert not any(VOCABULARY in shape and np.prod(shape) > BATCH * 8 * VOCABULARY for shape in shapes)
    memory = jax.jit(step).lower(hidden, head).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * BATCH * LENGTH * VOCABULARY
