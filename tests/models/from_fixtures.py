"""Fixture files (names of timm, transformers and torch) -> models with their weights. Every name must map."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from kangaroo_jax.config import LlamaConfig, PatchifyConfig, VisionConfig
from kangaroo_jax.models.eva_clip import EvaClip
from kangaroo_jax.models.llama import Llama
from kangaroo_jax.models.patchify import Patchify, Projector

FIXTURES = Path(__file__).parent.parent / "fixtures"

EVA_NAMES = {
    r"cls_token": "cls_token",
    r"pos_embed": "position_embedding",
    r"patch_embed\.proj\.weight": "patch_embedding/kernel",
    r"patch_embed\.proj\.bias": "patch_embedding/bias",
    r"norm\.weight": "norm/scale",
    r"norm\.bias": "norm/bias",
    r"blocks\.(\d+)\.norm1\.weight": "blocks/attention_norm/scale",
    r"blocks\.(\d+)\.norm1\.bias": "blocks/attention_norm/bias",
    r"blocks\.(\d+)\.norm2\.weight": "blocks/mlp_norm/scale",
    r"blocks\.(\d+)\.norm2\.bias": "blocks/mlp_norm/bias",
    r"blocks\.(\d+)\.attn\.q_proj\.weight": "blocks/attention/query/kernel",
    r"blocks\.(\d+)\.attn\.q_proj\.bias": "blocks/attention/query/bias",
    r"blocks\.(\d+)\.attn\.k_proj\.weight": "blocks/attention/key/kernel",
    r"blocks\.(\d+)\.attn\.v_proj\.weight": "blocks/attention/value/kernel",
    r"blocks\.(\d+)\.attn\.v_proj\.bias": "blocks/attention/value/bias",
    r"blocks\.(\d+)\.attn\.norm\.weight": "blocks/attention/norm/scale",
    r"blocks\.(\d+)\.attn\.norm\.bias": "blocks/attention/norm/bias",
    r"blocks\.(\d+)\.attn\.proj\.weight": "blocks/attention/out/kernel",
    r"blocks\.(\d+)\.attn\.proj\.bias": "blocks/attention/out/bias",
    r"blocks\.(\d+)\.mlp\.fc1_g\.weight": "blocks/mlp/gate/kernel",
    r"blocks\.(\d+)\.mlp\.fc1_g\.bias": "blocks/mlp/gate/bias",
    r"blocks\.(\d+)\.mlp\.fc1_x\.weight": "blocks/mlp/up/kernel",
    r"blocks\.(\d+)\.mlp\.fc1_x\.bias": "blocks/mlp/up/bias",
    r"blocks\.(\d+)\.mlp\.norm\.weight": "blocks/mlp/norm/scale",
    r"blocks\.(\d+)\.mlp\.norm\.bias": "blocks/mlp/norm/bias",
    r"blocks\.(\d+)\.mlp\.fc2\.weight": "blocks/mlp/down/kernel",
    r"blocks\.(\d+)\.mlp\.fc2\.bias": "blocks/mlp/down/bias",
}
LLAMA_NAMES = {
    r"model\.embed_tokens\.weight": "embedding",
    r"model\.norm\.weight": "norm/scale",
    r"lm_head\.weight": "head/kernel",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": "layers/attention_norm/scale",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": "layers/mlp_norm/scale",
    r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight": "layers/attention/query/kernel",
    r"model\.layers\.(\d+)\.self_attn\.k_proj\.weight": "layers/attention/key/kernel",
    r"model\.layers\.(\d+)\.self_attn\.v_proj\.weight": "layers/attention/value/kernel",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight": "layers/attention/out/kernel",
    r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight": "layers/mlp/gate/kernel",
    r"model\.layers\.(\d+)\.mlp\.up_proj\.weight": "layers/mlp/up/kernel",
    r"model\.layers\.(\d+)\.mlp\.down_proj\.weight": "layers/mlp/down/kernel",
}
PATCHIFY_NAMES = {r"patchify\.weight": "kernel", r"patchify\.bias": "bias"}
PROJECTOR_NAMES = {
    r"projector\.0\.weight": "first/kernel",
    r"projector\.0\.bias": "first/bias",
    r"projector\.2\.weight": "second/kernel",
    r"projector\.2\.bias": "second/bias",
}


def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """(weights without their prefix, cases, the configuration) of a fixture file."""
    with safe_open(FIXTURES / f"{name}.safetensors", "np") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata().get("config", "{}"))
    weights = {key.removeprefix("weights."): value for key, value in arrays.items() if key.startswith("weights.")}
    return weights, {key: value for key, value in arrays.items() if not key.startswith("weights.")}, config


def load(model: nnx.Module, weights: dict[str, np.ndarray], names: dict[str, str]) -> None:
    """Put torch `weights` into `model`; a name or a parameter left over on either side raises KeyError."""
    parameters = {"/".join(map(str, path)): weight for path, weight in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    values = {path: np.full(weight.shape, np.nan, np.float32) for path, weight in parameters.items()}
    for name, array in weights.items():
        pattern = next((pattern for pattern in names if re.fullmatch(pattern, name)), None)
        if pattern is None:
            raise KeyError(f"weight {name} maps to no parameter")
        layer = re.fullmatch(pattern, name).groups()
        target = values[names[pattern]]
        target = target[int(layer[0])] if layer else target
        target[...] = torch_layout(names[pattern], array).reshape(target.shape)
    for path, value in values.items():
        if np.isnan(value).any():
            raise KeyError(f"parameter {path} is not in the file")
        parameters[path].set_value(jnp.asarray(value))


def torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A torch weight in our order of dimensions: convolutions channel last, linear kernels [in, out]."""
    if array.ndim == 5:
        return array[:, 0].transpose(1, 2, 3, 0)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if path.endswith("kernel") and array.ndim == 2 else array


