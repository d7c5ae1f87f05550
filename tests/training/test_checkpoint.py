"""Checkpoints on their own: what is saved is what comes back, whatever the sizes of the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.checkpoints.reading import load_params
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training import array_writing
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState


def test_an_array_far_larger_than_all_others_is_saved_and_restored(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"large": (1024, 2048), "scalar": (), "small": (3,)}
    params = {k: jnp.asarray(rng.standard_normal(shape, np.float32)) for k, shape in shapes.items()}
    frozen = {"frozen_large": jnp.asarray(rng.standard_normal((4096, 512)), jnp.bfloat16)}
    state = TrainState(jnp.int32(5), params, frozen, {"mu": params, "count": jnp.int32(5)})
    checkpoints = Checkpoints(tmp_path, state)
    assert checkpoints.latest() is None
    checkpoints.save(state, b"\x00iterator", {"a": 1})
    checkpoints.close()

    other = jax.tree.map(jnp.zeros_like, state)  # so that nothing of what is found can come from what is given
    again = Checkpoints(tmp_path, other)
    assert again.latest() == 5
    restored, data = again.restore(other)
    again.close()
    assert data == b"\x00iterator" and int(restored.step) == 5 and int(restored.opt_state["count"]) == 5
    for found, saved in ((restored.params, params), (restored.frozen, frozen), (restored.opt_state["mu"], params)):
        assert found.keys() == saved.keys()
        for name in saved:
            np.testing.assert_array_equal(found[name], saved[name])


@pytest.mark.parametrize(("count", "mib"), [(100, 10), (10, 3), (0, 1)])
def test_a_tenth_of_an_item_is_written_at_a_time_or_three_arrays_where_they_are_more(count, mib, monkeypatch):
    """Arrays of 1 MiB."""
    handlers = []
    monkeypatch.setattr(array_writing.ocp, "StandardCheckpointHandler", lambda **given: handlers.append(given))
    array_writing.array_handler([jnp.zeros(2**18)] * count)
    assert handlers == [{"save_concurrent_gb": mib * 2**20 / 10**9}]


def test_weights_are_read_back_without_a_warning(tmp_path, micro_config, make_random_model, caplog):
    binding = abstract_model(ModelConfig.from_config(micro_config.model))
    params = binding.flatten(make_random_model(micro_config.model))
    state = TrainState(jnp.int32(1), params, {}, {"count": jnp.int32(0)})
    checkpoints = Checkpoints(tmp_path, state)
    checkpoints.save(state, b"", {})
    checkpoints.close()
    caplog.clear()
    found = load_params(tmp_path, binding)
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert found.keys() == params.keys()
    for name in params:
        np.testing.assert_array_equal(found[name], params[name])
