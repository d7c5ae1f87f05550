"""Converts configs of other projects to ours and back: Hugging Face's config.json, Meta's params.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.errors import UserError

# name on Hugging Face, key of config.model.llm
LLM_KEYS = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "width"),
    ("num_hidden_layers", "depth"),
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "kv_heads"),
    ("head_dim", "head_dim"),
    ("intermediate_size", "mlp_width"),
    ("rms_norm_eps", "norm_eps"),
)
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Sections that our exports add to config.json, with our key names, and the keys in them that are not exported.
SECTIONS = {
    "vision_config": ("vision", ("remat",)),
    "patchify_config": ("patchify", ()),
    "time_config": ("tpe", ()),
    "special_ids": ("special_ids", ()),
}
SAMPLING = (
    "image_size",
    "fps",
    "min_frames",
    "max_frames",
    "long_seconds",
    "long_min_frames",
    "long_max_frames",
)  # keys of config.data that describe a model's inputs
ROPE_KEYS = (
    ("factor", "factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings", "original_length"),
)
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # settings that our decoder cannot vary
# Settings of relatives of Llama, and the values with which they change nothing.
UNUSED: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None, 0),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "num_local_experts": (None, 0, 1),
    "qk_layernorm": (None, False),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
}
LLAMAS = ("llama", "mistral", None)  # model types with the architecture of Llama; Mistral's where it has no window
# What other decoders have that this one lacks, by how their model type begins.
OTHERS = {
    "qwen2_moe": "experts and biases of q, k and v",
    "qwen2": "biases of q, k and v",
    "qwen3_moe": "experts and norms of q and k",
    "qwen3": "norms of q and k",
    "gemma": "GELU, scaled embeddings and norms of another kind",
    "phimoe": "experts",
    "phi3": "q, k and v in one map",
    "phi": "LayerNorm, biases and a parallel MLP",
    "mixtral": "experts",
    "smollm3": "layers without rotary positions",
    "olmo": "norms of another kind",
    "granite": "multipliers of embeddings, residuals and logits",
    "deepseek": "latent attention and experts",
    "gpt": "learned positions and LayerNorm",
    "falcon": "LayerNorm and a parallel MLP",
    "starcoder": "LayerNorm and biases",
    "stablelm": "LayerNorm and partial rotary positions",
    "cohere": "LayerNorm and a parallel MLP",
    "llama4": "experts and layers without rotary positions",
    "mllama": "layers of cross-attention",
}
LLAMA_31_LENGTH = 131_072  # tokens; the context of Llama 3.1 and 3.2
USUAL_THETA, USUAL_EPS = 10_000.0, 1e-6  # defaults of transformers' LlamaConfig


def section(model: ConfigDict, name: str) -> ConfigDict:
    """A part of config.model by its dotted name."""
    for part in name.split("."):
        model = model[part]
    return model


def read_hf(raw: Mapping[str, Any], model: ConfigDict, where: Path) -> None:
    """Set the keys of `model` (config.model) that a config.json determines.

    Raises:
        UserError: the file lacks a size, or requires something that the decoder does not support.
    """
    lacking = [key for key in REQUIRED if not isinstance(raw.get(key), int) or raw[key] < 1]
    if lacking:
        raise UserError(f"{where}: does not say {', '.join(lacking)}; is it the config.json of a Llama?")
    check_kind(raw.get("model_type"), where)
    for key, values in UNUSED.items():
        if raw.get(key) not in values and not (key == "sliding_window" and raw.get("use_sliding_window") is False):
            raise UserError(f"{where}: {key} is {raw[key]!r}, which the decoder, a Llama, does not have")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{where}: {key} is {raw[key]!r}, but the decoder supports only {value!r}")
    llm = model.llm
    heads = raw["num_attention_heads"]
    usual = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, "rms_norm_eps": USUAL_EPS}
    for theirs, ours in LLM_KEYS:
        value = raw.get(theirs) if raw.get(theirs) is not None else usual[theirs]
        llm[ours] = type(llm[ours])(value)
    llm.tied_head = bool(raw.get("tie_word_embeddings"))
    _read_rope(raw, llm, where)
    for theirs, (ours, _) in SECTIONS.items():
        _update(section(model, ours), raw.get(theirs), f"{where}, {theirs}")
    if raw.get("mm_projector_type"):
        model.projector = str(raw["mm_projector_type"])


def check_kind(kind: Any, where: Path) -> None:
    """Raise UserError for the model type of a decoder that is not of Llama's architecture."""
    if kind in LLAMAS or kind == "kangaroo":
        return
    lacking = next((words for name, words in OTHERS.items() if str(kind).startswith(name)), "")
    why = f": it has {lacking}" if lacking else ""
    raise UserError(f"{where}: model_type {kind!r} is no Llama{why}; give a decoder of Llama's architecture")


def _update(target: ConfigDict, values: Any, where: str) -> None:
    for key, value in dict(values or {}).items():
        if key not in target:
            raise UserError(f"{where}: {key!r} is no key of this model; the file was written by another version")
        target[key] = tuple(value) if isinstance(value, list) else value


