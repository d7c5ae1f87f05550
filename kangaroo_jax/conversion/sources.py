"""Sources of a conversion: detects what a path holds, checks it against the table, reads its config."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints.stored import Stored, whole
from kangaroo_jax.config import ModelConfig, RopeScaling, stage_config
from kangaroo_jax.conversion import formats, gguf_files, names
from kangaroo_jax.conversion.files import Tensor, Tensors, files_of, left_aside, open_model, open_tensors
from kangaroo_jax.conversion.names import NameRow
from kangaroo_jax.conversion.weights import Cast, Mapped, Overlaid, Weights
from kangaroo_jax.data.tokenizer_gguf import is_gguf
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_json

SIDECAR, SHADOWED = "kangaroo_jax.json", "kangaroo_jax.safetensors"  # files of ours in an exported folder
HIDDEN_ROWS = "llm/embedding"  # name in SHADOWED of the rows that the marks replace
# The token embedding, and the head, which is the same tensor where it is tied.
HEADS = {
    **dict.fromkeys(("llama", "kangaroo"), ("model.embed_tokens.weight", "lm_head.weight")),
    "meta": ("tok_embeddings.weight", "output.weight"),
    "gguf": ("token_embd.weight", "output.weight"),
}
# A tensor that only this layout has, by which it is detected.
SIGNS = (
    ("kangaroo", "vision_tower.cls_token"),
    ("llama", "model.embed_tokens.weight"),
    ("meta", "tok_embeddings.weight"),
    ("gguf", "token_embd.weight"),
    ("eva", "visual.blocks.0.mlp.w1.weight"),
    ("eva", "blocks.0.mlp.w1.weight"),
    ("timm", "blocks.0.mlp.fc1_g.weight"),
)


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Weights under our names, with all that is known of the model.

    Attributes:
        path: the given path.
        layout: `orbax`, or a key of `names.LAYOUTS`.
        weights: everything that the layout covers.
        config: a stage's config; parts of its `model` that the layout does not cover are the preset's.
        tokenizer: the tokenizer's file, or None.
        files: the files that the weights are read from.
        left_out: in words, what else the files hold, and assumptions that were made.
        said: settings of a decoder besides its sizes: its longest text and, if its files state them, its ids and
            generation settings.
    """

    path: Path
    layout: str
    weights: Weights
    config: ConfigDict
    tokenizer: Path | None
    files: tuple[Path, ...]
    left_out: str = ""
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_source(
    path: str | Path,
    preset: str = "kangaroo_8b",
    overrides: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> WeightSource:
    """Detect what `path` holds and open it, without reading weights.

    Args:
        path: a folder or file.
        preset: the model, if the files do not state it.
        overrides: keys of a stage's config that take precedence over both.
        ema: take the average of the weights that a run of ours kept.

    Raises:
        UserError: the path holds nothing known or no average, or its tensors are not those of the table.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if is_ours(path):
        return open_ours(path, ema=ema)
    if ema:
        raise UserError(f"{path}: holds no average of its weights; only a run of kangaroo train keeps one; drop --ema")
    metadata: dict[str, Any] = {}
    if (file := gguf_files.gguf_in(path)) is not None:
        path = file
        tensors, metadata = gguf_files.open_weights(path)
    else:
        tensors = open_model(path)
    layout = next((layout for layout, sign in SIGNS if sign in tensors), None)
    if layout is None:
        beside = (path if path.is_dir() else path.parent) / "config.json"
        formats.check_kind(read_json(beside).get("model_type") if beside.is_file() else None, beside)
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(f"{path}: these are no weights of a known layout (its names are like {some})")
    config = _config(path, layout, tensors, preset)
    if layout == "gguf":
        gguf_files.read_config(metadata, config.model, tensors, path)
    config.update_from_flattened_dict(dict(overrides or {}))
    if layout in ("eva", "timm"):
        config.model.vision.pos_embed_grid = _stored_grid(tensors, config, path)
    if layout in HEADS:
        _check_head(path, layout, tensors, config.model.llm.tied_head)
    weights, left_out = _mapped(path, layout, tensors, config)
    words = [left_out, *_taken_for_granted(path, layout, files_of(tensors))]
    files = tuple(files_of(tensors))
    said = gguf_files.said(metadata) if layout == "gguf" else _said(path) if layout == "llama" else {}
    return WeightSource(path, layout, weights, config, _tokenizer(path), files, "; ".join(filter(None, words)), said)


def _check_head(path: Path, layout: str, tensors: Tensors, tied: bool) -> None:
    """Raise UserError if a head is missing that is not the token embedding, or another one is there where it is."""
    embedding, head = HEADS[layout]
    if not tied and head not in tensors:
        raise UserError(
            f"{path}: {head} is missing, and config.json does not say tie_word_embeddings: true; download the "
            "weights again, or say so there where the token embedding is the head"
        )
    if tied and head in tensors and not _are_equal(tensors[embedding], tensors[head]):
        raise UserError(
            f"{path}: {head} is not {embedding}, but config.json says tie_word_embeddings: true; "
            "say false there if the head is its own"
        )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    step = max(1, (64 << 20) // max(1, one.nbytes // max(1, one.shape[0])))
    parts = ((start, min(start + step, one.shape[0])) for start in range(0, one.shape[0], step))
    return all(one.read(*part).tobytes() == other.read(*part).tobytes() for part in parts)


def _taken_for_granted(path: Path, layout: str, files: Sequence[Path]) -> list[str]:
    words = []
    if others := left_aside(path, files):
        words.append(f"{', '.join(others)} beside the weights: not read")
    if layout == "meta":
        folder = path if path.is_dir() else path.parent
        raw = read_json(folder / "params.json")
        if raw.get("use_scaled_rope") and not raw.get("rope_scaling_factor"):
            words.append(f"the rope scaling's factor is not said: by the sizes it is {formats.usual_factor(raw):g}")
    return words


def _said(path: Path) -> dict[str, Any]:
    """A decoder's longest text, BOS, EOS and padding tokens and generation settings, as its folder states them."""
    folder = path if path.is_dir() else path.parent
    keys = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    said: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        raw = read_json(folder / name) if (folder / name).is_file() else {}
        said.update({key: raw[key] for key in keys if raw.get(key) is not None})
        if name == "generation_config.json":  # all keys, except those about the program that wrote it
            others = (key for key in raw if key not in (*keys, "transformers_version") and not key.startswith("_"))
            said["generation"] = {key: raw[key] for key in others}
    return said


def is_ours(path: Path) -> bool:
    """Whether training, or a conversion to `orbax`, wrote this folder."""
    from kangaroo_jax.checkpoints.reading import find

    try:
        find(path)
    except UserError:
        return False
    return True


def open_ours(path: Path, *, quantized: bool = False, ema: bool = False) -> WeightSource:
    """One of our checkpoints, or with `ema` the average of its weights.

    Its decoder may be quantised where the caller knows what to do with it.
    """
    from kangaroo_jax.checkpoints import reading
    from kangaroo_jax.checkpoints.frozen import weight_folders

    folder = reading.refuse_adapter(reading.find(path))
    config = ConfigDict(reading.load_config(folder).to_dict())
    folders = weight_folders(folder, ema)
    weights = Stored(*folders)
    if not quantized:
        reading.check_not_quantized(weights.specs, folder)
        reading.check_shapes(weights.specs, model_shapes(config.model), folder)
    try:
        tokenizer: Path | None = reading.find_tokenizer(folder)
    except UserError:
        tokenizer = None
    files = tuple(sorted(f for part in folders for f in part.rglob("*") if f.is_file()))
    length = formats.longest(config.model.llm, config.data.tokens_per_pack)
    return WeightSource(path, "orbax", weights, config, tokenizer, files, said={"max_position_embeddings": length})


def model_shapes(model: ConfigDict) -> dict[str, Any]:
    """path -> shape and dtype of every parameter of `config.model`."""
    return dict(_model_shapes(ModelConfig.from_config(model)))


@functools.lru_cache(maxsize=16)
def _model_shapes(model: ModelConfig) -> dict[str, Any]:
    """`model_shapes`, cached: tracing a model takes a second, and a conversion needs the shapes several times."""
    from kangaroo_jax.models.parameters import abstract_model

    try:
        return dict(abstract_model(model).shapes)
    except Exception as error:  # inconsistent sizes may raise anything
        why = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(f"config.model makes no model: {type(error).__name__}: {why}; check its sizes") from None


def shapes_of(model: ConfigDict) -> dict[str, tuple[int, ...]]:
    """path -> shape of every parameter of `config.model`."""
    return {path: tuple(entry.shape) for path, entry in model_shapes(model).items()}


def special_ids(model: ConfigDict) -> tuple[int, ...]:
    """The tokens whose embeddings are the rows of `special_embedding`, in order."""
    from kangaroo_jax.models.kangaroo import MARKS

    return tuple(model.special_ids[mark] for mark in MARKS)


# ----------------------------------------------------------------------------------- configs


def _config(path: Path, layout: str, tensors: Tensors, preset: str) -> ConfigDict:
    folder = path if path.is_dir() else path.parent
    config = ConfigDict(stage_config(preset).to_dict())
    if layout == "kangaroo" and (folder / SIDECAR).is_file():
        plain = read_json(folder / SIDECAR).get("config")
        if not isinstance(plain, dict) or not isinstance(plain.get("model"), dict):
            raise UserError(f"{folder / SIDECAR}: holds no config; remove the file to go without it")
        from kangaroo_jax.checkpoints.reading import completed

        config = completed(_tuples(plain), folder / SIDECAR)
    if layout in ("kangaroo", "llama"):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json beside the weights; it says what the shapes cannot (rope theta)")
        raw = read_json(folder / "config.json")
        formats.read_hf(raw, config.model, folder / "config.json")
        sampling = raw.get("frame_sampling") if layout == "kangaroo" else None
        config.data.update({key: value for key, value in (sampling or {}).items() if key in formats.SAMPLING})
    if layout == "meta":
        if not (folder / "params.json").is_file():
            raise UserError(f"{folder}: no params.json beside the weights; it says what the shapes cannot (rope theta)")
        vocabulary = tensors["tok_embeddings.weight"].shape[0]
        formats.read_meta(read_json(folder / "params.json"), config.model, folder / "params.json", vocabulary)
        embedding, head = (tensors.get(name) for name in HEADS[layout])
        config.model.llm.tied_head = head is None or (embedding is not None and _are_equal(embedding, head))
    return config


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _stored_grid(tensors: Tensors, config: ConfigDict, path: Path) -> int:
    """The side of the grid of an encoder's stored position embedding; it depends on the image size."""
    name = next((name for name in ("visual.pos_embed", "pos_embed") if name in tensors), None)
    if name is None:
        return config.model.vision.pos_embed_grid  # `names.match` reports it as missing
    shape = tensors[name].shape
    side = round((shape[1] - 1) ** 0.5) if len(shape) == 3 and shape[1] > 1 else 0
    if side * side != (shape[1] - 1 if len(shape) == 3 else -1):
        raise UserError(f"{path}: {name} of shape {shape} is not CLS and a square grid")
    return side


def _tokenizer(path: Path) -> Path | None:
    """The tokenizer's file beside weights, or in them; for others' SentencePiece models the tokenizer.json."""
    if is_gguf(path):
        return path
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", (folder / "tokenizer.model").read_bytes()[:256])
        if not ranks and not (folder / "kangaroo_tokenizer.model").is_file():
            return folder / "tokenizer.json"
    for name in ("kangaroo_tokenizer.model", "tokenizer.model", "tokenizer.json", "original/tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    return None


# ----------------------------------------------------------------------------------- weights


def _mapped(path: Path, layout: str, tensors: Tensors, config: ConfigDict) -> tuple[Weights, str]:
    """The tensors under our names, and a note on what else the files hold. Raises UserError; see `names.match`."""
    rows = table_for(layout, config.model, tensors)
    not_weights = names.NOT_WEIGHTS.get(layout, ())
    derived = names.DERIVED.get(layout, ())
    known = [pattern for pattern, _ in (*not_weights, *derived)]
    known += [re.escape(HEADS[layout][1])] if layout in HEADS and config.model.llm.tied_head else []
    names.match(rows, {name: tensor.shape for name, tensor in tensors.items()}, str(path), known)
    _check_derived(path, layout, tensors, config.model)
    left = [words for name in tensors for pattern, words in not_weights if re.fullmatch(pattern, name)]
    weights: Weights = Mapped(tensors, rows)
    folder = path if path.is_dir() else path.parent
    if layout == "kangaroo" and (folder / SIDECAR).is_file():
        weights = _as_it_was(weights, folder, config.model)
    return weights, f"{len(left)} tensors are left out: {', '.join(sorted(set(left)))}" if left else ""


def table_for(layout: str, model: ConfigDict, tensors: Mapping[str, Any] | None = None) -> list[NameRow]:
    """The rows of a layout for `config.model`, with the names in `tensors` where files may differ."""
    tensors = tensors or {}
    options = {"projector": model.projector}
    if layout == "kangaroo":
        options["patchify"] = _patchify_name(tensors, model) or "patchify"
    if layout == "eva":
        options["prefix"] = "" if "cls_token" in tensors else "visual."
    rows = names.table(layout, shapes_of(model), special_ids(model), **options)
    if layout == "meta" and model.llm.tied_head and not tensors:  # Meta writes a tied head, too
        embedding, head = HEADS[layout]
        rows += [dataclasses.replace(row, theirs=head) for row in rows if row.theirs == embedding]
    return rows


def _patchify_name(tensors: Mapping[str, Any], model: ConfigDict) -> str | None:
    """The convolution's name in the release, which is unknown: it is the only weight of that shape."""
    wanted = (model.vision.width, 1, *model.patchify.kernel)
    found = [name for name, tensor in tensors.items() if tensor.shape == wanted and name.endswith(".weight")]
    return found[0].removesuffix(".weight") if len(found) == 1 else None


def _check_derived(path: Path, layout: str, tensors: Tensors, model: ConfigDict) -> None:
    """Compare stored tables that follow from the config with computed ones. Raises UserError if they differ."""
    for name, tensor in tensors.items():
        kind = next((k for p, k in names.DERIVED.get(layout, ()) if re.fullmatch(p, name)), None)
        if kind is None:
            continue
        expected = _vision_rope(name, tensor, model.vision) if kind == "vision" else _llm_rope(layout, model.llm)
        found = tensor.read().astype(np.float64)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-2, atol=1e-2 * expected.max()):
            raise UserError(
                f"{path}: {name} is not the rotary table of this config; check rope_theta, heads and the grid"
            )


def _vision_rope(name: str, tensor: Tensor, vision: ConfigDict) -> np.ndarray:
    from kangaroo_jax.models.layers import rotary_2d

    side = max(1, round(tensor.shape[0] ** 0.5))
    head_dim = vision.width // vision.heads
    tables = rotary_2d(side, head_dim, vision.rope_theta, vision.rope_reference_grid)
    return np.repeat(tables[0 if name.endswith("cos") else 1], 2, axis=-1)


def _llm_rope(layout: str, llm: ConfigDict) -> np.ndarray:
    from kangaroo_jax.models.layers import NOT_SCALED, rotary_frequencies

    scaling = NOT_SCALED if layout == "meta" else RopeScaling.from_config(llm.rope_scaling)
    return rotary_frequencies(llm.head_dim, llm.rope_theta, scaling)


def _as_it_was(weights: Weights, folder: Path, model: ConfigDict) -> Weights:
    """Undo the changes that our export made to fit the layout: rows replaced by the marks, and widened types."""
    if (folder / SHADOWED).is_file():
        hidden = open_tensors(folder / SHADOWED).get(HIDDEN_ROWS)
        ids = special_ids(model)
        if hidden is None or hidden.shape != (len(ids), model.llm.width):
            raise UserError(f"{folder / SHADOWED}: does not belong to these weights; remove it to go without it")
        dtype = weights.specs["llm/embedding"].dtype
        weights = Overlaid(weights, ids, hidden.read().astype(dtype))
    recorded = read_json(folder / SIDECAR).get("dtypes", {})
    dtypes = {path: _dtype(name) for path, name in recorded.items() if path in weights.specs}
    narrowed = {path: dtype for path, dtype in dtypes.items() if _is_exact(weights, path, dtype)}
    return Cast(weights, narrowed)


def _dtype(name: str) -> np.dtype:
    from kangaroo_jax.conversion.weights import dtype_named

    return dtype_named(name)


def _is_exact(weights: Weights, path: str, dtype: np.dtype) -> bool:
    """Whether a parameter is exact in the type that it had before an export widened it."""
    spec = weights.specs[path]
    if spec.dtype == dtype:
        return True
    step = max(1, (64 << 20) // max(1, int(np.prod(spec.shape[1:])) * spec.dtype.itemsize))
    for start in range(0, spec.shape[0], step):
        box = (slice(start, min(start + step, spec.shape[0])), *whole(spec.shape[1:]))
        array = weights.read(path, box)
        if not np.array_equal(array.astype(dtype).astype(spec.dtype), array):
            return False
    return True


def fingerprint(path: Path, files: Sequence[Path]) -> list[Any]:
    """A value that changes when the files do; part of the plan of a resumable conversion."""
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return json.loads(json.dumps([str(path.resolve()), stats]))