def eva() -> tuple[EvaClip, dict[str, np.ndarray]]:
    """The fixture's vision encoder and its cases."""
    weights, cases, c = read("eva02_tiny")
    config = VisionConfig(
        patch_size=c["patch"],
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_width=c["mlp_hidden"],
        pos_embed_grid=c["img"][0] // c["patch"],
        rope_theta=10_000.0,
        rope_reference_grid=c["ref_grid"],
        norm_eps=1e-6,
        output_norm=False,
        remat="none",
    )
    model = EvaClip(config, rngs=nnx.Rngs(0))
    load(model, weights, EVA_NAMES)
    return model, cases


def llama(**options) -> tuple[Llama, dict[str, np.ndarray]]:
    """The fixture's decoder and its cases."""
    weights, cases, c = read("llama_tiny")
    config = LlamaConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        mlp_width=c["intermediate_size"],
        rope_theta=c["rope_parameters"]["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        remat="none",
        loss_chunk=16,
    )
    model = Llama(config, rngs=nnx.Rngs(0), **options)
    load(model, weights, LLAMA_NAMES)
    return model, cases


def patchify_and_projector() -> tuple[Patchify, Projector, dict[str, np.ndarray]]:
    """The fixture's convolution and projector, and their case."""
    weights, cases, _ = read("patchify_projector_tiny")
    width, outputs = weights["patchify.bias"].size, weights["projector.0.bias"].size
    patchify = Patchify(PatchifyConfig(), width, rngs=nnx.Rngs(0))
    projector = Projector("mlp2x_gelu", width, outputs, rngs=nnx.Rngs(0))
    load(patchify, {key: value for key, value in weights.items() if key.startswith("patchify")}, PATCHIFY_NAMES)
    load(projector, {key: value for key, value in weights.items() if key.startswith("projector")}, PROJECTOR_NAMES)
    return patchify, projector, cases
