"""Weights are loaded as they were saved, in the dtype that is wanted, quantised as stored or asked for, and checked."""

import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from kangaroo_jax.bench.quantize import bench_quantize
from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.digests import RunningDigest, digests
from kangaroo_jax.checkpoints.stored import Stored
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conversion import weights as conversion_weights
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import weights
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.layers import Linear
from kangaroo_jax.models.parameters import Binding, Params, abstract_model
from kangaroo_jax.models.quantized import as_quantized, dequantize, quantize, shapes
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState


@pytest.fixture(scope="module")
def model_config(make_micro_config) -> ModelConfig:
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    return ModelConfig.from_config(config.model)


@pytest.fixture(scope="module")
def params(model_config, random_model) -> Params:
    return abstract_model(model_config).flatten(random_model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_micro_config, media, params) -> Path:
    """What training writes where the ViT is frozen: two folders of weights, one of them in bfloat16."""
    folder, config = tmp_path_factory.mktemp("stage5"), make_micro_config()
    config.model.llm.vocab_size = 300
    frozen = {name: x.astype(jnp.bfloat16) for name, x in params.items() if name.startswith("vision")}
    state = TrainState(jnp.int32(7), {n: x for n, x in params.items() if n not in frozen}, frozen, {})
    checkpoints = Checkpoints(folder, state)
    checkpoints.keep_frozen(state)
    checkpoints.save(state, b"{}", config.to_dict())
    checkpoints.close()
    reading.keep_tokenizer(media / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory, checkpoint) -> dict[str, Path]:
    """The checkpoint as `kangaroo convert` quantises it."""
    folder = tmp_path_factory.mktemp("stored")
    return {
        form: convert([checkpoint], folder / form, quantize=form, tell=lambda line: None) for form in ("int8", "int4")
    }


def flat(model: KangarooModel) -> dict[str, jax.Array]:
    return Binding(model).flatten(model)


def stacked(name: str, layers: int = 2) -> list[str]:
    """The names of a parameter of a checkpoint in a model whose layers stand apart."""
    head, found, tail = name.partition("llm/layers/")
    return [f"{head}{found}{layer}/{tail}" for layer in range(layers)] if found else [name]


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_weights_are_those_saved_cast_and_the_layers_stand_apart(checkpoint, params, dtype):
    loaded = weights.load(checkpoint, dtype=dtype)
    found, wanted = flat(loaded.model), jnp.dtype(dtype or "float32")
    assert loaded.dtype == wanted.name and loaded.quantized is None and loaded.model.llm.dtype == wanted
    for name, value in params.items():
        places = stacked(name)
        for place, part in zip(places, value if len(places) > 1 else [value], strict=True):
            saved = part.astype(jnp.bfloat16) if name.startswith("vision") else part
            norm = "norm" in name
            assert found[place].dtype == (saved.dtype if norm else wanted), place
            np.testing.assert_array_equal(found[place], saved.astype(found[place].dtype))
    assert len(found) == sum(len(stacked(name)) for name in params)


def test_a_name_for_the_weights_says_what_they_are(checkpoint, tmp_path):
    names = {weights.load(checkpoint, dtype=dtype, quantize=form).weights_id for dtype, form in SORTS}
    assert len(names) == len(SORTS)
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert weights.load(copy).weights_id in names


SORTS = ((None, None), ("bfloat16", None), (None, "int8"), (None, "int4"))


def logits(model: KangarooModel) -> jax.Array:
    tokens = jnp.arange(24)[None] * 7 % 300
    ones = jnp.ones_like(tokens)
    hidden = model.llm(model.embed(tokens, -ones, None), ones, jnp.arange(24)[None])
    return model.llm.unembed(hidden)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_stored_and_asked_for_are_the_same_numbers_and_near_the_original(checkpoint, stored, form):
    asked, kept = weights.load(checkpoint, quantize=form), weights.load(stored[form])
    assert asked.quantized == kept.quantized == form
    one, other = flat(asked.model), flat(kept.model)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    before, after = jax.nn.log_softmax(logits(weights.load(checkpoint).model)), jax.nn.log_softmax(logits(asked.model))
    assert 0 < jnp.mean(jnp.sum(jnp.exp(before) * (before - after), -1)) < {"int8": 0.02, "int4": 3.0}[form]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_an_accelerator_keeps_them_small_and_computes_the_same(stored, form, monkeypatch, model_config):
    rounded = logits(weights.load(stored[form]).model)
    monkeypatch.setattr(weights, "_multiplies_whole_numbers", lambda: True)
    small = weights.load(stored[form])
    np.testing.assert_allclose(logits(small.model), rounded, rtol=2e-4, atol=2e-4)
    arrays = flat(small.model)
    assert arrays["llm/layers/1/mlp/up/kernel"].dtype == {"int8": jnp.int8, "int4": jnp.uint8}[form]
    assert arrays["llm/embedding"].dtype == jnp.float32
    if form == "int8":
        kernels = [n for n in arrays if n.startswith("llm/") and n.endswith("kernel")]
        size = sum(arrays[n].nbytes + arrays[n + "_scale"].nbytes for n in kernels)
        assert size < 0.57 * sum(2 * arrays[n].size for n in kernels)  # scales weigh more on 32 inputs than on 4096
    if form == "int4":
        return
    mesh = make_mesh((1, 2, 2, 2))
    sharded = flat(weights.load(stored[form], mesh=mesh).model)
    for name, array in arrays.items():
        np.testing.assert_array_equal(sharded[name], array)
    assert not sharded["llm/layers/0/mlp/up/kernel"].sharding.is_fully_replicated


