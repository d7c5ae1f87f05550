"""A decoder in a GGUF file (llama.cpp): its tensors, of which quantised ones are read as float32, and its config."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.config import RopeScaling
from kangaroo_jax.conversion.files import Tensor
from kangaroo_jax.conversion.formats import check_kind
from kangaroo_jax.data.tokenizer_gguf import is_gguf, open_gguf
from kangaroo_jax.errors import UserError

PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
FACTORS = "rope_freqs.weight"  # by which Llama 3.1's scaling divides each frequency
# key of the metadata after the architecture's name, key of config.model.llm
_KEYS = (
    ("embedding_length", "width"),
    ("block_count", "depth"),
    ("attention.head_count", "heads"),
    ("feed_forward_length", "mlp_width"),
    ("attention.layer_norm_rms_epsilon", "norm_eps"),
)
_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in that folder where it has no other weights."""
    if path.is_file():
        return path if is_gguf(path) else None
    found = sorted(path.glob("*.gguf"))
    others = any(path.glob(f"*.{suffix}") for suffix in ("safetensors", "bin", "pt", "pth"))
    return found[0] if len(found) == 1 and not others else None


def open_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by llama.cpp's names, the metadata).

    Raises:
        UserError: a damaged file, another architecture than Llama's, a type of numbers that is not read.
    """
    reader, metadata = open_gguf(path)
    _check(path, metadata, [tensor.name for tensor in reader.tensors])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if odd := sorted({kind for kind in kinds.values() if kind not in (*PLAIN, *QUANTISED)}):
        raise UserError(
            f"{path}: numbers of type {', '.join(odd)} are not read, only {', '.join((*PLAIN, *QUANTISED))}"
        )
    wide = any(kind in QUANTISED for kind in kinds.values())  # the types of one weight may differ between layers
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        dtype = np.dtype(np.float32) if wide else PLAIN[kinds[tensor.name]]
        tensors[tensor.name] = Tensor(shape, dtype, path, _rows(tensor, kinds[tensor.name], shape, dtype))
    return tensors, metadata


def _check(path: Path, metadata: Mapping[str, Any], names: list[str]) -> None:
    """Raise UserError for a decoder that is not Llama's."""
    kind = str(metadata.get("general.architecture"))
    check_kind(kind if kind != "None" else "unknown", path)
    experts = metadata.get(f"{kind}.expert_count")
    scaling = metadata.get(f"{kind}.rope.scaling.type")
    wrong = [f"{experts} experts"] if experts else []
    wrong += [f"rope scaling {scaling!r}"] if scaling not in (None, "none") else []
    wrong += ["biases"] if any(name.endswith(_BIASES) for name in names) else []
    wrong += ["a sliding window"] if metadata.get(f"{kind}.attention.sliding_window") else []
    if wrong:
        raise UserError(f"{path}: has {' and '.join(wrong)}, which the decoder, a Llama, does not have")


def _rows(tensor: Any, kind: str, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[int, int], np.ndarray]:
    def read_rows(start: int, stop: int) -> np.ndarray:
        part = np.asarray(tensor.data[start:stop])
        if kind in QUANTISED:
            from gguf import dequantize

            array = np.asarray(dequantize(part, tensor.tensor_type), np.float32)
        else:
            array = np.ascontiguousarray(part).view(PLAIN[kind])
        return array.reshape(stop - start, *shape[1:]).astype(dtype, copy=False)

    return read_rows


def read_config(metadata: Mapping[str, Any], model: ConfigDict, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Set config.model.llm from a GGUF's metadata. Raises UserError if a size is missing or a scaling unknown."""
    kind, llm = metadata["general.architecture"], model.llm
    for theirs, ours in _KEYS:
        value = metadata.get(f"{kind}.{theirs}")
        if not isinstance(value, int | float):
            raise UserError(f"{where}: does not say {kind}.{theirs}, one number; convert the model's folder instead")
        llm[ours] = type(llm[ours])(value)
    llm.norm_eps = float(np.float32(llm.norm_eps).astype(str))  # a float32 there; here its shortest name
    llm.kv_heads = int(metadata.get(f"{kind}.attention.head_count_kv") or llm.heads)
    llm.head_dim = int(metadata.get(f"{kind}.attention.key_length") or llm.width // llm.heads)
    llm.rope_theta = float(metadata.get(f"{kind}.rope.freq_base") or 10_000.0)
    if int(metadata.get(f"{kind}.rope.dimension_count") or llm.head_dim) != llm.head_dim:
        raise UserError(f"{where}: has partial rotary positions, which the decoder, a Llama, does not have")
    if "token_embd.weight" in tensors:
        llm.vocab_size = tensors["token_embd.weight"].shape[0]
    llm.tied_head = "output.weight" not in tensors
    llm.rope_scaling.factor = 1.0
    if FACTORS in tensors:
        _read_factors(tensors[FACTORS].read().astype(np.float64), llm, where)


def _read_factors(factors: np.ndarray, llm: ConfigDict, where: Path) -> None:
    """Set the rope scaling whose divisors these are: that of Llama 3.1 or 3.2, of any factor."""
    from kangaroo_jax.models.layers import NOT_SCALED, rotary_frequencies

    scaling = RopeScaling(float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    scaled = rotary_frequencies(llm.head_dim, llm.rope_theta, scaling)
    expected = rotary_frequencies(llm.head_dim, llm.rope_theta, NOT_SCALED) / scaled
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"{where}: {FACTORS} is not the rope scaling of Llama 3.1; convert the model's folder instead")
    llm.rope_scaling.update(dict(scaling.flat()))


def said(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The longest text, and the ids of BOS, EOS and padding, by their keys in a config.json."""
    kind = metadata["general.architecture"]
    keys = {"max_position_embeddings": f"{kind}.context_length"}
    keys |= {f"{role}_token_id": f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos")}
    keys["pad_token_id"] = "tokenizer.ggml.padding_token_id"
    return {ours: int(metadata[theirs]) for ours, theirs in keys.items() if theirs in metadata}
