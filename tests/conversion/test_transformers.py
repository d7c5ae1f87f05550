"""Against transformers' own Llama, built and run by it: loaded strictly both ways, the same logits and answers."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.checkpoints.stored import whole
from kangaroo_jax.config import LlamaConfig
from kangaroo_jax.conversion.convert import convert
from kangaroo_jax.conversion.files import open_tensors
from kangaroo_jax.conversion.sources import open_source
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.llama import Llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, ANSWER = 640, 16
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that a prompt of 640 is far beyond it
}


def make_llama(folder: Path, scaling: dict | None = None, theta: float = 500_000.0, **options) -> "torch.nn.Module":
    """A random Llama of transformers, saved by it."""
    torch.manual_seed(0)
    rope: dict = {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta}}
    if not hasattr(transformers.LlamaConfig(), "rope_parameters"):  # transformers 4
        rope = {"rope_theta": theta, "rope_scaling": scaling}
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        **rope,
        initializer_range=0.3,
        eos_token_id=319,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def our_llama(folder: Path) -> Llama:
    """The decoder of a folder of theirs, in JAX."""
    source = open_source(folder)
    weights = {path: source.weights.read(path, whole(spec.shape)) for path, spec in source.weights.specs.items()}
    model = nnx.eval_shape(lambda: Llama(LlamaConfig.from_config(source.config.model.llm), rngs=nnx.Rngs(0)))
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter.set_value(jnp.asarray(weights.pop("llm/" + "/".join(map(str, path)))))
    assert not weights
    return model


def runner(model: Llama) -> Callable[[np.ndarray], np.ndarray]:
    """ids [1, T <= 656] -> logits [T, V]; padded at the end, where causal attention does not look."""
    graph, state = nnx.split(model)
    positions = np.arange(LENGTH + ANSWER)[None]

    @jax.jit
    def run(state, ids):
        model = nnx.merge(graph, state)
        return model.unembed(model(model.embed(ids), jnp.ones_like(ids), positions))

    def logits(ids: np.ndarray) -> np.ndarray:
        padded = np.pad(ids, ((0, 0), (0, LENGTH + ANSWER - ids.shape[1])))
        return np.asarray(run(state, padded))[0, : ids.shape[1]]

    return logits


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["llama3", "llama31"])
def test_logits_and_greedy_tokens_of_long_prompts(tmp_path, scaling):
    theirs = make_llama(tmp_path / "hf", scaling)
    ids = np.random.default_rng(0).integers(0, 319, (1, LENGTH))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits[0].numpy()
        options = dict(do_sample=False, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
        mask = torch.ones(1, LENGTH, dtype=torch.long)
        answer = theirs.generate(torch.from_numpy(ids), attention_mask=mask, **options)[0].tolist()
    logits = runner(our_llama(tmp_path / "hf"))
    assert np.abs(logits(ids) - expected).max() <= 1e-4
    for _ in range(ANSWER):  # through the cache: tests/inference
        best = logits(ids)[-1, :319].argmax()  # 319 ends a text, and is not chosen there either
        ids = np.concatenate([ids, [[best]]], axis=1)
    assert ids[0].tolist() == answer


def test_the_scaling_matters(tmp_path):
    """A converter that ignored it would be off by far more than the tolerance."""
    make_llama(tmp_path / "hf", SCALING)
    ids = np.random.default_rng(0).integers(0, 319, (1, LENGTH))
    right = runner(our_llama(tmp_path / "hf"))(ids)
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    raw.update(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, rope_scaling=None)
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    assert np.abs(runner(our_llama(tmp_path / "hf"))(ids) - right).max() > 1e-1


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["llama3", "llama31"])
def test_what_we_write_transformers_loads_strictly(tmp_path, scaling):
    theirs = make_llama(tmp_path / "hf", scaling)
    convert(
        [tmp_path / "hf"],
        tmp_path / "meta" if not scaling else tmp_path / "again",
        format="meta" if not scaling else "llama",
    )
    if not scaling:
        convert([tmp_path / "meta"], tmp_path / "again", format="llama")
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):  # of transformers 5, and of 4
        assert getattr(loaded.config, key, None) == getattr(theirs.config, key, None)
    assert loaded.config.rms_norm_eps == theirs.config.rms_norm_eps


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    make_llama(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**raw, "model_type": "mistral", "sliding_window": None}))
    assert open_source(tmp_path / "hf").layout == "llama"


def test_a_tied_head_is_one_tensor_there_and_back(tmp_path):
    """Files may hold the head, too, if it is the same; Meta's format always does."""
    from safetensors.torch import load_file, save_file

    theirs = make_llama(tmp_path / "hf", tie_word_embeddings=True)
    for source, target in (("hf", "meta"), ("meta", "again")):
        convert([tmp_path / source], tmp_path / target, format="meta" if target == "meta" else "llama")
    assert "output.weight" in open_tensors(tmp_path / "meta")
    assert "llm/head/kernel" not in open_source(tmp_path / "meta").weights.specs
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.config.tie_word_embeddings and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name
    file = tmp_path / "again" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert "llm/head/kernel" not in open_source(tmp_path / "again").weights.specs
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="lm_head.weight is not model.embed_tokens.weight, but config.json says tie"):
        open_source(tmp_path / "again")


