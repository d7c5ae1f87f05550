"""Spikes are passed over and counted, weights are averaged, and both go on as if nothing had happened."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kangaroo_jax.checkpoints.stored import Stored, whole
from kangaroo_jax.config import OptimizerConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.adapters import load_adapted
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training.guard import LEAST_NORMS, Guarded, guarded
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import read_metrics
from kangaroo_jax.training.optimizer import make_optimizer
from tests.training.test_loop import small_stage

PARAMS = {"a": jnp.ones((3,)), "b": jnp.zeros((2, 2))}


def grads(norm: float) -> dict[str, jax.Array]:
    return {"a": jnp.zeros((3,)), "b": jnp.full((2, 2), norm / 2)}


def run_of(config: OptimizerConfig, norms: list[float]) -> tuple[list[dict], list[Guarded]]:
    """Weights and states after each step."""
    optimizer = guarded(optax.sgd(0.1, momentum=0.9), config)
    params, state, found = PARAMS, optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for norm in norms:
        updates, state = update(grads(norm), state, params)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return [p for p, _ in found], [s for _, s in found]


def test_off_nothing_stands_around_the_optimiser():
    inner = optax.sgd(0.1)
    assert guarded(inner, OptimizerConfig()) is inner


def test_a_spike_changes_nothing_and_is_counted():
    calm = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.3, 1.0]
    assert len(calm) == LEAST_NORMS
    config = OptimizerConfig(spike_factor=3.0, spike_window=10, ema=0.5)
    params, states = run_of(config, [*calm, 3.2, 2.9, np.inf, 1.0])
    assert [int(state.spikes) for state in states[-5:]] == [0, 1, 1, 2, 2]
    for one, other in ((7, 8), (9, 10)):  # the steps before and at each spike
        for tree in (lambda i: params[i], lambda i: states[i].inner, lambda i: states[i].ema):
            jax.tree.map(np.testing.assert_array_equal, tree(one), tree(other))
    np.testing.assert_allclose(states[-1].norms[-3:], [3.2, 2.9, 1.0], rtol=1e-6)  # what is not finite is no norm
    assert np.abs(params[9]["b"] - params[8]["b"]).max() > 0


def test_norms_that_stay_high_are_no_spikes_for_long():
    config = OptimizerConfig(spike_factor=2.0, spike_window=10)
    _, states = run_of(config, [1.0] * 10 + [5.0] * 10)
    assert int(states[-1].spikes) == 5  # until the higher ones are the median


def test_the_average_forgets_its_beginning_and_follows_at_its_decay():
    params, states = run_of(OptimizerConfig(ema=0.99), [1.0, 2.0, 0.5])
    average = np.asarray(PARAMS["b"])
    for count, after in enumerate(params, 1):
        keep = min(0.99, (1 + count) / (10 + count))
        average = keep * average + (1 - keep) * np.asarray(after["b"])
    np.testing.assert_allclose(states[-1].ema["b"], average, rtol=1e-6)


def test_an_update_without_a_spike_is_the_plain_one_bit_for_bit():
    params = {"llm/layers/mlp/up/kernel": jnp.ones((2, 4, 4))}
    gradient = {"llm/layers/mlp/up/kernel": jnp.linspace(-1, 1, 32).reshape(2, 4, 4)}
    found = []
    for config in (OptimizerConfig(), OptimizerConfig(spike_factor=5.0, ema=0.9)):
        optimizer = make_optimizer(config, 10, params)
        found.append(jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0])
    np.testing.assert_array_equal(*(next(iter(updates.values())) for updates in found))


def test_a_spike_on_one_of_eight_devices_passes_the_step_over_on_all():
    """A gradient of which one device's rows alone are huge, as where one host reads a bad sample."""
    mesh = make_mesh((1, 8, 1, 1), jax.devices())
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    optimizer = guarded(optax.sgd(0.1, momentum=0.9), OptimizerConfig(spike_factor=3.0, spike_window=10, ema=0.5))
    params = jax.device_put({"w": jnp.ones((8, 4))}, rows)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params: dict, state: Guarded, batch: jax.Array) -> tuple[dict, Guarded]:
        gradient = jax.grad(lambda params: jnp.mean(jnp.sum(params["w"] * batch[:, None], 1)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(LEAST_NORMS):
        before = params, state = step(params, state, jax.device_put(jnp.ones(8), rows))
    params, state = step(params, state, jax.device_put(jnp.ones(8).at[3].set(100.0), rows))
    assert int(state.spikes) == 1 and len(params["w"].sharding.device_set) == 8
    for tree in (lambda pair: pair[0], lambda pair: pair[1].inner, lambda pair: pair[1].ema):
        jax.tree.map(np.testing.assert_array_equal, tree(before), tree((params, state)))
    calm, _ = step(params, state, jax.device_put(jnp.ones(8), rows))
    assert (np.asarray(calm["w"]) != np.asarray(params["w"])).all()


# --------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory, one_device) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    train(stage_of(corpus), folder, tell=lambda line: None)
    return folder


def stage_of(corpus: Path, **keys):
    # With a factor this small most steps are spikes once enough norms are known.
    guard = {"optimizer.spike_factor": 0.9, "optimizer.spike_window": 8, "optimizer.ema": 0.9}
    return small_stage("stage4_instruct", corpus, 14, **{**guard, "train.checkpoint_every": 11, **keys})


def read(folder: Path) -> dict[str, np.ndarray]:
    stored = Stored(folder)
    return {name: stored.read(name, whole(spec.shape)) for name, spec in stored.specs.items()}


def lines(folder: Path) -> list[tuple]:
    return [(x["step"], x["loss"], x["grad_norm"], x["spikes"]) for x in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
def test_spikes_are_in_the_log_and_a_run_that_goes_on_counts_on(run, corpus, tmp_path):
    logged = lines(run)
    assert logged[-1][3] >= 1 and [line[3] for line in logged[:LEAST_NORMS]] == [0.0] * LEAST_NORMS
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/14")
    told: list[str] = []
    train(stage_of(corpus), tmp_path / "run", tell=told.append)
    assert lines(tmp_path / "run") == logged
    again = sum("is a spike: passed over" in line for line in told)
    assert again == logged[-1][3] - logged[10][3]
    for item in ("params", "ema"):
        for name, value in read(run / "checkpoints/14" / item).items():
            np.testing.assert_array_equal(value, read(tmp_path / "run/checkpoints/14" / item)[name])


@pytest.mark.slow
def test_a_chat_takes_the_average_when_asked(run):
    step = run / "checkpoints/14"
    average, weights = read(step / "ema"), read(step / "params")
    assert average.keys() == weights.keys()
    name = "llm/norm/scale"
    for ema, expected in ((True, average), (False, weights)):
        loaded = load_adapted(run, ema=ema)
        np.testing.assert_array_equal(loaded.model.llm.norm.scale[...], expected[name])
    assert np.abs(average[name] - weights[name]).max() > 0
    metadata = json.loads((step / "digests/metadata").read_text())
    assert metadata["ema"].keys() == average.keys()


@pytest.mark.slow
def test_what_a_state_has_not_cannot_begin_within_a_run(run, corpus, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for keys in ({"optimizer.ema": 0.0}, {"optimizer.spike_factor": 0.0}, {"optimizer.spike_window": 9}):
        with pytest.raises(UserError, match=rf"config\.{next(iter(keys))} was .*cannot change within a stage"):
            train(stage_of(corpus, **keys), tmp_path / "run", tell=lambda line: None)