def _read_rope(raw: Mapping[str, Any], llm: ConfigDict, where: Path) -> None:
    """Read `rope_theta` and `rope_scaling`, or the `rope_parameters` of transformers 5."""
    parameters = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta")
    llm.rope_theta = float(USUAL_THETA if theta is None else theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        llm.rope_scaling.factor = 1.0
        return
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported, only 'llama3' is; use another checkpoint")
    try:
        for theirs, ours in ROPE_KEYS:
            llm.rope_scaling[ours] = type(llm.rope_scaling[ours])(parameters[theirs])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: rope scaling 'llama3' needs numbers {', '.join(k for k, _ in ROPE_KEYS)}") from None


def write_llm(llm: ConfigDict) -> dict[str, Any]:
    """The keys of config.json for a Llama in transformers 4 and 5."""
    raw: dict[str, Any] = {theirs: llm[ours] for theirs, ours in LLM_KEYS}
    scaling = llm.get("rope_scaling")
    raw.update(rope_theta=llm.rope_theta, rope_scaling=None, **FIXED, tie_word_embeddings=bool(llm.get("tied_head")))
    if scaling and scaling.factor != 1.0:
        raw["rope_scaling"] = {"rope_type": "llama3", **{theirs: scaling[ours] for theirs, ours in ROPE_KEYS}}
    return raw


def longest(llm: ConfigDict, packed: int = 0) -> int:
    """The longest context of a decoder in tokens: 131,072, as published, with Llama 3.1's scaled rope; else the 8,192
    of Llama 3, or `packed`, the length it was trained with, if that is more."""
    scaling = llm.get("rope_scaling")
    if scaling and scaling.factor != 1.0:
        scaled = int(scaling.original_length * scaling.factor)
        return LLAMA_31_LENGTH if scaling.original_length == 8192 else scaled
    return max(8192, packed)


def write_hf(config: ConfigDict, dtype: str) -> dict[str, Any]:
    """config.json of a Kangaroo. `config` is a stage's config, `dtype` the weights' type."""
    model = config.model
    raw: dict[str, Any] = {
        "architectures": ["KangarooForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_kangaroo.KangarooConfig",
            "AutoModelForCausalLM": "modeling_kangaroo.KangarooForCausalLM",
        },
        "model_type": "kangaroo",
        "torch_dtype": dtype,
        **write_llm(model.llm),
        "max_position_embeddings": max(8192, config.data.tokens_per_pack),
        "mm_projector_type": model.projector,
    }
    for theirs, (ours, left_out) in SECTIONS.items():
        plain = section(model, ours).to_dict() if hasattr(section(model, ours), "to_dict") else {}
        raw[theirs] = {key: value for key, value in plain.items() if key not in left_out}
    raw["frame_sampling"] = {key: config.data[key] for key in SAMPLING}
    return raw


# -------------------------------------------------------------------------------------- Meta

_META_SIZES = ((1024, 1.3), (4096, 1.3), (256, 1.5), (256, None))  # published (multiple_of, ffn_dim_multiplier)


def meta_mlp_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The MLP width by the rule of Meta's models."""
    hidden = int(2 * 4 * dim / 3)
    hidden = int(multiplier * hidden) if multiplier is not None else hidden
    return multiple_of * -(-hidden // multiple_of)


_LLAMA_32 = ((2048, 16), (3072, 28))  # width and layers of Llama 3.2 1B and 3B


def usual_factor(raw: Mapping[str, Any]) -> float:
    """The rope scaling's factor of a params.json that does not state it: 32 in Llama 3.2, 8 in 3.1."""
    return 32.0 if (raw.get("dim"), raw.get("n_layers")) in _LLAMA_32 else 8.0


def read_meta(raw: Mapping[str, Any], model: ConfigDict, where: Path, vocabulary: int) -> None:
    """Set config.model.llm from params.json; `vocabulary`, from the weights, counts if the file has -1 or none.

    Raises:
        UserError: a key is missing.
    """
    llm = model.llm
    try:
        llm.width, llm.depth, llm.heads = int(raw["dim"]), int(raw["n_layers"]), int(raw["n_heads"])
        llm.norm_eps, llm.rope_theta = float(raw["norm_eps"]), float(raw.get("rope_theta", USUAL_THETA))
        llm.mlp_width = meta_mlp_width(llm.width, int(raw["multiple_of"]), raw.get("ffn_dim_multiplier"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: is no params.json of a Llama ({error} is missing or no number)") from None
    llm.kv_heads, llm.head_dim = int(raw.get("n_kv_heads") or llm.heads), llm.width // llm.heads
    llm.vocab_size = int(raw.get("vocab_size") or vocabulary)
    llm.vocab_size = vocabulary if llm.vocab_size < 0 else llm.vocab_size
    factor = float(raw.get("rope_scaling_factor") or usual_factor(raw)) if raw.get("use_scaled_rope") else 1.0
    llm.rope_scaling.update(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)


def write_meta(llm: ConfigDict) -> dict[str, Any]:
    """params.json. Raises UserError for sizes or a rope scaling that Meta's format cannot express."""
    raw: dict[str, Any] = dict(
        dim=llm.width,
        n_layers=llm.depth,
        n_heads=llm.heads,
        n_kv_heads=llm.kv_heads,
        vocab_size=llm.vocab_size,
        norm_eps=llm.norm_eps,
        rope_theta=llm.rope_theta,
    )
    if llm.head_dim * llm.heads != llm.width:
        raise UserError(f"format meta: heads of {llm.head_dim} times {llm.heads} must be the width {llm.width}")
    # If no published pair gives the width, use one that always does: the width itself as the multiple.
    sizes = [*_META_SIZES, (llm.mlp_width, llm.mlp_width / int(8 * llm.width / 3))]
    fits = [pair for pair in sizes if meta_mlp_width(llm.width, *pair) == llm.mlp_width]
    raw["multiple_of"], raw["ffn_dim_multiplier"] = fits[0]
    scaling = llm.get("rope_scaling")
    if scaling and scaling.factor != 1.0:
        if (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length) != (1.0, 4.0, 8192):
            raise UserError("format meta: it supports only Llama 3.1's rope scaling (1, 4, 8192)")
        raw.update(use_scaled_rope=True, rope_scaling_factor=scaling.factor)
    return raw
