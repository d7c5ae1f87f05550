"""Folders as other people leave them: which file is taken, wrapped names, what is not said, and hostile files."""

import json
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kangaroo_jax.checkpoints.stored import Stored
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import stage_config
from kangaroo_jax.conversion import formats
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.files import open_tensors
from kangaroo_jax.conversion.sources import open_source
from kangaroo_jax.conversion.tokenizers import from_sentencepiece, write_tokenizer
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError

WHOLE = "model.safetensors"


@pytest.fixture(scope="module")
def llama(checkpoint, tmp_path_factory) -> Path:
    """A decoder as Hugging Face lays it out, in one file."""
    return convert([checkpoint], tmp_path_factory.mktemp("llama") / "hf", format="llama", tell=lambda line: None)


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "hf")


def change_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def write_header(file: Path, entries: object, data: int = 0) -> None:
    header = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


# ------------------------------------------------------------------------------------ which file is taken


def test_the_file_that_transformers_takes_is_taken_and_others_are_named(folder):
    shutil.copyfile(folder / WHOLE, folder / "model.fp16.safetensors")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    (folder / "training_args.bin").write_bytes(b"no weights")
    source = open_source(folder, "tiny")
    assert [file.name for file in source.files] == [WHOLE]
    assert source.left_out == "model.fp16.safetensors, pytorch_model.bin.index.json beside the weights: not read"


def test_the_single_file_goes_before_an_index(folder):
    save_file({"other": np.zeros(1, np.float32)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"other": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in open_source(folder, "tiny").files] == [WHOLE]


def test_weights_of_a_trainer_are_taken_without_its_settings(folder):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in load_file(folder / WHOLE).items()}, folder / "pytorch_model.bin")
    (folder / WHOLE).unlink()
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"no weights")
    source = open_source(folder, "tiny")
    assert [file.name for file in source.files] == ["pytorch_model.bin"] and not source.left_out


def test_a_git_lfs_pointer_is_named(folder):
    (folder / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 118\n")
    with pytest.raises(UserError, match="a git-lfs pointer, not the weights themselves"):
        open_source(folder, "tiny")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.base_model.model."])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_wrappers_put_before_the_names_is_left_out(prefix, kind, folder):
    arrays = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    if kind == "bin":
        torch = pytest.importorskip("torch")
        named = {prefix + name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save(named, folder / "pytorch_model.bin")
    else:
        save_file({prefix + name: array for name, array in arrays.items()}, folder / WHOLE)
    source = open_source(folder, "tiny")
    found = source.weights.read("llm/norm/scale", (slice(0, 48),))
    np.testing.assert_array_equal(found, arrays["model.norm.weight"])


def test_a_path_with_a_comma(folder, tmp_path, capsys):
    from kangaroo_jax.cli import main as cli

    odd = folder.rename(tmp_path / "a,b")
    assert cli.main(["convert", f"--from={odd}", f"--to={tmp_path / 'out'}", "--format=llama", "--preset=tiny"]) == 0
    assert (tmp_path / "out" / WHOLE).is_file()


# ------------------------------------------------------------------------------ what is not said, and is needed


def test_a_missing_head_is_an_error_unless_the_config_says_tied(folder):
    arrays = load_file(folder / WHOLE)
    del arrays["lm_head.weight"]
    save_file(arrays, folder / WHOLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight is missing, and config.json does not say tie_word_embeddings"):
        open_source(folder, "tiny")
    change_config(folder, tie_word_embeddings=True)
    assert open_source(folder, "tiny").layout == "llama"


@pytest.mark.parametrize(("sizes", "factor"), [((2048, 16), 32.0), ((3072, 28), 32.0), ((4096, 32), 8.0)])
def test_the_factor_of_metas_rope_scaling_follows_from_the_sizes(sizes, factor):
    raw = dict(dim=sizes[0], n_layers=sizes[1], n_heads=32, norm_eps=1e-5, multiple_of=256, use_scaled_rope=True)
    for said, expected in (({}, factor), ({"rope_scaling_factor": 4}, 4.0)):
        model = stage_config("kangaroo_8b").model
        formats.read_meta({**raw, **said}, model, Path("params.json"), 128_256)
        assert model.llm.rope_scaling.factor == expected


def test_the_factor_that_was_taken_is_said(checkpoint, make_checkpoint, tmp_path):
    pytest.importorskip("torch")
    scaled = make_checkpoint("float32", llm__rope_scaling__factor=8.0)
    meta = convert([scaled], tmp_path / "meta", format="meta", tell=lambda line: None)
    assert not open_source(meta, "tiny").left_out
    raw = json.loads((meta / "params.json").read_text())
    del raw["rope_scaling_factor"]
    (meta / "params.json").write_text(json.dumps(raw))
    assert open_source(meta, "tiny").left_out == "the rope scaling's factor is not said: by the sizes it is 8"


# ------------------------------------------------------------------------------------- what a Llama is written with


def test_a_llama_has_its_ids_length_and_tokenizer(checkpoint, llama, tokenizer_file):
    raw = json.loads((llama / "config.json").read_text())
    generation = json.loads((llama / "generation_config.json").read_text())
    tokenizer = load_tokenizer(tokenizer_file)
    for value in (raw, generation):
        assert value["eos_token_id"] == [tokenizer.eos, tokenizer.eot] and value["bos_token_id"] == tokenizer.bos
    assert raw["max_position_embeddings"] == 8192
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|eot_id|>" and "<|start_header_id|>" in settings["chat_template"]
    assert load_tokenizer(llama / "tokenizer.json").encode("A red square") == tokenizer.encode("A red square")


def test_what_a_llama_says_of_itself_is_carried_on(folder, tmp_path):
    change_config(folder, max_position_embeddings=131_072, eos_token_id=5)
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096}
    ids = {"eos_token_id": [309, 5], "bos_token_id": 7}
    by = {"_from_model_config": True, "transformers_version": "4.57.6"}
    (folder / "generation_config.json").write_text(json.dumps({**by, **ids, **sampled}))
    told: list[str] = []
    convert([folder], tmp_path / "again", format="llama", preset="tiny", tell=told.append)
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (raw["max_position_embeddings"], raw["eos_token_id"], raw["bos_token_id"]) == (131_072, [309, 5], 7)
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation.items() >= (ids | sampled).items() and not generation.keys() & by.keys()


TOKEN = {"content": "<|over|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TEMPLATE = "{{ messages[0].content }}"
SETTINGS_OF = {
    "transformers 4": {
        "special_tokens_map.json": {"eos_token": TOKEN, "pad_token": "<|over|>"},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizerFast",
            "eos_token": "<|over|>",
            "additional_special_tokens": ["<|a|>", {**TOKEN, "content": "<|b|>"}],
            "chat_template": TEMPLATE,
        },
    },
    "transformers 5": {
        "tokenizer_config.json": {
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]},
            "eos_token": "<|over|>",
            "pad_token": "<|over|>",
            "extra_special_tokens": ["<|a|>", "<|b|>"],
        },
        "chat_template.jinja": TEMPLATE,
    },
}


