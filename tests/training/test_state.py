"""The train state: what trains and what does not, zeros in the optimiser, and every array cut like its weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kangaroo_jax.config import PRESETS, STAGES, StageConfig
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.planning.compile import abstract_batch
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.state import abstract_state, build_step, make_state, shardings_of, state_shardings


@pytest.fixture
def config(micro_config):
    micro_config.optimizer.trainable = (("llm/embedding", None), ("vision/.*", None), (".*", 1.0))
    micro_config.optimizer.update(kind="adamw", frozen_dtype="bfloat16")
    return StageConfig.from_config(micro_config)


def test_a_state_begins_at_step_0_with_zero_moments_and_frozen_weights_as_they_are_kept(config):
    binding = abstract_model(config.model)
    params = {name: np.ones(x.shape, x.dtype) for name, x in binding.shapes.items()}
    state = jax.jit(lambda params: make_state(config, params))(params)
    assert int(state.step) == 0 and state.step.dtype == jnp.int32
    assert {name.split("/")[0] for name in state.frozen} == {"vision", "llm"} and "llm/embedding" in state.frozen
    assert all(x.dtype == jnp.bfloat16 for x in state.frozen.values())
    assert all(x.dtype == jnp.float32 and bool((x == 1).all()) for x in state.params.values())
    assert state.params.keys() | state.frozen.keys() == binding.shapes.keys()
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    shapes = [x.shape for x in jax.tree.leaves(state.opt_state)]
    assert all(shapes.count(x.shape) >= 2 for x in state.params.values())  # two moments each


def test_what_is_of_a_weight_is_cut_like_it_and_what_is_not_stays_whole(config):
    binding, mesh = abstract_model(config.model), make_mesh((1, 2, 2, 2))
    state = abstract_state(config, binding, mesh)
    assert state.step.sharding.spec == PartitionSpec()
    by_name: dict[str, set] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        names = [key.key for key in path if getattr(key, "key", None) in binding.axes]
        if names and x.shape == binding.shapes[names[-1]].shape:
            by_name.setdefault(names[-1], set()).add(x.sharding)
        else:
            assert x.sharding.spec == PartitionSpec(), path
    assert by_name.keys() == binding.shapes.keys() and all(len(places) == 1 for places in by_name.values())
    kernel = state.params["llm/layers/mlp/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, kernel.shape[1] // 4, kernel.shape[2] // 2)
    real = jax.eval_shape(lambda params: make_state(config, params), dict(binding.shapes))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shardings_of(state) == state_shardings(real, binding, mesh)


def test_a_factored_moment_of_another_shape_stays_whole(config):
    config = config.changed({"optimizer.kind": "adafactor", "model.llm.mlp_width": 256, "model.llm.width": 256})
    state = abstract_state(config, abstract_model(config.model), make_mesh((1, 2, 2, 2)))
    places = {
        x.sharding.spec
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "llm/layers/mlp/up/kernel" in str(path) and x.ndim < 3
    }
    assert places == {PartitionSpec()}


STEPS = [(name, preset) for name in (*STAGES, "hour_video") for preset in PRESETS] + [("stage0_text_warmup", "tiny")]


@pytest.mark.parametrize(("name", "preset"), STEPS, ids=[f"{name}:{preset}" for name, preset in STEPS])
def test_the_step_of_every_stage_and_preset_is_traced(name, preset):
    """Frames, patches, packs and heads of every stage file go together with every preset; nothing is allocated."""
    config = resolve(StageConfig.load(f"{name}:{preset}"), None, 1)
    mesh, binding = make_mesh((1, 1, 1, 1), jax.devices()[:1]), abstract_model(config.model)
    state = abstract_state(config, binding, mesh)
    after, metrics = jax.eval_shape(build_step(config, binding, state), state, abstract_batch(config, mesh))
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert [x.shape for x in jax.tree.leaves(after)] == [x.shape for x in jax.tree.leaves(state)]
