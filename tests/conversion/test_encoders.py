"""Encoders against timm's reference outputs (tests/fixtures), and models assembled from public parts."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.files import open_tensors
from kangaroo_jax.conversion.sources import open_source
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.layers import rotary_2d
from kangaroo_jax.models.parameters import abstract_model
from tests.models import from_fixtures

VISION = dict(patch_size=14, width=64, depth=3, heads=2, mlp_width=170, rope_reference_grid=16)
FLAGS = {f"model.vision.{key}": value for key, value in VISION.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """timm/model.safetensors with a CLIP head, and llama/ as transformers saves it."""
    folder = tmp_path_factory.mktemp("parts")
    weights, _, _ = from_fixtures.read("eva02_tiny")
    (folder / "timm").mkdir()
    head = {"head.weight": np.zeros((8, 64), "f4"), "head.bias": np.zeros(8, "f4")}
    save_file({**weights, **head}, folder / "timm" / "model.safetensors")
    weights, _, config = from_fixtures.read("llama_tiny")
    (folder / "llama").mkdir()
    save_file(weights, folder / "llama" / "model.safetensors")
    (folder / "llama" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory) -> Path:
    """A model of both, whose encoder's position embedding is for a grid of 8 where the file's is for 4."""
    folder = tmp_path_factory.mktemp("assembled") / "start"
    overrides = {**FLAGS, "model.vision.pos_embed_grid": 8}
    convert([parts / "timm", parts / "llama"], folder, preset="tiny", overrides=overrides, seed=3)
    return folder


def restored(folder: Path) -> dict[str, np.ndarray]:
    binding = abstract_model(ModelConfig.from_config(reading.load_config(folder).model))
    return {path: np.asarray(value) for path, value in reading.load_params(folder, binding).items()}


def test_an_assembled_encoder_gives_timms_outputs(assembled):
    _, cases = from_fixtures.eva()
    config = ModelConfig.from_config(reading.load_config(assembled).model)
    binding = abstract_model(config)
    model = binding.bind(reading.load_params(assembled, binding))
    np.testing.assert_allclose(
        model.vision.position_embedding[...][None], cases["case112.pos_embed_resized"], atol=2e-5
    )
    tokens = jax.jit(model.vision.tokens)(cases["case112.pixels"].transpose(0, 2, 3, 1))
    expected = cases["case112.patch_tokens_before_norm"]
    assert np.abs(np.asarray(tokens[:, 1:]) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_an_assembled_model_starts_as_it_should(assembled, parts, tmp_path):
    params, config = restored(assembled), reading.load_config(assembled)
    assert (config.model.llm.rope_theta, config.model.llm.width) == (500_000.0, 64)
    np.testing.assert_array_equal(params["patchify/kernel"], np.full((2, 2, 2, 64), 0.125))
    assert not params["patchify/bias"].any() and not params["projector/first/bias"].any()
    deviation = params["projector/first/kernel"].std() * 8
    assert 0.9 < deviation < 1.1 and np.abs(params["projector/first/kernel"]).max() * 8 < 2.28
    embedding, marks = params["llm/embedding"], params["special_embedding"]
    distance = np.abs(marks - embedding.mean(0)).mean()
    assert 0.02 * embedding.std() < distance < 0.2 * embedding.std() and len(np.unique(marks, axis=0)) == 4
    overrides = {**FLAGS, "model.vision.pos_embed_grid": 8}
    for seed, same in ((3, True), (4, False)):
        again = tmp_path / str(seed)
        convert([parts / "timm", parts / "llama"], again, preset="tiny", overrides=overrides, seed=seed)
        assert np.array_equal(restored(again)["special_embedding"], marks) is same


def test_the_torch_tower_gives_timms_outputs(parts, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from kangaroo_jax.conversion.torch_model.modeling_kangaroo import VisionTower

    _, cases = from_fixtures.eva()
    convert([parts / "timm"], tmp_path / "eva", format="eva", preset="tiny", overrides=FLAGS)
    tower = VisionTower({**VISION, "pos_embed_grid": 4, "rope_theta": 10_000.0, "norm_eps": 1e-6, "output_norm": False})
    with safe_open(tmp_path / "eva" / "model.safetensors", "pt") as file:
        state = {name.removeprefix("visual."): file.get_tensor(name) for name in file.keys()}
    tower.load_state_dict(state, strict=True)
    for case in ("case56", "case112"):
        with torch.no_grad():
            tokens = tower(torch.from_numpy(cases[f"{case}.pixels"])).numpy()
        expected = cases[f"{case}.patch_tokens_before_norm"]
        assert np.abs(tokens - expected).max() <= 2e-5 * np.abs(expected).max()


def eva_file(parts: Path, tmp_path: Path, theta: float) -> Path:
    """An OpenCLIP-like file: `visual.*` with rope tables, a text tower and a temperature."""
    convert([parts / "timm"], tmp_path / "eva", format="eva", preset="tiny", overrides=FLAGS)
    tensors = {name: tensor.read() for name, tensor in open_tensors(tmp_path / "eva").items()}
    cos, sin = (np.repeat(table, 2, axis=-1) for table in rotary_2d(4, 32, theta, 16))
    tensors |= {"visual.rope.freqs_cos": cos, "visual.blocks.1.attn.rope.freqs_sin": sin}
    tensors |= {"text.positional_embedding": np.zeros((7, 5), "f4"), "logit_scale": np.ones((), "f4")}
    tensors |= {"visual.head.weight": np.zeros((8, 64), "f4"), "visual.head.bias": np.zeros(8, "f4")}
    save_file(tensors, tmp_path / "EVA.safetensors")
    return tmp_path / "EVA.safetensors"


def test_what_else_a_clip_file_holds_is_named_and_its_tables_are_checked(parts, tmp_path):
    source = open_source(eva_file(parts, tmp_path, 10_000.0), "tiny", FLAGS)
    assert source.layout == "eva"
    assert source.left_out == "4 tensors are left out: CLIP's projection, text tower and temperature"
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in load_file(tmp_path / "EVA.safetensors").items()}
    torch.save({"epoch": 9, "state_dict": state}, tmp_path / "EVA.pt")
    quiet = dict(preset="tiny", overrides=FLAGS, format="eva", tell=lambda line: None)
    for suffix in ("safetensors", "pt"):
        convert([tmp_path / f"EVA.{suffix}"], tmp_path / suffix, **quiet)
    files = [(tmp_path / suffix / "model.safetensors").read_bytes() for suffix in ("safetensors", "pt")]
    assert files[0] == files[1] == (tmp_path / "eva/model.safetensors").read_bytes()
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="freqs_(cos|sin) is not the rotary table of this config"):
        open_source(eva_file(parts, tmp_path / "other", 100.0), "tiny", FLAGS)


def test_parts_that_make_no_model(parts, tmp_path):
    for sources, message in [
        ([parts / "timm", parts / "timm"], "both have the part vision"),
        ([parts / "llama"], "has no patchify, projector, special_embedding, vision, which the format orbax holds"),
        ([parts / "timm"], "has no llm, patchify"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(sources, tmp_path / "no", preset="tiny", overrides=FLAGS)
        assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_an_assembled_model_is_verified_part_by_part(parts, tmp_path, capsys):
    """The encoder against our tower in PyTorch, which resizes by itself, the decoder against transformers."""
    pytest.importorskip("transformers")
    flags = [
        "convert",
        f"--to={tmp_path / 'start'}",
        "--preset=tiny",
        "--verify",
        "--config.model.vision.pos_embed_grid=8",
    ]
    flags += [f"--config.{key}={value}" for key, value in FLAGS.items()]
    code = cli.main([*flags, f"--vision={parts / 'timm'}", f"--llm={parts / 'llama'}"])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert "(timm, PyTorch): 256 vision tokens: features differ by" in told.out
    assert "(llama, PyTorch): 600 tokens (0 of them vision): logits differ by" in told.out
    assert "32 of 32 greedy tokens agree" in told.out
    convert([parts / "timm"], tmp_path / "eva", format="eva", preset="tiny", overrides=FLAGS)
    tensors = load_file(tmp_path / "eva" / "model.safetensors")
    for change in (1.0, 1.02):
        name = "visual.blocks.1.mlp.w2.weight"
        save_file({**tensors, name: tensors[name] * np.float32(change)}, tmp_path / "eva" / "model.safetensors")
        code = cli.main([*flags, f"--vision={tmp_path / 'eva'}", f"--llm={parts / 'llama'}"])
        told = capsys.readouterr()
        assert code == (0 if change == 1 else 2), told.err
        assert ("eva is not the same model as" in told.err) == (change != 1) == told.err.count("\n")
