"""A head that is the token embedding: one tensor, whose gradient is the sum of both uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.models.parameters import Binding
from tests.models.small import assert_trees_close, gradients, pack, sample, small_config, small_model

MARKS = [6, 7, 8, 9]


def untied(tied):
    """The same model with a head of its own, in which the marks have their rows of the export."""
    model = small_model()
    ours, theirs = Binding(model), Binding(tied)
    params = dict(theirs.flatten(tied))
    table = jnp.asarray(params["llm/embedding"]).at[jnp.array(MARKS)].set(params["special_embedding"])
    return ours.bind({**params, "llm/head/kernel": table.T})


def batch():
    return pack([sample(0, 2, 20), sample(1, 0, 13)], 64, 4)


@pytest.mark.slow
def test_logits_and_loss_are_those_of_a_head_that_is_a_copy():
    tied = small_model(llm__tied_head=True)
    paths = Binding(tied).shapes
    assert "llm/head/kernel" not in paths and "llm/embedding" in paths
    other = untied(tied)
    np.testing.assert_allclose(tied.logits(batch()), other.logits(batch()), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tied.loss(batch())[0], other.loss(batch())[0], rtol=1e-6)


def test_the_gradient_is_the_sum_of_both_uses():
    """The sum is that of the copy's embedding and head, but in the marks' rows, which learn by their own embedding."""
    _, tied = gradients(batch(), llm__tied_head=True)
    other = untied(small_model(llm__tied_head=True))

    def mean_loss(model):
        loss, weight = model.loss(batch())
        return loss / weight

    both = nnx.grad(mean_loss)(other)
    expected = np.array(both.llm.embedding[...] + both.llm.head.kernel[...].T)
    expected[MARKS] = 0
    assert_trees_close(np.asarray(tied["llm"]["embedding"][...]), expected, 1e-5)
    assert_trees_close(tied["special_embedding"], both["special_embedding"], 1e-5)


def test_a_frozen_embedding_needs_no_gradient_of_the_head():
    """No array of the size of the head's gradient is made where the marks alone train."""
    model = small_model(llm__tied_head=True)
    params = Binding(model).flatten(model)

    def loss(marks):
        return Binding(small_model(llm__tied_head=True)).bind({**params, "special_embedding": marks}).loss(batch())[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(params["special_embedding"]))
    assert text.count("bt,btv->dv") == 0 and "while" in text
    width, vocabulary = 24, 67
    loops = [line for line in text.splitlines() if "while[" in line]
    assert not any(f"f32[{width},{vocabulary}] " in line.split("=")[0] for line in loops)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_counted_once(tied):
    config = small_config(llm__tied_head=tied)
    head = 0 if tied else config.llm.vocab_size * config.llm.width
    assert count_parameters(config)["llm"] - head == count_parameters(small_config(llm__tied_head=True))["llm"]