@pytest.mark.slow
def test_int8_bytes_of_the_8b_decoder():
    from kangaroo_jax.config import stage_config

    config = ModelConfig.from_config(stage_config("kangaroo_8b").model)
    model = nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0)))
    plain = sum(2 * x.size for n, x in Binding(model).shapes.items() if n.startswith("llm"))
    for form, most in (("int8", 0.54), ("int4", 0.34)):
        as_quantized(model.llm, form)
        found = {n: x for n, x in Binding(model).shapes.items() if n.startswith("llm")}
        size = sum(
            x.size * (2 if x.dtype == jnp.float32 and "scale" not in n else x.dtype.itemsize) for n, x in found.items()
        )
        assert size / plain < most
        model = nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(("shape", "contracted"), [((256, 3), 1), ((96, 2, 8), 1), ((4, 64, 10), 2), ((2, 6, 1), 2)])
def test_rounding_is_to_the_nearest_step_of_its_scale(form, shape, contracted):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 3
    kernel[..., 0] = 0
    small, scale = quantize(kernel, contracted, form)
    assert (small.shape, scale.shape) == shapes(shape, contracted, form)
    back = dequantize(small, scale, contracted)
    np.testing.assert_array_equal(back[..., 0], 0)
    np.testing.assert_array_equal(dequantize(jnp.asarray(small), jnp.asarray(scale), contracted), back)
    if form == "int8":
        step = np.broadcast_to(scale, shape)
    else:
        step = np.repeat(scale, shape[contracted - 1] // scale.shape[contracted - 1], axis=contracted - 1)
    assert (np.abs(back - kernel) <= step / 2 * 1.001).all()


def test_a_linear_map_applies_its_scale():
    layer = nnx.eval_shape(
        lambda: Linear((64,), (3, 8), ("a", "b", "c"), bias=True, rngs=nnx.Rngs(0), param_dtype="float32")
    )
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((64, 3, 8)).astype(np.float32), rng.standard_normal((5, 64)).astype(np.float32)
    for form in ("int8", "int4"):
        small, scale = quantize(kernel, 1, form)
        layer.kernel, layer.kernel_scale = nnx.Param(jnp.asarray(small)), nnx.Param(jnp.asarray(scale))
        layer.bias = nnx.Param(jnp.ones((3, 8)))
        np.testing.assert_allclose(layer(x), np.tensordot(x, dequantize(small, scale, 1), 1) + 1, rtol=1e-4, atol=1e-4)


def _change(folder: Path, name: str, tmp_path: Path, change) -> Path:
    """A copy in which one array's own files, or its entry, are changed."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    change(copy / "params", name)
    return copy


def _drop(params: Path, name: str) -> None:
    metadata = json.loads((params / "_METADATA").read_text())
    del metadata["tree_metadata"][str((name,))]
    (params / "_METADATA").write_text(json.dumps(metadata))


def _reshape(params: Path, name: str) -> None:
    spec = json.loads((params / name / ".zarray").read_text())
    spec["shape"][-1] -= 1
    (params / name / ".zarray").write_text(json.dumps(spec))


def _retype(params: Path, name: str) -> None:
    spec = json.loads((params / name / ".zarray").read_text())
    (params / name / ".zarray").write_text(json.dumps(spec | {"dtype": "|u1"}))


SCALE = "llm/layers/mlp/up/kernel_scale"


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (_drop, SCALE, f"tensor {SCALE} is missing"),
        (_reshape, SCALE, f"tensor {SCALE} has shape"),
        (_drop, "llm/norm/scale", "tensor llm/norm/scale is missing"),
        (_retype, "llm/layers/mlp/up/kernel", "tensor llm/layers/mlp/up/kernel is uint8, where int8 belongs"),
    ],
)
def test_what_is_stored_wrongly_is_named(stored, tmp_path, change, name, words):
    with pytest.raises(UserError, match=words) as error:
        weights.load(_change(stored["int8"], name, tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_changed_bit_is_found(checkpoint, tmp_path):
    plain = convert([checkpoint], tmp_path / "plain", tell=lambda line: None, format="orbax")
    file = next(path for path in (plain / "params/llm/head/kernel").iterdir() if path.name[0] != ".")
    sums = {n: value for n, value in digests(reading.load_params(plain, _binding(plain)))[0].items()}
    weights.load(plain)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(plain / "digests", args=ocp.args.JsonSave({"params": sums}))
    weights.load(plain)
    data = bytearray(file.read_bytes())
    data[101] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="params: llm/head/kernel is not as it was saved"):
        weights.load(plain)


def _binding(folder: Path) -> Binding:
    return abstract_model(ModelConfig.from_config(reading.load_config(folder).model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sums_of_parts_are_those_of_the_whole(dtype):
    array = np.random.default_rng(0).standard_normal((7, 300, 100)).astype(jnp.dtype(dtype))
    running = RunningDigest()
    for part in array:
        running.add(part)
    assert running.value == digests({"a": jnp.asarray(array)})[0]["a"]


def test_training_and_conversion_refuse_quantised_weights(stored, checkpoint, tmp_path):
    with pytest.raises(UserError, match="its weights are quantised, for talking alone"):
        reading.load_params(stored["int8"], _binding(stored["int8"]))
    with pytest.raises(UserError, match="its weights are quantised, for talking alone"):
        convert([stored["int4"]], tmp_path / "hf", format="hf", tell=lambda line: None)
    for options, words in (
        ({"quantize": "int2"}, "--quantize=int2: use one of int8, int4"),
        ({"quantize": "int8", "format": "hf"}, "is for --format=orbax"),
    ):
        with pytest.raises(UserError, match=words):
            convert([checkpoint], tmp_path / "x", tell=lambda line: None, **options)
    with pytest.raises(UserError, match="stored as int4, which cannot become int8"):
        weights.load(stored["int4"], quantize="int8")
    with pytest.raises(UserError, match="dtype 'int8': use one of float32"):
        weights.load(checkpoint, dtype="int8")
    assert Stored(stored["int8"] / "params").specs[SCALE].dtype == np.float32


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [("cpu", None, "float32"), ("tpu", None, "bfloat16"), ("gpu", "7.5", "float16"), ("gpu", "8.0", "bfloat16")],
)
def test_the_dtype_suits_the_device(monkeypatch, platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert weights.compute_dtype() == dtype


def test_what_rounding_changes_is_measured_on_given_answers(checkpoint, stored, media, tmp_path):
    records = [
        {"id": "0", "video": str(media / "a.mp4"), "conversations": spoken("<video>\nWhat moves?", "A red square.")},
        {"id": "1", "image": str(media / "c.jpg"), "conversations": spoken("<image>\nWhat?", "一个红色的方块。")},
        {"id": "2", "conversations": spoken("Which way?", "To the left.")},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    plain, int8, int4, kv = bench_quantize(checkpoint, [path], kv_dtype="int8")
    assert [row["model"] for row in (plain, int8, int4, kv)] == ["float32", "int8", "int4", "int8 keys and values"]
    assert plain["questions"] == 3 and plain["mean_divergence"] == 0 and plain["same_token"] == 1
    assert 0 < int8["mean_divergence"] < 0.1 * int4["mean_divergence"] and 0 < kv["mean_divergence"] < 0.01
    assert bench_quantize(checkpoint, [path], forms=(), questions=2)[0]["questions"] == 2
    with pytest.raises(UserError, match="is stored as int8; compare from the checkpoint"):
        bench_quantize(stored["int8"], [path])
    path.write_text("")
    with pytest.raises(UserError):
        bench_quantize(checkpoint, [path])


def spoken(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_a_matrix_that_is_stored_in_pieces_is_loaded_in_pieces(checkpoint, tmp_path, monkeypatch, form):
    """Its sum is that of the whole, and what is rounded is as if it were read at once."""
    monkeypatch.setattr(conversion_weights, "BOX_BYTES", 4000)
    cut = convert([checkpoint], tmp_path / "cut", format="orbax", tell=lambda line: None)
    assert len(list((cut / "params/llm/head/kernel").glob("*.*"))) > 3
    monkeypatch.setattr(weights, "_PIECE", 6000)
    monkeypatch.setattr(weights, "_multiplies_whole_numbers", lambda: True)
    pieces: list = []
    read = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self, path, box: pieces.append(path) or read(self, path, box))
    made, aligned = [], weights._aligned
    monkeypatch.setattr(weights, "_aligned", lambda *of: made.append(aligned(*of)) or made[-1])
    found = flat(weights.load(cut, quantize=form).model)
    pointers = {value.unsafe_buffer_pointer() for value in found.values()}
    assert made and all(array.ctypes.data in pointers for array in made), "a device on the host copied a matrix"
    assert pieces.count("llm/head/kernel") > 3 and pieces.count("llm/embedding") > 3
    monkeypatch.undo()
    monkeypatch.setattr(weights, "_multiplies_whole_numbers", lambda: True)
    for name, value in flat(weights.load(checkpoint, quantize=form).model).items():
        np.testing.assert_array_equal(found[name], value)


def test_the_sum_of_columns_is_that_of_the_whole():
    array = np.random.default_rng(0).normal(size=(70, 90)).astype(np.float32)
    digest = RunningDigest()
    for first, last in ((30, 90), (0, 30)):
        digest.add_columns(array[:, first:last], first, 90)
    assert digest.value == digests({"x": jnp.asarray(array)})[0]["x"]
