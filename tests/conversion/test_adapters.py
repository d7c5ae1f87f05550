"""LoRA adapters made by PEFT: added to weights as PEFT adds them, and converted to ours and back bit for bit."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from kangaroo_jax.checkpoints.adapters import Base
from kangaroo_jax.checkpoints.stored import Stored, whole
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import LoraConfig, model_config, to_plain
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.lora import check_settings, factor_rows, factor_shapes, kernels, layout_of
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.adapters import load_adapted
from kangaroo_jax.models.parameters import abstract_model
from tests.conversion.test_round_trip import assert_same, quiet, tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "usual": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all, rslora": dict(r=3, lora_alpha=5, use_rslora=True, target_modules=EVERY, lora_dropout=0.1),
    "some layers": dict(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], layers_to_transform=[0, 2]),
    "by expression": dict(r=2, lora_alpha=2.5, target_modules=r"model\.layers\.[01]\.(mlp\.up_proj|self_attn\.q_proj)"),
    "a pattern": dict(r=2, lora_alpha=4, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"),
    "the head": dict(r=4, lora_alpha=8, target_modules=["lm_head", "k_proj"]),
    "not these": dict(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["k_proj", "gate_proj"]),
}


def random_factors(model) -> None:
    """Training would fill B, which begins as zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.3)


@pytest.fixture(scope="module")
def llama(checkpoint, tmp_path_factory) -> Path:
    """The decoder of our checkpoint as a folder that transformers loads."""
    return quiet([checkpoint], tmp_path_factory.mktemp("llama") / "hf", format="llama")


def adapt(base: Path, folder: Path, **settings):
    """(adapter's folder, its model), saved by PEFT; the base as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    random_factors(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, model


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """name of KINDS -> (folder, PEFT's model), made when first asked for."""
    made: dict = {}

    def make(name):
        if name not in made:
            made[name] = adapt(llama, tmp_path_factory.mktemp("adapter") / "peft", **KINDS[name])
        return made[name]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_to_ours_and_back_is_bit_exact(kind, adapters, llama, tmp_path):
    folder, _ = adapters(kind)
    quiet([folder], tmp_path / "ours", base=llama)
    quiet([tmp_path / "ours"], tmp_path / "back")
    names = [layout_of(path) for path in (folder, tmp_path / "ours", tmp_path / "back", llama)]
    assert names == ["peft", "orbax", "peft", ""]
    file = "adapter_model.safetensors"
    assert_same(load_file(folder / file), load_file(tmp_path / "back" / file))
    settings = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "back")]
    assert settings[0] == settings[1]
    quiet([tmp_path / "back"], tmp_path / "again", base=llama)
    first, again = (Stored(tmp_path / name / "params") for name in ("ours", "again"))
    for path, spec in first.specs.items():
        assert spec == again.specs[path]
        assert path.startswith("llm/head/") or (len(spec.shape) > 2 and spec.shape[0] == 3)
        np.testing.assert_array_equal(first.read(path, whole(spec.shape)), again.read(path, whole(spec.shape)))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(kind, adapters, llama, checkpoint, tmp_path):
    """On the way in, on the way out, and from an adapter of ours; nothing else changes."""
    folder, model = adapters(kind)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    base = tensors(llama)
    changed = {name for name, value in expected.items() if not np.array_equal(value.numpy(), base[name])}
    assert len(changed) == len(load_file(folder / "adapter_model.safetensors")) // 2
    quiet([llama], tmp_path / "in", format="llama", lora=folder)
    quiet([checkpoint], tmp_path / "out", format="llama", lora=folder)
    quiet([folder], tmp_path / "ours", base=llama)
    quiet([llama], tmp_path / "from_ours", format="llama", lora=tmp_path / "ours")
    found = tensors(tmp_path / "in")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=2e-6, err_msg=name)
        assert name in changed or np.array_equal(found[name], base[name]), name
    assert_same(found, tensors(tmp_path / "out"))
    assert_same(found, tensors(tmp_path / "from_ours"))