@pytest.mark.parametrize("files", SETTINGS_OF.values(), ids=SETTINGS_OF)
def test_the_tokenizer_of_another_llama_keeps_its_tokens_and_template(files, folder, tmp_path):
    """One that no Kangaroo has, written by one version of transformers, is read by any."""
    marks = [{"id": i, "content": name, "special": True} for i, name in enumerate(("<|over|>", "<|a|>", "<|b|>"))]
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocabulary = {mark["content"]: mark["id"] for mark in marks}
    spec = {"version": "1.0", "added_tokens": [{**mark, **usual} for mark in marks]}
    spec["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    target = convert([folder], tmp_path / "again", format="llama", preset="tiny", tell=lambda line: None)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|over|>",
        "pad_token": "<|over|>",
        "additional_special_tokens": ["<|a|>", "<|b|>"],
        "chat_template": TEMPLATE,
    }
    assert (target / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((target / "tokenizer.json").read_text()) == spec


def test_a_tokenizer_that_transformers_does_not_read_is_said(folder, tmp_path):
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"of another kind")
    told: list[str] = []
    target = convert([folder], tmp_path / "again", format="llama", preset="tiny", tell=told.append)
    assert any("there is no tokenizer.json, which transformers reads" in line for line in told)
    assert (target / "tokenizer.model").is_file() and not (target / "tokenizer_config.json").exists()


def test_what_a_format_has_no_place_for_is_said(checkpoint, tmp_path):
    told: list[str] = []
    convert([checkpoint], tmp_path / "llama", format="llama", tell=told.append)
    assert "format llama has no place for patchify, projector, special_embedding, vision: left out" in told


def test_the_length_of_a_scaled_rope():
    config = stage_config("kangaroo_8b")
    config.model.llm.rope_scaling.factor = 8.0
    assert formats.longest(config.model.llm, 20_000) == 131_072
    config.model.llm.rope_scaling.factor = 1.0
    assert (formats.longest(config.model.llm), formats.longest(config.model.llm, 20_000)) == (8192, 20_000)


def test_verify_without_torch_refuses_before_it_converts(checkpoint, tmp_path, monkeypatch, capsys):
    """Where it is not there, and where it is and cannot be imported."""
    import sys

    flags = ["convert", f"--from={checkpoint}", f"--to={tmp_path / 'hf'}", "--verify"]
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert cli.main(flags) == 2 and "torch is not installed" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


