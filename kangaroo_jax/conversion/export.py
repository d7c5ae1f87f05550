"""Writes what other libraries need beside the weights to load a model: configs, tokenizer, and model code."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.conversion import formats
from kangaroo_jax.conversion.sources import HIDDEN_ROWS, SHADOWED, SIDECAR, special_ids
from kangaroo_jax.conversion.weights import Weights
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.progress import Tell

CODE = Path(__file__).parent / "torch_model"
CODE_FILES = ("configuration_kangaroo.py", "media_kangaroo.py", "modeling_kangaroo.py", "processing_kangaroo.py")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON, indented by two spaces."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def widest(weights: Weights, paths: Iterable[str] | None = None) -> str:
    """The name of the type that holds every weight exactly."""
    dtypes = {weights.specs[path].dtype for path in (paths if paths is not None else weights.specs)}
    return dtypes.pop().name if len(dtypes) == 1 else "float32"


def write_beside(
    ours: Weights, theirs: Weights, config: ConfigDict, tokenizer: Path | None, folder: Path, tell: Tell
) -> None:
    """Write all files beside the weights of an exported Kangaroo.

    Args:
        ours: the weights as in our checkpoints.
        theirs: the same with the marks in their rows of the embedding.
        config: the stage's config.
        tokenizer: the tokenizer's file; without one the export has none, and `chat` has to be given one.
        folder: the export's folder.
        tell: prints a line.
    """
    raw = formats.write_hf(config, widest(theirs))
    if tokenizer is not None:
        from kangaroo_jax.conversion.tokenizers import write_tokenizer

        raw.update(write_tokenizer(tokenizer, config, folder))
    else:
        tell("no tokenizer beside the source: the export has none; give one by --tokenizer")
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", _generation(raw))
    write_json(folder / "preprocessor_config.json", _preprocessor(config))
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)
    dtypes = {p: s.dtype.name for p, s in ours.specs.items() if p not in theirs.specs or theirs.specs[p] != s}
    write_json(folder / SIDECAR, {"config": config.to_dict(), "dtypes": dtypes})
    _write_hidden_rows(ours, config, folder / SHADOWED)


def write_beside_llama(
    raw: dict[str, Any],
    config: ConfigDict,
    tokenizer: Path | None,
    said: Mapping[str, Any],
    folder: Path,
    tell: Tell,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files of a bare Llama.

    Args:
        raw: the keys of config.json that follow from the weights.
        config: the stage's config.
        tokenizer: the tokenizer's file, or None.
        said: lengths, ids and generation settings of the Llama that this one comes from; they take precedence.
        folder: the target.
        tell: prints a line.
    """
    from kangaroo_jax.conversion.tokenizers import carry_settings, write_tokenizer

    tokens: dict[str, Any] = {}
    if tokenizer is not None:
        try:
            tokens = write_tokenizer(tokenizer, config, folder, marks=False)
        except UserError as error:  # a bare Llama may have a tokenizer that Kangaroo does not support
            shutil.copyfile(tokenizer, folder / tokenizer.name)
            tell(f"{error}; copied as it is")
        if not carry_settings(tokenizer, folder):
            tell(f"{tokenizer}: there is no tokenizer.json, which transformers reads")
    elif "eos_token_id" not in said:
        tell("no tokenizer beside the source: nothing says which token ends an answer; give one by --tokenizer")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    # Always written: the defaults would be Llama 2's.
    raw.update({key: said.get(key, tokens.get(key)) for key in ids})
    raw["max_position_embeddings"] = said.get("max_position_embeddings", formats.longest(config.model.llm))
    write_json(folder / "config.json", raw)
    generation = {key: raw[key] for key in ids if raw[key] is not None} | said.get("generation", {})
    write_json(folder / "generation_config.json", generation)


def _generation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The release's generation settings: sampled, 512 tokens at most."""
    value = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 512}
    if "bos_token_id" in raw:
        value.update({key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    return value


def _preprocessor(config: ConfigDict) -> dict[str, Any]:
    from kangaroo_jax.models.eva_clip import PIXEL_MEAN, PIXEL_STD

    size = config.data.image_size
    return {
        "processor_class": "KangarooProcessor",
        "auto_map": {"AutoProcessor": "processing_kangaroo.KangarooProcessor"},
        "size": {"height": size, "width": size},
        "resample": 3,  # PIL's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "frame_sampling": {key: config.data[key] for key in formats.SAMPLING},
    }


def _write_hidden_rows(ours: Weights, config: ConfigDict, path: Path) -> None:
    """Keep the embedding's rows that the marks replace: they are unused, but a round trip restores them."""
    from safetensors.numpy import save_file

    spec = ours.specs["llm/embedding"]
    rows = [ours.read("llm/embedding", (slice(i, i + 1), slice(0, spec.shape[1]))) for i in special_ids(config.model)]
    save_file({HIDDEN_ROWS: np.concatenate(rows)}, path, metadata={"format": "pt"})
