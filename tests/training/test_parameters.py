"""The flat dictionary of parameters: round trip, rules, splitting."""

import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.config import ModelConfig, model_config
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.parameters import Binding, abstract_model, multiplier, split_trainable
from kangaroo_jax.sharding import RULES


@pytest.fixture(scope="module")
def model(make_random_model) -> KangarooModel:
    return make_random_model(model_config("tiny"))


def test_flatten_and_bind_are_inverse(model):
    binding = Binding(model)
    params = binding.flatten(model)
    changed = {k: v + 1 for k, v in params.items()}
    again = binding.flatten(binding.bind(changed))
    assert list(again) == list(params)
    for name in params:
        np.testing.assert_array_equal(again[name], params[name] + 1)


def test_abstract_binding_equals_real(model):
    real, abstract = Binding(model), abstract_model(ModelConfig.from_config(model_config("tiny")))
    assert real.shapes == abstract.shapes
    assert real.axes == abstract.axes


def test_every_parameter_names_logical_axes_of_its_rank(model):
    binding = Binding(model)
    for path, axes in binding.axes.items():
        assert len(axes) == len(binding.shapes[path].shape), path
        assert all(axis is None or axis in RULES for axis in axes), path


def test_first_matching_rule_wins_and_no_rule_is_an_error():
    rules = (("vision/.*", 0.1), ("vision/norm", 1.0), ("llm/.*", None))
    assert multiplier("vision/norm", rules) == 0.1
    assert multiplier("llm/head", rules) is None
    with pytest.raises(UserError, match="projector/kernel"):
        multiplier("projector/kernel", rules)


def test_split_casts_frozen_only():
    params = {"a/kernel": jnp.ones(2), "b/kernel": jnp.ones(2)}
    trained, frozen = split_trainable(params, (("a/.*", 1.0), (".*", None)), "bfloat16")
    assert set(trained) == {"a/kernel"} and trained["a/kernel"].dtype == jnp.float32
    assert set(frozen) == {"b/kernel"} and frozen["b/kernel"].dtype == jnp.bfloat16