def test_peft_loads_what_we_write(adapters, llama, tmp_path):
    """After a round trip PEFT computes the same logits; also where the settings say no more than training needs."""
    folder, model = adapters("some layers")
    quiet([folder], tmp_path / "ours", base=llama)
    quiet([tmp_path / "ours"], tmp_path / "back")
    fresh = transformers.LlamaForCausalLM.from_pretrained(llama)
    ids = torch.from_numpy(np.random.default_rng(0).integers(10, 300, (1, 40)))
    with torch.no_grad():
        plain = fresh(ids).logits
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()(ids).logits
        expected = model.eval()(ids).logits
    assert torch.equal(loaded, expected) and (plain - expected).abs().max() > 1e-2


def logits_of(loaded, ids: np.ndarray) -> np.ndarray:
    """The logits of text, by the model as it is loaded to talk to, its factors beside its weights."""
    model, ones = loaded.model, np.ones(ids.shape, np.int32)
    x = model.embed(ids.astype(np.int32), -ones, None)
    return np.asarray(model.llm.unembed(model.llm(x, ones, np.arange(ids.shape[1], dtype=np.int32)[None])))


@pytest.mark.parametrize("kind", ["all, rslora", "some layers"])
def test_an_adapter_trained_in_torch_gives_the_same_logits_beside_the_base(kind, adapters, llama, checkpoint, tmp_path):
    folder, model = adapters(kind)
    quiet([folder], tmp_path / "ours", base=llama)
    ids = np.random.default_rng(0).integers(270, 300, (1, 24))
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids)).logits.numpy()
    found, plain = logits_of(load_adapted(checkpoint, tmp_path / "ours"), ids), logits_of(load_adapted(checkpoint), ids)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max() < np.abs(plain - expected).max()
    with pytest.raises(UserError, match="is PEFT's adapter; kangaroo convert --from="):
        load_adapted(checkpoint, folder)


def test_an_adapter_that_a_run_trained_loads_in_peft(llama, checkpoint, tmp_path):
    base = load_adapted(checkpoint)
    lora = LoraConfig(rank=4, alpha=6.0, rslora=True, targets="llm/layers/.*")
    shapes = abstract_model(base.config.model, lora).shapes
    random = np.random.default_rng(0)
    factors = {name: x for name, x in shapes.items() if name.endswith(("lora_a", "lora_b"))}
    params = {name: random.normal(size=x.shape).astype(np.float32) * 0.3 for name, x in factors.items()}
    stage = to_plain(base.config.changed({"lora": lora}))
    step = tmp_path / "run" / "checkpoints" / "1"
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "params", params)
    for name, value in (("config", stage), ("base", Base(base.folder, base.sums).to_json())):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            writer.save(step / name, args=ocp.args.JsonSave(value))
    shutil.copy(next(checkpoint.glob("tokenizer.*")), tmp_path / "run")
    quiet([tmp_path / "run"], tmp_path / "peft", format="peft")
    ids = random.integers(270, 300, (1, 24))
    fresh = transformers.LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()(torch.from_numpy(ids)).logits.numpy()
    found = logits_of(load_adapted(tmp_path / "run"), ids)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(logits_of(base, ids) - expected).max() > 1e-2


