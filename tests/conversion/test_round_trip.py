"""There and back again: every weight of every layout, bit for bit."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.files import open_tensors
from kangaroo_jax.models.parameters import abstract_model

MODEL_FLAGS = {  # what an encoder's file does not say
    f"model.vision.{key}": value
    for key, value in dict(patch_size=8, width=32, depth=3, heads=2, mlp_width=40, rope_reference_grid=4).items()
}

PATCHES = {"model.vision.pos_embed_grid": 4}


def quiet(*args, **kwargs) -> Path:
    return convert(*args, tell=lambda line: None, **kwargs)


def restored(folder: Path) -> dict[str, np.ndarray]:
    """The parameters as Orbax restores them for training."""
    config = reading.load_config(folder)
    params = reading.load_params(folder, abstract_model(ModelConfig.from_config(config.model)))
    return {path: np.asarray(value) for path, value in params.items()}


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(sorted(a)) == list(sorted(b))
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(bits(a[name]), bits(b[name]), err_msg=name)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as the safetensors or torch library reads it."""
    if files := sorted(folder.glob("model*.safetensors")):
        found = {}
        for file in files:
            with safe_open(file, "flax") as opened:
                found.update({name: np.asarray(opened.get_tensor(name)) for name in opened.keys()})
        return found
    torch = pytest.importorskip("torch")
    (file,) = folder.glob("*.pth")
    loaded = torch.load(file, weights_only=True, mmap=True)
    narrow = {
        n: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for n, t in loaded.items() if t.dtype == torch.bfloat16
    }
    return {name: narrow[name] if name in narrow else t.numpy() for name, t in loaded.items()}


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float32", False), ("bfloat16", False), ("mixed", False), ("mixed", True)]
)
def test_checkpoint_to_hugging_face_and_back(make_checkpoint, dtype, tied, tmp_path):
    checkpoint = make_checkpoint(dtype, llm__tied_head=True) if tied else make_checkpoint(dtype)
    quiet([checkpoint], tmp_path / "hf")
    quiet([tmp_path / "hf"], tmp_path / "again")
    assert_same(restored(checkpoint), restored(tmp_path / "again"))
    config = reading.load_config(checkpoint)
    assert reading.load_config(tmp_path / "again").to_dict() == config.to_dict()
    assert reading.find_tokenizer(tmp_path / "again").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    quiet([tmp_path / "again"], tmp_path / "hf2", shard_bytes=40_000)
    assert len(list((tmp_path / "hf2").glob("model-*-of-*.safetensors"))) > 2
    assert_same(tensors(tmp_path / "hf"), tensors(tmp_path / "hf2"))
    same = ("config.json", "tokenizer.json", "kangaroo_jax.json", "kangaroo_jax.safetensors")
    assert all((tmp_path / "hf" / f).read_bytes() == (tmp_path / "hf2" / f).read_bytes() for f in same)


def test_the_marks_stand_in_the_embedding_there(checkpoint, tmp_path):
    params = restored(checkpoint)
    quiet([checkpoint], tmp_path / "hf")
    embedding = tensors(tmp_path / "hf")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding[6:10], params["special_embedding"])
    np.testing.assert_array_equal(embedding[:6], params["llm/embedding"][:6])
    for name in ("kangaroo_jax.json", "kangaroo_jax.safetensors"):  # as a folder that we did not write
        (tmp_path / "hf" / name).unlink()
    quiet([tmp_path / "hf"], tmp_path / "again", preset="tiny")
    again = restored(tmp_path / "again")
    np.testing.assert_array_equal(again["special_embedding"], params["special_embedding"])
    np.testing.assert_array_equal(again["llm/embedding"], embedding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("first", "second"), [("llama", "meta"), ("meta", "llama"), ("eva", "timm"), ("timm", "eva")])
