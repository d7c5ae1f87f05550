"""What is damaged, wrong or hostile is named in one line with exit code 2, and nothing is left at the target."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kangaroo_jax.cli import main as cli
from kangaroo_jax.conversion.convert import convert


@pytest.fixture(scope="module")
def pristine(checkpoint, tmp_path_factory) -> Path:
    """An export in several shards."""
    folder = tmp_path_factory.mktemp("pristine") / "hf"
    return convert([checkpoint], folder, shard_bytes=60_000, tell=lambda line: None)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], new_name: str = "") -> None:
    """Change a tensor (or its name) where it stands."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    tensors[new_name or name] = np.ascontiguousarray(change(tensors.pop(name)))
    index["weight_map"][new_name or name] = file.name
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    file = shards(folder)[1]
    os.truncate(file, file.stat().st_size - 10)


def flip_header(folder: Path) -> None:
    data = bytearray(shards(folder)[0].read_bytes())
    data[7] ^= 0x40  # the length of the header
    shards(folder)[0].write_bytes(data)


def flip_header_text(folder: Path) -> None:
    data = bytearray(shards(folder)[0].read_bytes())
    data[8] ^= 0x01
    shards(folder)[0].write_bytes(data)


def missing_shard(folder: Path) -> None:
    shards(folder)[2].unlink()


def missing_shard_without_index(folder: Path) -> None:
    shards(folder)[2].unlink()
    (folder / "model.safetensors.index.json").unlink()


def same_tensor_twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    tensors = load_file(shards(folder)[0])
    first = next(iter(tensors))
    save_file({**load_file(shards(folder)[1]), first: tensors[first]}, shards(folder)[1])


def swap_query_and_key(folder: Path) -> None:
    taken: list[np.ndarray] = []
    for name in ("q_proj", "k_proj"):
        change_tensor(folder, f"model.layers.1.self_attn.{name}.weight", lambda x: taken.append(x) or x)
    for name, other in (("q_proj", taken[1]), ("k_proj", taken[0])):
        change_tensor(folder, f"model.layers.1.self_attn.{name}.weight", lambda _, other=other: other)


def rename(folder: Path) -> None:
    change_tensor(folder, "model.layers.2.mlp.up_proj.weight", lambda x: x, "model.layers.2.mlp.upproj.weight")