def test_an_adapter_of_a_whole_export(checkpoint, tmp_path):
    """Encoder, projector and decoder of a Kangaroo, adapted in PyTorch: each changes the output, each comes back."""
    quiet([checkpoint], tmp_path / "hf")
    settings = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "mm_projector.0", "w3"])
    folder, model = adapt(tmp_path / "hf", tmp_path / "peft", **settings)
    names = load_file(folder / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in names) and any("mm_projector.0" in name for name in names)
    pixels, times = torch.randn(2, 3, 32, 32), torch.arange(2.0)
    with torch.no_grad():
        expected = model.base_model.model.encode_frames(pixels, times)
        with model.disable_adapter():
            plain = model.base_model.model.encode_frames(pixels, times)
    quiet([checkpoint], tmp_path / "merged", lora=folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    with torch.no_grad():
        found = merged.encode_frames(pixels, times)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() < (plain - expected).abs().max()
    quiet([folder], tmp_path / "ours", base=checkpoint)
    quiet([tmp_path / "ours"], tmp_path / "back")
    assert_same(names, load_file(tmp_path / "back" / "adapter_model.safetensors"))


def test_the_attention_of_the_encoder_heeds_its_adapters(checkpoint, tmp_path):
    """PEFT puts a module in the place of q_proj: the modelling file must call it, not read its weight."""
    quiet([checkpoint], tmp_path / "hf")
    _, model = adapt(tmp_path / "hf", tmp_path / "peft", r=2, lora_alpha=4, target_modules=r"vision_tower.*\.q_proj")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        adapted = model.base_model.model.vision_tower(pixels)
        with model.disable_adapter():
            plain = model.base_model.model.vision_tower(pixels)
    assert (adapted - plain).abs().max() > 1e-3


def test_merged_in_ranges(adapters, llama, checkpoint, tmp_path, monkeypatch):
    """The head, in pieces, gets the same sum as in one."""
    from kangaroo_jax.conversion import weights

    folder, _ = adapters("the head")
    quiet([checkpoint], tmp_path / "whole", lora=folder)
    monkeypatch.setattr(weights, "BOX_BYTES", 7_000)
    quiet([checkpoint], tmp_path / "pieces", lora=folder)
    for name, array in tensors(tmp_path / "whole").items():
        np.testing.assert_allclose(tensors(tmp_path / "pieces")[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_torch_file(adapters, llama, tmp_path):
    """PEFT's older adapter_model.bin."""
    folder = shutil.copytree(adapters("usual")[0], tmp_path / "bin")
    state = {name: torch.from_numpy(a) for name, a in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    quiet([folder], tmp_path / "ours", base=llama)
    quiet([tmp_path / "ours"], tmp_path / "back")
    file = "adapter_model.safetensors"
    assert_same(load_file(adapters("usual")[0] / file), load_file(tmp_path / "back" / file))


def test_how_peft_found_the_first_factors_changes_nothing():
    settings = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="eva")
    assert check_settings({**settings, "eva_config": {"rho": 2.0}}, Path("adapter_config.json"))["r"] == 2


def test_names_and_shapes_of_the_published_sizes():
    model = model_config("kangaroo_8b")
    every = kernels(model)
    linear = {path: tuple(row.layer for row in rows) for path, rows in every.items()}
    rows = {row.theirs: row for row in factor_rows(every, linear, 16)}
    assert len(rows) == 2 * (32 * 7 + 1 + 24 * 7 + 2)
    first = "base_model.model.model.layers.31.self_attn"
    shapes = {name: rows[f"{first}.{name}.weight"].shape_there for name in ("k_proj.lora_A", "k_proj.lora_B")}
    assert shapes == {"k_proj.lora_A": (16, 4096), "k_proj.lora_B": (1024, 16)}
    assert rows[f"{first}.k_proj.lora_B.weight"].shape_here == (16, 8, 128)
    assert rows[f"{first}.o_proj.lora_A.weight"].shape_here == (32, 128, 16)
    assert rows["base_model.model.vision_tower.blocks.23.mlp.w3.lora_A.weight"].shape_there == (16, 2730)
    assert factor_shapes(model, linear, 16)["llm/layers/attention/key/lora_b"] == (32, 16, 8, 128)


def test_bfloat16_and_dtype(adapters, llama, tmp_path):
    folder, _ = adapters("usual")
    quiet([folder], tmp_path / "ours", base=llama, dtype="bfloat16")
    assert {spec.dtype.name for spec in Stored(tmp_path / "ours" / "params").specs.values()} == {"bfloat16"}
    quiet([tmp_path / "ours"], tmp_path / "a")
    quiet([tmp_path / "a"], tmp_path / "ours2", base=llama)
    quiet([tmp_path / "ours2"], tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    quiet([llama], tmp_path / "merged", format="llama", lora=folder, dtype="bfloat16")
    assert {array.dtype.name for array in tensors(tmp_path / "merged").values()} == {"bfloat16"}


def set_(**changes):
    """A corruption: other settings."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def change_tensors(change):
    def corrupt(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return corrupt


Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
CORRUPTIONS = {
    "dora": (set_(use_dora=True), "not done here: use_dora=True; merge the adapter with PEFT"),
    "ranks": (set_(rank_pattern={"q_proj": 8}), "rank_pattern={'q_proj': 8}"),
    "alphas": (set_(alpha_pattern={"q_proj": 8}), "alpha_pattern={'q_proj': 8}"),
    "bias": (set_(bias="lora_only"), "bias='lora_only'"),
    "saved": (set_(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "tokens": (set_(trainable_token_indices=[3]), "trainable_token_indices=[3]"),
    "init": (set_(init_lora_weights="pissa"), "init_lora_weights='pissa', which changes the base's weights too"),
    "transposed": (set_(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "newer": (set_(use_zora=1), "use_zora=1"),
    "method": (set_(peft_type="LOHA"), "peft_type='LOHA'"),
    "no rank": (set_(r=None), "needs r, a whole number above 0"),
    "no target": (set_(target_modules=None), "needs target_modules"),
    "expression": (set_(target_modules="(q_proj"), "is no regular expression"),
    "more": (
        set_(target_modules=["q_proj", "v_proj", "k_proj"]),
        "missing: base_model.model.model.layers.{0-2}.self_attn.k_",
    ),
    "fewer": (
        set_(target_modules=["q_proj"]),
        "unknown: base_model.model.model.layers.{0-2}.self_attn.v_proj.lora_A.weight",
    ),
    "other rank": (set_(r=5), "of shape (4, 48) where the config wants (5, 48)"),
    "lost": (change_tensors(lambda t: {n: a for n, a in t.items() if n != Q1}), f"missing: {Q1}"),
    "nan": (change_tensors(lambda t: {**t, Q1: np.full_like(t[Q1], np.nan)}), f"192 of 192 numbers of {Q1} are NaN"),
    "stranger": (
        change_tensors(lambda t: {**t, "a.lora_magnitude_vector": np.ones(3, "f4")}),
        "unknown: a.lora_magnitude_v",
    ),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "damaged or cut short"),
    "gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors or"),
}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "merged"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_wrong_or_not_done_is_one_line(name, alone, adapters, llama, tmp_path, capsys):
    corrupt, message = CORRUPTIONS[name]
    folder = shutil.copytree(adapters("usual")[0], tmp_path / "peft")
    corrupt(folder)
    capsys.readouterr()  # making an adapter shows a progress bar
    flags = (
        [f"--from={folder}", f"--base={llama}"] if alone else [f"--from={llama}", f"--lora={folder}", "--format=llama"]
    )
    code = cli.main(["convert", f"--to={tmp_path / 'target'}", *flags])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


def test_what_does_not_go_together(adapters, llama, checkpoint, tmp_path):
    folder, _ = adapters("usual")
    ours = quiet([folder], tmp_path / "ours", base=llama)
    for sources, options, message in [
        ([folder, llama], {}, "a LoRA adapter is converted alone"),
        ([folder], dict(lora=folder), "a LoRA adapter is converted alone"),
        ([folder], dict(base=llama, format="hf"), "an adapter is orbax or peft"),
        ([folder], dict(preset="tiny"), "tensors do not fit the model"),
        ([ours], dict(base=llama), "says itself what it adapts"),
        ([llama], dict(base=llama, format="meta"), "is only for a source that is a LoRA adapter"),
        ([llama], dict(lora=llama, format="llama"), "give the folder of a LoRA adapter"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(sources, tmp_path / "no", tell=lambda line: None, **options)
        assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()


def test_an_adapter_of_ours_that_is_not_what_its_config_says(adapters, llama, tmp_path):
    folder, _ = adapters("some layers")
    ours = quiet([folder], tmp_path / "ours", base=llama)
    chunk = ours / "params" / "llm/layers/attention/out/lora_b" / "1.0.0"
    assert not any(chunk.read_bytes())
    chunk.write_bytes(b"\x00\x00\x80\x3f" + chunk.read_bytes()[4:])
    with pytest.raises(UserError, match="lora_b is not zero in layer 1, which `adapted` leaves out"):
        quiet([ours], tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()