def test_one_layout_to_another_and_back(make_checkpoint, dtype, first, second, tmp_path):
    if "meta" in (first, second):
        pytest.importorskip("torch")
    options = {"overrides": MODEL_FLAGS if first in ("eva", "timm") else {}}
    quiet([make_checkpoint(dtype)], tmp_path / "a", format=first)
    quiet([tmp_path / "a"], tmp_path / "b", format=second, **options)
    quiet([tmp_path / "b"], tmp_path / "c", format=first, **options)
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))
    assert not set(tensors(tmp_path / "a")) & set(tensors(tmp_path / "b")) - {"cls_token", "pos_embed"} or first in (
        "eva",
        "timm",
    )
    for name in ("config.json", "params.json"):
        if (tmp_path / "a" / name).exists():
            assert (tmp_path / "a" / name).read_text() == (tmp_path / "c" / name).read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vision", "llm"), [("eva", "llama"), ("timm", "meta")])
def test_parts_to_a_checkpoint_and_back(make_checkpoint, dtype, vision, llm, tmp_path):
    """Every bare layout into ours, with what neither part has beside it, and out again: the same bits and configs."""
    if llm == "meta":
        pytest.importorskip("torch")
    for format in (vision, llm):
        quiet([make_checkpoint(dtype)], tmp_path / format, format=format)
    quiet([tmp_path / vision, tmp_path / llm], tmp_path / "ours", preset="tiny", overrides=MODEL_FLAGS | PATCHES)
    for format in (vision, llm):
        quiet([tmp_path / "ours"], tmp_path / f"{format}2", format=format)
        assert_same(tensors(tmp_path / format), tensors(tmp_path / f"{format}2"))
    config = {"llama": "config.json", "meta": "params.json"}[llm]
    assert (tmp_path / llm / config).read_text() == (tmp_path / f"{llm}2" / config).read_text()


def test_our_conversion_is_what_training_restores_on_a_mesh(checkpoint, tmp_path):
    from kangaroo_jax.sharding import make_mesh

    quiet([checkpoint], tmp_path / "hf")
    quiet([tmp_path / "hf"], tmp_path / "again")
    mesh = make_mesh((1, 2, 1, 1), jax.devices()[:2])
    binding = abstract_model(ModelConfig.from_config(reading.load_config(tmp_path / "again").model))
    params = reading.load_params(tmp_path / "again", binding, mesh)
    assert len(params["llm/layers/mlp/gate/kernel"].sharding.device_set) == 2
    assert_same({path: np.asarray(value) for path, value in params.items()}, restored(checkpoint))


def test_large_tensors_go_in_ranges(checkpoint, tmp_path, monkeypatch):
    from kangaroo_jax.conversion import weights

    monkeypatch.setattr(weights, "BOX_BYTES", 7_000)  # cuts the embedding and the head in uneven pieces
    quiet([checkpoint], tmp_path / "hf")
    quiet([tmp_path / "hf"], tmp_path / "again")
    assert len(list((tmp_path / "again/params/llm/head/kernel").glob("[0-9]*"))) > 5
    assert_same(restored(checkpoint), restored(tmp_path / "again"))


def test_dtype_rounds_to_nearest_even(checkpoint, tmp_path):
    quiet([checkpoint], tmp_path / "hf", dtype="bfloat16")
    quiet([tmp_path / "hf"], tmp_path / "again")
    expected = {path: np.asarray(jnp.asarray(value, jnp.bfloat16)) for path, value in restored(checkpoint).items()}
    assert_same(restored(tmp_path / "again"), expected)