def nan(folder: Path) -> None:
    def spoil(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x.reshape(-1)[[3, 7]] = np.nan, np.inf
        return x

    change_tensor(folder, "vision_tower.blocks.1.mlp.w2.weight", spoil)


def other_config(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_key_value_heads": 3}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_key(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["window"] = 7
    (folder / "config.json").write_text(json.dumps(raw))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def hostile_pickle(folder: Path) -> None:
    for file in shards(folder):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.embed_tokens.weight": Hostile()}, file, protocol=2)


def hostile_zip(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    for file in shards(folder):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save({"model.embed_tokens.weight": torch.ones(2), "x": Hostile()}, folder / "pytorch_model.bin")


def torch_file_cut_short(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(a) for file in shards(folder) for name, a in load_file(file).items()}
    for file in (*shards(folder), folder / "model.safetensors.index.json"):
        file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", 30_000)


CORRUPTIONS: dict[Callable[[Path], None], str] = {
    truncate: "model-00002-of-",
    flip_header: "damaged or cut short (Error while deserializing header",
    flip_header_text: "damaged or cut short (Error while deserializing header: invalid JSON",
    missing_shard: "missing; model.safetensors.index.json says that it holds weights",
    missing_shard_without_index: "missing; it is one of",
    same_tensor_twice: "is also in model-00001",
    swap_query_and_key: "of shape (16, 48) where the config wants (48, 48): model.layers.1.self_attn.q_proj.weight",
    rename: "missing: model.layers.2.mlp.up_proj.weight; unknown: model.layers.2.mlp.upproj.weight",
    nan: "2 of 1280 numbers of vision_tower.blocks.1.mlp.w2.weight are NaN or infinite",
    other_config: "of shape (16, 48) where the config wants (24, 48): model.layers.{0-2}.self_attn.k_proj.weight",
    no_config: "no config.json beside the weights",
    unknown_key: "vision_config: 'window' is no key of this model",
    hostile_pickle: "refused, nothing of it was run",
    hostile_zip: "refused, nothing of it was run: it refers to",
    torch_file_cut_short: "damaged or no torch file",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_it_is_one_line_exit_code_2_and_nothing_is_left(corrupt, pristine, tmp_path, capsys, monkeypatch):
    if corrupt is hostile_pickle:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(pristine, tmp_path / "source")
    corrupt(source)
    before = sorted(p.name for p in tmp_path.iterdir())
    code = cli.main(["convert", f"--from={source}", f"--to={tmp_path / 'target'}"])
    error = capsys.readouterr().err
    assert code == 2 and CORRUPTIONS[corrupt] in error, error
    assert error.startswith("kangaroo: ") and error.count("\n") == 1 and len(error) < 600
    assert sorted(p.name for p in tmp_path.iterdir()) == before


OURS = {
    "cut": (lambda chunk: os.truncate(chunk, 100), "llm/layers/mlp/up/kernel cannot be read"),
    "nan": (
        lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-4] + b"\x00\x00\xc0\x7f"),
        "1 of 3840 numbers of llm/",
    ),
    "gone": (lambda chunk: shutil.rmtree(chunk.parent), "llm/layers/mlp/up/kernel cannot be read"),
}


@pytest.mark.parametrize("name", OURS)
def test_a_damaged_checkpoint_of_ours(name, pristine, tmp_path, capsys):
    convert([pristine], tmp_path / "ours", tell=lambda line: None)
    corrupt, message = OURS[name]
    corrupt(tmp_path / "ours" / "params" / "llm/layers/mlp/up/kernel" / "1.0.0")
    code = cli.main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'target'}"])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` in `folder`; the test is skipped where none can be mounted."""
    mount = folder / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_before_it_is_written_to(pristine, tmp_path):
    """A file system of 100 KB, which is smaller than the model."""
    with small_disk(tmp_path, "100k") as mount:
        code = cli.main(["convert", f"--from={pristine}", f"--to={mount / 'target'}"])
        assert code == 2 and not list(mount.iterdir())


def test_a_disk_that_fills_while_it_is_written_to(pristine, tmp_path, monkeypatch, capsys):
    """The same, with the check beforehand taken out: the write itself fails."""
    from kangaroo_jax.conversion.building import Building

    monkeypatch.setattr(Building, "need", lambda self, nbytes: None)
    with small_disk(tmp_path, "200k") as mount:
        code = cli.main(["convert", f"--from={pristine}", f"--to={mount / 'target'}"])
        error = capsys.readouterr().err
        assert code == 2 and "the disk is full; nothing was kept" in error and error.count("\n") == 1
        assert not list(mount.iterdir())


@pytest.mark.parametrize("format", ["orbax", "meta"])
def test_a_limit_on_the_size_of_files(format, pristine, tmp_path, tmp_path_factory, capsys):
    size = 10_000
    if format == "meta":  # in the midst of what torch writes, which is longer than the safetensors file before it
        pytest.importorskip("torch")
        whole = convert([pristine], tmp_path_factory.mktemp("whole") / "meta", format=format, tell=lambda line: None)
        size = (whole / "consolidated.00.pth").stat().st_size - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal: the write fails
    try:
        code = cli.main(["convert", f"--from={pristine}", f"--to={tmp_path / 'target'}", f"--format={format}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert code == 2 and "takes no file of that size; nothing was kept" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


BAD = {
    "--from=none": "none: no such file or folder",
    "--from=empty": "no weights here",
    "--from=text.txt": "weights are read from",
    "--from=other.safetensors": "no weights of a known layout",
    "--vision=other.safetensors": "--vision needs --llm, the decoder",
    "--from=hf --vision=hf": "give --from, or --llm, perhaps with --vision",
    "": "give --from, or --llm, perhaps with --vision",
    "--from=hf --format=onnx": "--format=onnx: use one of orbax, hf",
    "--from=hf --dtype=int8": "--dtype=int8: use one of keep",
    "--from=hf --preset=tinny": "no preset 'tinny'",
    "--from=hf --config.model.vision.widht=3": "no key 'model.vision.widht' (did you mean 'model.vision.width'?)",
    "--from=hf --to=empty2/full": "exists already",
    "--from=hf --tokenizer=text.txt": "neither a tokenizer.json nor",
    "--from=hf --lora=empty": "adapter_config.json: cannot be read",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(flags, pristine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").symlink_to(pristine)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty2/full/x").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("text")
    save_file({"a": np.ones(3, "f4")}, tmp_path / "other.safetensors")
    format = [] if "--format" in flags else ["--format=hf"]
    code = cli.main(["convert", "--to=target", *format, *flags.split()])
    error = capsys.readouterr().err
    assert code == 2 and BAD[flags] in error and error.count("\n") == 1, error
    assert not (tmp_path / "target").exists() and not (tmp_path / "target.partial").exists()
