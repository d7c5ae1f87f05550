"""`kangaroo convert --verify` of a bare Llama, of a released Kangaroo, and of what cannot be compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kangaroo_jax.cli import main as cli
from tests.conversion.conftest import small_config
from tests.conversion.test_round_trip import quiet
from tests.conversion.test_transformers import SCALING, make_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def run(capsys, *flags) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["convert", *map(str, flags)])
    told = capsys.readouterr()
    assert told.err.count("\n") == (code != 0), told.err  # one line
    return code, told.out, told.err


@pytest.mark.parametrize("changes", [{}, {"llm__rope_scaling__factor": 8.0, "llm__rope_scaling__original_length": 64}])
def test_our_decoder_and_transformers_llama(changes, make_checkpoint, tmp_path, capsys):
    checkpoint = make_checkpoint("float32", **changes)
    flags = [f"--from={checkpoint}", f"--to={tmp_path / 'llama'}", "--format=llama", "--verify"]
    code, out, _ = run(capsys, *flags)
    (line,) = [line for line in out.splitlines() if "greedy" in line]
    assert code == 0 and "(orbax, JAX)" in line and "(llama, PyTorch)" in line
    assert "(0 of them vision)" in line and "KL" in line and "32 of 32 greedy tokens agree" in line
    assert int(line.split("PyTorch): ")[1].split(" tokens")[0]) >= 600
    if not changes:  # once is enough
        return
    raw = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "llama/config.json").write_text(json.dumps({**raw, "rope_theta": 50_000.0}))
    code, _, error = run(capsys, *flags)
    assert code == 2 and "llama is not the same model as" in error and "logits differ by" in error


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["llama3", "llama31"])
def test_a_llama_of_transformers_without_a_tokenizer(scaling, tmp_path, capsys):
    """Random tokens; what JAX runs is Meta's file, or the very folder that PyTorch runs."""
    make_llama(tmp_path / "hf", scaling)
    if scaling is None:
        flags = [f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'meta'}", "--format=meta", "--verify"]
        code, out, _ = run(capsys, *flags)
        assert code == 0 and "(meta, JAX)" in out
    else:
        code, out, _ = run(capsys, f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'hf'}", "--verify")
        assert code == 0 and "(llama, JAX)" in out
    assert "600 tokens (0 of them vision)" in out and "32 of 32 greedy tokens agree" in out


def test_a_tokenizer_that_differs(checkpoint, tmp_path, capsys):
    quiet([checkpoint], tmp_path / "hf")
    flags = [f"--from={checkpoint}", f"--to={tmp_path / 'llama'}", "--format=llama", "--verify"]
    quiet([checkpoint], tmp_path / "llama", format="llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "llama")
    assert run(capsys, *flags)[0] == 0
    spec = json.loads((tmp_path / "llama/tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:5]
    (tmp_path / "llama/tokenizer.json").write_text(json.dumps(spec))
    code, _, error = run(capsys, *flags)
    assert code == 2 and "its tokenizer gives other tokens than" in error


@pytest.fixture(scope="module")
def released(checkpoint, tmp_path_factory) -> Path:
    """A folder as others would publish it: release names, a config.json of a Llama, a tokenizer, their own code."""
    hf = quiet([checkpoint], tmp_path_factory.mktemp("hf") / "hf")
    folder = tmp_path_factory.mktemp("released")
    tensors = load_file(hf / "model.safetensors")
    for part in ("weight", "bias"):
        tensors[f"video_conv.{part}"] = tensors.pop(f"patchify.{part}")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    raw = json.loads((hf / "config.json").read_text())
    ours = ("patchify_config", "time_config", "special_ids", "frame_sampling", "header_ids", "eot_token_id")
    raw = {key: value for key, value in raw.items() if key not in (*ours, "vision_config", "mm_projector_type")}
    raw["auto_map"] = {"AutoModelForCausalLM": "modeling_theirs.Theirs", "AutoConfig": "modeling_theirs.Config"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modeling_theirs.py").write_text("raise SystemExit('code of a downloaded folder was run')\n")
    shutil.copy(hf / "tokenizer.json", folder)
    return folder


def flags_of_the_model() -> list[str]:
    """What a release's config.json does not say, and the preset says otherwise."""
    config = small_config()
    keys = ("width", "depth", "heads", "mlp_width", "pos_embed_grid", "rope_reference_grid")
    flags = [f"--config.model.vision.{key}={config.model.vision[key]}" for key in keys]
    keys = ("image_size", "min_frames", "max_frames", "long_min_frames", "long_max_frames")
    return ["--preset=tiny", *flags, *(f"--config.data.{key}={config.data[key]}" for key in keys)]


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)])
def test_a_released_kangaroo(kind, released, video, tmp_path, capsys):
    source = shutil.copytree(released, tmp_path / "released")
    if kind == "bin":
        state = {}
        for file in source.glob("*.safetensors"):
            state.update({name: torch.from_numpy(array) for name, array in load_file(file).items()})
            file.unlink()
        (source / "model.safetensors.index.json").unlink()
        torch.save(state, source / "pytorch_model.bin")
    flags = [f"--from={source}", f"--to={tmp_path / 'ours'}", "--verify", f"--video={video}", *flags_of_the_model()]
    code, out, error = run(capsys, *flags)
    assert code == 0, error
    (line,) = [line for line in out.splitlines() if "greedy" in line]
    assert "(orbax, JAX)" in line and "(kangaroo, PyTorch)" in line and "32 of 32 greedy tokens agree" in line
    tokens, vision = (
        int(line.split("PyTorch): ")[1].split(" tokens")[0]),
        int(line.split("tokens (")[1].split(" of")[0]),
    )
    assert tokens >= 600 and vision >= 48
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "rope_theta": 50_000.0}))
    code, _, error = run(capsys, *flags)
    assert code == 2 and "released is not the same model as" in error