# --------------------------------------------------------------------------------------------------- hostile files

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HEADERS = {
    "deep": DEEP,
    "infinite shape": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
    "floats": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
    "empty and huge": {"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}},
    "true": {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, tmp_path):
    write_header(tmp_path / WHOLE, HEADERS[name], 4)
    with pytest.raises(UserError, match="damaged"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("text", [b'{"weight_map": {"a": ["x"]}}', DEEP])
def test_indexes_that_lie(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(UserError, match="has no weight_map|nested too deep"):
        open_tensors(tmp_path)


def test_torch_files_that_lie(tmp_path):
    torch = pytest.importorskip("torch")
    wide = torch.zeros(1).expand(1 << 33)
    torch.save({"a": wide}, tmp_path / "wide.bin")
    with pytest.raises(UserError, match="tensor a of shape .* claims more than the file holds"):
        open_tensors(tmp_path / "wide.bin")
    inner: dict = {}
    inner["state_dict"] = inner
    torch.save(inner, tmp_path / "round.bin")
    with pytest.raises(UserError, match="holds no dictionary of tensors"):
        open_tensors(tmp_path / "round.bin")
    torch.save({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "narrow.bin")
    with pytest.raises(UserError, match="tensor a is of type torch.float8_e4m3fn, which is not read"):
        open_tensors(tmp_path / "narrow.bin")


def test_damaged_keys_of_a_torch_file_of_before_1_6(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(4.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.bin").read_bytes()
    begin = data.rindex(b"]q\x00X") + 8  # the list of the storages' keys, a text each
    (tmp_path / "old.bin").write_bytes(data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :])
    with pytest.raises(UserError, match="old.bin: damaged or no torch file"):
        open_tensors(tmp_path / "old.bin")


def test_a_checkpoint_that_claims_far_more_than_it_holds(checkpoint, tmp_path):
    ours = convert([checkpoint], tmp_path / "ours", format="orbax", tell=lambda line: None)
    zarray = ours / "params" / "llm" / "norm" / "scale" / ".zarray"
    raw = json.loads(zarray.read_text())
    zarray.write_text(json.dumps({**raw, "shape": [1 << 34], "chunks": [1 << 34]}))
    with pytest.raises(UserError, match="claim far more than its files hold"):
        Stored(ours / "params")
    for text in (b'{"model": {', b"\xff\xfe", b"[]", b'{"model": 3, "data": {}}', b"[" * 100_000):
        (ours / "config" / "metadata").write_bytes(text)
        with pytest.raises(UserError, match="this checkpoint is damaged \\("):
            open_source(ours, "tiny")


def test_sizes_that_make_no_model_are_one_line(folder):
    change_config(folder, num_attention_heads=0, head_dim=8)
    with pytest.raises(UserError):
        open_source(folder, "tiny")


# ------------------------------------------------------------------------------------------------- tokenizer.json


def _spec(tokenizer_file: Path, **changes) -> dict:
    return {**from_sentencepiece(tokenizer_file), **changes}


ENDLESS = {
    "long": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}},
    "in turn": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}] * 9,
        }
    },
    "many": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 20_000}},
    "inside": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 1000}]}},
    "regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}},
    "kind": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "empty": {"decoder": {"type": "Replace", "pattern": {"String": ""}, "content": "aaaaaaaa"}},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_tokenizers_that_may_take_for_ever_are_refused(name, tokenizer_file, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(_spec(tokenizer_file, **ENDLESS[name])))
    begin = time.process_time()  # however busy the machine is
    with pytest.raises(UserError, match="not read|is not read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    assert time.process_time() - begin < 5


def test_a_text_that_a_tokenizer_has_no_tokens_for(tokenizer_file, tmp_path):
    words = {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(_spec(tokenizer_file, model=words)))
    with pytest.raises(UserError, match="tokenizer.json: cannot be used for this text"):
        load_tokenizer(tmp_path / "tokenizer.json").encode("a")


@pytest.mark.parametrize("text", [DEEP, b'{"added_tokens": 3}', b'{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_tokenizers_that_are_none(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_added_tokens_that_are_not_special_are_text_here_and_in_an_export(tokenizer_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    spec = _spec(tokenizer_file)
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    first = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"] += [
        {"id": first, "content": "<loc_1>", **plain},
        {"id": first + 1, "content": "<loc_2>", **plain},
        {"id": first + 2, "content": "box", **plain, "single_word": True},
    ]
    for entry in spec["added_tokens"]:
        if entry["content"] == "<vi_start>":
            entry["special"] = False  # a mark of ours is special whatever the file says
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec))
    ours = load_tokenizer(file)
    config = stage_config("tiny")
    config.model.llm.vocab_size = first + 3
    (tmp_path / "export").mkdir()
    write_tokenizer(file, config, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in ("the box at <loc_1> and <loc_2>", "boxes <vi_start> <|eot_id|>", "A red square", "<loc_1><loc_1>"):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert not set(ids) & {ours.vi_start, ours.eot} and ours.decode(ids) == text
    assert ours.encode("the <loc_1>").count(first) == 1 and ours.vocab_size == first + 3


def test_a_tokenizer_that_no_kangaroo_has_is_copied(folder, tokenizer_file, tmp_path):
    spec = _spec(tokenizer_file)
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if not entry["content"].startswith("<|")]
    for name in ("kangaroo_tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    told: list[str] = []
    convert([folder], tmp_path / "again", format="llama", preset="tiny", tell=told.append)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert any("copied as it is" in line for line in told)