def test_tied_embeddings(tmp_path):
    theirs = make_llama(tmp_path / "hf", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_tensors(tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 319, (1, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits[0].numpy()
    assert np.abs(runner(our_llama(tmp_path / "hf"))(ids) - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_hidden_layers": 4}, "missing: model.layers.3."),
        ({"num_hidden_layers": 2}, "unknown: model.layers.2."),
        ({"intermediate_size": 96}, "of shape (80, 48) where the config wants (96, 48): model.layers.{0-2}.mlp"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' is no Llama: it has biases of q, k and v"),
        ({"model_type": "gemma2"}, "model_type 'gemma2' is no Llama: it has GELU"),
        ({"model_type": "phi3"}, "model_type 'phi3' is no Llama: it has q, k and v in one map"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is no Llama: it has experts"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096, which the decoder, a Llama, does"),
        ({"model_type": "mllama"}, "no Llama: it has layers of cross-attention"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"vocab_size": None}, "does not say vocab_size"),
    ],
)
def test_a_config_that_disagrees_or_asks_for_what_is_not_done(tmp_path, change, message):
    make_llama(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "hf")
    assert message in str(error.value)


def test_an_adapter_is_added(tmp_path):
    """W + alpha / r * B A, against the sum written out; everything else stays as it was. PEFT's own: test_adapters."""
    from safetensors.numpy import save_file

    theirs = make_llama(tmp_path / "hf")
    rng, state = np.random.default_rng(0), {k: v.numpy() for k, v in theirs.state_dict().items()}
    factors, expected = {}, dict(state)
    adapted = ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.layers.0.self_attn.o_proj"]
    for name in adapted:
        rows, columns = state[f"{name}.weight"].shape
        a, b = rng.standard_normal((4, columns)).astype("f4"), rng.standard_normal((rows, 4)).astype("f4")
        factors[f"base_model.model.{name}.lora_A.weight"], factors[f"base_model.model.{name}.lora_B.weight"] = a, b
        expected[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * (b @ a)
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": adapted}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    convert([tmp_path / "hf"], tmp_path / "merged", format="llama", lora=tmp_path / "lora")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name].numpy(), value, atol=1e-5, err_msg=name)
    factors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = factors.popitem()[1]
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="missing: .*o_proj.lora_B.weight; unknown: .*layers.9.mlp"):
        convert([tmp_path / "hf"], tmp_path / "no", format="llama", lora=tmp_path / "lora")
    assert not (tmp_path / "no").exists()