def test_torch_files_and_shards_of_other_tools(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    quiet([checkpoint], tmp_path / "hf")
    found = tensors(tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "bin", ignore=shutil.ignore_patterns("model*.safetensors"))
    torch.save({n: torch.from_numpy(a.copy()) for n, a in found.items()}, tmp_path / "bin" / "pytorch_model.bin")
    quiet([tmp_path / "bin"], tmp_path / "again")
    assert_same(restored(checkpoint), restored(tmp_path / "again"))


def test_old_torch_files_and_training_wrappers(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"module.a.weight": torch.arange(6.0).reshape(2, 3), "module.b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = open_tensors(tmp_path / "old.pt")
    assert sorted(found) == ["a.weight", "b"]
    np.testing.assert_array_equal(found["a.weight"].read(1, 2), [[3, 4, 5]])
    assert found["b"].read().dtype == ml_dtypes.bfloat16


def test_metas_model_parallel_files_are_put_together(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    quiet([checkpoint], tmp_path / "one", format="meta")
    whole = torch.load(tmp_path / "one" / "consolidated.00.pth", weights_only=True)
    (tmp_path / "two").mkdir()
    for rank in range(2):
        part = {}
        for name, tensor in whole.items():
            kind = name.split(".")[-2]
            axis = 1 if kind in ("wo", "w2") else None if "norm" in kind else 0
            part[name] = tensor if axis is None else tensor.chunk(2, dim=axis)[rank].clone()
        torch.save(part, tmp_path / "two" / f"consolidated.{rank:02d}.pth")
    shutil.copy(tmp_path / "one" / "params.json", tmp_path / "two")
    quiet([tmp_path / "two"], tmp_path / "again", format="meta")
    assert_same(tensors(tmp_path / "one"), tensors(tmp_path / "again"))


def test_the_torch_file_is_laid_out_as_torch_lays_it_out(checkpoint, tmp_path):
    """Storages begin at multiples of 64 bytes, and a copy that torch writes holds the same."""
    torch = pytest.importorskip("torch")
    import zipfile

    quiet([checkpoint], tmp_path / "meta", format="meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            if "/data/" in info.filename:
                header = path.read_bytes()[info.header_offset : info.header_offset + 30]
                begin = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
                assert (begin + int.from_bytes(header[28:30], "little")) % 64 == 0
    state = torch.load(path, weights_only=True)
    assert all(t.is_contiguous() for t in state.values())


def test_an_interrupted_conversion_goes_on_where_it_stopped(checkpoint, tmp_path, monkeypatch):
    from kangaroo_jax.conversion import store

    quiet([checkpoint], tmp_path / "hf")
    written: list[str] = []

    class Stopped(store.Building):
        def done(self, name: str) -> None:
            super().done(name)
            written.append(name)
            if len(written) == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr("kangaroo_jax.conversion.convert.Building", Stopped)
    with pytest.raises(KeyboardInterrupt):
        quiet([tmp_path / "hf"], tmp_path / "again")
    assert not (tmp_path / "again").exists() and (tmp_path / "again.partial").is_dir()
    first = list(written)
    quiet([tmp_path / "hf"], tmp_path / "again")
    assert len(first) == 20 and not set(first) & set(written[20:])
    assert not (tmp_path / "again.partial").exists()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config", "params", "tokenizer.model"]
    assert_same(restored(checkpoint), restored(tmp_path / "again"))


def test_an_interrupted_export_keeps_its_finished_shards(checkpoint, tmp_path, monkeypatch):
    from kangaroo_jax.conversion import building

    class Stopped(building.Building):
        def done(self, name: str) -> None:
            super().done(name)
            if name.startswith("model-00003"):
                raise KeyboardInterrupt

    monkeypatch.setattr("kangaroo_jax.conversion.convert.Building", Stopped)
    with pytest.raises(KeyboardInterrupt):
        quiet([checkpoint], tmp_path / "hf", shard_bytes=40_000)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "hf.partial").glob("model-0000[123]*")}
    assert len(kept) == 3 and not (tmp_path / "hf").exists()
    monkeypatch.undo()
    quiet([checkpoint], tmp_path / "hf", shard_bytes=40_000)
    assert all((tmp_path / "hf" / p.name).stat().st_mtime_ns == time for p, time in kept.items())
    quiet([checkpoint], tmp_path / "whole", shard_bytes=40_000)
    assert_same(tensors(tmp_path / "hf"), tensors(tmp_path / "whole"))


def test_a_stage_starts_from_a_conversion(checkpoint, tmp_path):
    """What training loads of `init_from` is what was converted."""
    quiet([checkpoint], tmp_path / "hf")
    quiet([tmp_path / "hf"], tmp_path / "start")
    config = ConfigDict(reading.load_config(tmp_path / "start").to_dict())
    binding = abstract_model(ModelConfig.from_config(config.model))
    assert reading.find(tmp_path / "start") == tmp_path / "start"
    assert set(reading.load_params(tmp_path / "start", binding)) == set(binding.shapes)
