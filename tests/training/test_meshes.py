"""Eight virtual devices compute what one does: losses of many steps, accumulated gradients, generated text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.config import StageConfig
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.models.kangaroo import KangarooModel, count_parameters
from kangaroo_jax.models.llama import contracted_of
from kangaroo_jax.models.lora import initial_factors
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.models.quantized import quantize, quantize_rows
from kangaroo_jax.planning import hlo
from kangaroo_jax.planning.compile import lower_step
from kangaroo_jax.sharding import make_mesh, mesh_scope
from kangaroo_jax.training.host_rows import HostRows
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.state import build_step, make_state, state_shardings
from kangaroo_jax.training.step import gradient

MESHES = [(1, 2, 2, 2), (2, 2, 1, 2), (1, 2, 4, 1)]
ONE_AXIS = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1, 1), (1, 8, 1, 1))]
STEPS = 20


@pytest.fixture(scope="module")
def config(make_micro_config):
    config = make_micro_config()
    config.model.llm.update(width=32, mlp_width=64, vocab_size=400, loss_chunk=16)  # cut over the tensor axis
    config.data.update(packs_per_batch=8, tokens_per_pack=64, frames_per_pack=6)
    config.optimizer.update(kind="adamw", learning_rate=3e-3)  # as on a pod
    config.train.steps = STEPS
    return StageConfig.from_config(config)


@pytest.fixture(scope="module")
def batch(config) -> PackedBatch:
    """Eight packs of two videos and text each, of different length and weight, padded at the end."""
    random, (b, t, f, side) = np.random.default_rng(0), (8, 64, 6, config.data.image_size)
    tokens = random.integers(11, 400, (b, t)).astype(np.int32)
    segments, positions = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32)
    index = np.full((b, t), -1, np.int32)
    for row in range(b):
        cut, end = 20 + 2 * row, 64 - row
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
        index[row, 2:3], index[row, cut + 3 : cut + 5] = 0, [1, 2]  # a group of frames is one token
    weights = ((random.uniform(size=(b, t)) < 0.1 + 0.1 * np.arange(b)[:, None]) & (segments > 0)).astype(np.float32)
    weights *= np.where(np.arange(t) % 2, 0.5, 2.0).astype(np.float32)
    return PackedBatch(
        tokens=tokens,
        segment_ids=segments,
        positions=positions,
        targets=np.roll(tokens, -1, axis=1),
        weights=weights,
        frames=random.integers(0, 256, (b, f, side, side, 3)).astype(np.uint8),
        frame_times=np.tile(np.arange(f, dtype=np.float32), (b, 1)),
        frame_groups=np.tile(np.arange(f, dtype=np.int32) // 2 + 1, (b, 1)),
        vision_index=index,
    )


def first_params(config) -> dict[str, jax.Array]:
    make = jax.jit(lambda: abstract_model(config.model).flatten(KangarooModel(config.model, rngs=nnx.Rngs(0))))
    return {path: np.asarray(weight) for path, weight in make().items()}


def losses(config, batch, params, shape, *, accumulate=1, steps=STEPS) -> list[float]:
    """The losses of `steps` real steps on one batch over a mesh of `shape`."""
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    config = config.changed({"train.accumulate": accumulate})
    binding = abstract_model(config.model, config.lora)
    with mesh_scope(mesh):
        make = functools.partial(make_state, config)
        state = jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make, params), binding, mesh))(params)
        step = build_step(config, binding, state)
        with jax.transfer_guard("disallow"):  # as in the training loop
            on_mesh, found = HostRows(mesh, len(batch.tokens)).put(batch), []
        for _ in range(steps):
            state, metrics = step(state, on_mesh)
            found.append(float(metrics["loss"]))
        assert step._cache_size() == 1
    return found


@pytest.fixture(scope="module")
def params(config):
    return first_params(config)


@pytest.fixture(scope="module")
def one_device(config, batch, params) -> list[float]:
    return losses(config, batch, params, (1, 1, 1, 1))


@pytest.mark.parametrize("shape", [*MESHES, *ONE_AXIS], ids=str)
def test_losses_of_20_steps_equal_those_of_one_device(config, batch, params, one_device, shape):
    assert one_device[-1] < 0.8 * one_device[0]
    np.testing.assert_allclose(losses(config, batch, params, shape), one_device, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "form"), [((1, 2, 2, 2), ""), pytest.param((2, 2, 1, 2), "int8", marks=pytest.mark.slow)]
)
def test_factors_on_a_mesh_train_as_on_one_device(config, batch, params, shape, form):
    adapted = config.changed({"lora.rank": 4, "lora.targets": ".*", "optimizer.learning_rate": 0.02, "init_from": "x"})
    factors = initial_factors(abstract_model(adapted.model, adapted.lora).shapes, 0)
    weights = {**params, **{path: np.asarray(x) for path, x in factors.items()}}
    if form:
        adapted = adapted.changed({"lora.quantize": form})
        for path, contracted in contracted_of(config.model.llm).items():
            lead = "layers" in path
            layers = [quantize(x, contracted, form) for x in (weights[path] if lead else weights[path][None])]
            kernel, scale = (np.stack(parts) if lead else parts[0] for parts in zip(*layers, strict=True))
            weights |= {path: kernel, path.replace("kernel", "kernel_scale"): scale}
        weights["llm/embedding"], weights["llm/embedding_scale"] = quantize_rows(weights["llm/embedding"])
    alone, cut = (losses(adapted, batch, weights, mesh, steps=8) for mesh in ((1, 1, 1, 1), shape))  # 1e-6 apart here
    assert alone[-1] < 0.9 * alone[0]  # and 3e-5 after 20 steps at this rate: each step enlarges what rounding differs
    np.testing.assert_allclose(cut, alone, rtol=2e-5)


@pytest.mark.slow
def test_muons_steps_on_a_mesh_equal_those_of_one_device(config, batch, params):
    config = config.changed({"optimizer.kind": "muon"})
    alone, cut = (losses(config, batch, params, shape) for shape in ((1, 1, 1, 1), (1, 2, 2, 2)))
    np.testing.assert_allclose(cut, alone, rtol=1e-5)


def test_accumulated_gradients_equal_those_of_the_whole_batch(config, batch, params):
    """Parts differ in their weights, so that a mean of means would not do."""
    binding = abstract_model(config.model)
    run = jax.jit(lambda params, batch, parts: gradient(binding, params, {}, batch, parts), static_argnums=2)
    (whole, weight), expected = run(params, batch, 1)
    (parts, weight_of_parts), actual = run(params, batch, 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert weight == weight_of_parts == batch.weights.sum()
    for name, value in expected.items():
        scale = np.abs(value).max() + 1e-6
        np.testing.assert_allclose(np.asarray(actual[name]) / scale, np.asarray(value) / scale, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("shape", "parts"), [((1, 2, 2, 1), 4), ((2, 1, 2, 2), 2)], ids=str)
def test_accumulation_on_a_mesh_equals_one_big_step(config, batch, params, one_device, shape, parts):
    found = losses(config, batch, params, shape, accumulate=parts, steps=5)
    np.testing.assert_allclose(found, one_device[:5], rtol=1e-5)


def test_gradients_cross_from_slice_to_slice_once_and_not_for_every_part(config):
    config = resolve(config.changed({"train.mesh": (2, 2, 1, 2), "train.accumulate": 2}), None, 8)
    text = lower_step(config, jax.devices()[:8]).compile().as_text()
    found = [(visit.times, hlo.collective(visit.operation), hlo.group(visit.operation)) for visit in hlo.walk(text)]
    moved = [
        (times, *collective, {device // 4 for device in group}) for times, collective, group in found if collective
    ]
    across = [(times, size) for times, _, size, slices in moved if len(slices) == 2]
    assert across and all(times == 1 for times, _ in across)
    weights = 4 * count_parameters(config.model)["total"]
    assert sum(size for _, size in across) < 1.2 * weights
    assert any(times > 1 for times, _, _, slices in moved if len(slices) == 1)


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), pytest.param((1, 2, 4, 1), marks=pytest.mark.slow)], ids=str)
def test_generated_text_is_that_of_one_device(config, params, shape):
    """Prompts and answers with the memory cut over devices, two of different length with video."""
    from kangaroo_jax.inference.engine import Engine
    from kangaroo_jax.inference.given import Given
    from kangaroo_jax.inference.requests import Request
    from kangaroo_jax.inference.sizes import Sizes

    binding = abstract_model(config.model)
    random = np.random.default_rng(1)
    tokens = [random.integers(11, 400, n).astype(np.int32) for n in (100, 61)]
    marks = [np.isin(np.arange(len(t)), places) for t, places in zip(tokens, ([3, 4], [7]), strict=True)]
    films = [MediaRef("video", str(n), (0.0,)) for n in range(2)]
    frames = random.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)

    def answers(mesh) -> list[tuple[int, ...]]:
        model = binding.bind({k: jnp.asarray(v) * 3 for k, v in params.items()}).unstack()
        rows: dict[str, np.ndarray] = {}
        sizes = Sizes(((192, 2),), chunks=(32,), visible=(), rows=(2,), frames=6)
        with Engine(model, sizes, vision=lambda _: Given(rows), mesh=mesh) as engine:
            vision = np.asarray(engine.programs.encode(frames, np.arange(6, dtype=np.float32)))
            rows.update({"0": vision[:2], "1": vision[2:]})
            asked = [
                Request(*one, (film,), 12) for one, film in zip(zip(tokens, marks, strict=True), films, strict=True)
            ]
            return [ticket.result(300).ids for ticket in [engine.submit(one) for one in asked]]

    expected = answers(make_mesh((1, 1, 1, 1), jax.devices()[:1]))
    assert len(expected[0]) == 12 and len(set(expected[0])) > 2
    assert answers(make_mesh(shape, jax.devices())) == expected