def test_a_release_spoilt_after_its_conversion(released, video, tmp_path, capsys):
    source = shutil.copytree(released, tmp_path / "released")
    flags = [f"--from={source}", f"--to={tmp_path / 'ours'}", *flags_of_the_model(), f"--video={video}"]
    assert run(capsys, *flags)[0] == 0
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = source / index["weight_map"]["video_conv.bias"]
    tensors = load_file(file)
    tensors["video_conv.bias"] = tensors["video_conv.bias"] + np.float32(0.5)
    save_file(tensors, file)
    code, _, error = run(capsys, *flags, "--verify")
    assert code == 2 and "is not the same model as" in error


def test_what_cannot_be_compared(checkpoint, tmp_path, capsys):
    for format in ("meta", "eva", "llama"):
        quiet([checkpoint], tmp_path / format, format=format)
    flags = flags_of_the_model()
    for source, target, message in [
        (checkpoint, checkpoint, "PyTorch runs neither"),
        (checkpoint, tmp_path / "meta", "one of them should be llama or hf; convert it"),
        (tmp_path / "eva", tmp_path / "llama", "share nothing"),
    ]:
        code, _, error = run(capsys, f"--from={source}", f"--to={target}", "--verify", *flags)
        assert code == 2 and message in error, error
    code, _, error = run(capsys, f"--from={checkpoint}", f"--to={tmp_path / 'x'}", "--verify", "--lora=a", *flags)
    assert code == 2 and "convert with --lora first" in error and not (tmp_path / "x").exists()


def _attacked(folder, marker, own_code: str) -> None:
    """Name code of the folder wherever a library looks for some; the code that an export ships is the same or not."""
    code = f"open({str(marker)!r}, 'a').write(__file__ + '\\n')\n"
    (folder / "evil.py").write_text(code + "class KangarooForCausalLM: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, *args, **kwargs): pass\n")
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    raw["auto_map"]["AutoModelForCausalLM"] = "evil.KangarooForCausalLM"
    raw.update(attn_implementation="evil/kernel", _attn_implementation="evil/kernel")
    (folder / "config.json").write_text(json.dumps(raw))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for file in folder.glob("*_kangaroo.py") if own_code != "the same" else ():
        file.write_text(code + file.read_text())


@pytest.mark.parametrize("own_code", ["the same", "another, which was not run"])
def test_code_of_a_folder_is_never_run(own_code, checkpoint, video, tmp_path, capsys):
    evil, marker = tmp_path / "evil", tmp_path / "was_run"
    assert run(capsys, f"--from={checkpoint}", f"--to={evil}")[0] == 0
    _attacked(evil, marker, own_code)
    flags = [f"--from={evil}", f"--to={tmp_path / 'ours'}", "--verify", f"--video={video}"]
    code, out, _ = run(capsys, *flags)
    assert code == 0 and "32 of 32 greedy tokens agree" in out and not marker.exists()
    assert f"by this package's model file (the folder's own code is {own_code})" in out


def test_code_of_a_llama_is_never_run(checkpoint, tmp_path, capsys):
    evil, marker = tmp_path / "evil", tmp_path / "was_run"
    assert run(capsys, f"--from={checkpoint}", f"--to={evil}", "--format=llama")[0] == 0
    (evil / "tokenizer_config.json").write_text('{"tokenizer_class": "Tokenizer"}')
    _attacked(evil, marker, "the same")
    code, out, _ = run(capsys, f"--from={evil}", f"--to={evil}", "--verify")
    assert code == 0 and "by transformers' LlamaForCausalLM" in out and not marker.exists()
