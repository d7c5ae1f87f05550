"""`kangaroo convert`: converts weights from any layout of the table into files of any other.

    source files -> `Weights` under our names -> target files

Only a few boxes are in memory at a time; the target exists whole or not at all.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.conversion import export, formats
from kangaroo_jax.conversion.adapters import convert_adapter, model_of
from kangaroo_jax.conversion.assemble import combine
from kangaroo_jax.conversion.building import Building
from kangaroo_jax.conversion.lora import Merged, layout_of, open_adapter
from kangaroo_jax.conversion.names import LAYOUTS, SPECIAL, NameRow
from kangaroo_jax.conversion.quantize import Quantized
from kangaroo_jax.conversion.runs import open_run, run_base
from kangaroo_jax.conversion.shards import SHARD_BYTES, nbytes_there, write_safetensors, write_torch
from kangaroo_jax.conversion.sources import WeightSource, fingerprint, open_source, shapes_of, special_ids, table_for
from kangaroo_jax.conversion.store import write_config, write_params
from kangaroo_jax.conversion.weights import Cast, Marked, Shrunk, Weights, dtype_named
from kangaroo_jax.data.tokenizer import tokenizer_files
from kangaroo_jax.data.tokenizer_gguf import is_gguf
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.progress import Progress, Tell

FORMATS = ("orbax", "hf", "llama", "meta", "eva", "timm")
LAYOUT_OF = {"hf": "kangaroo", **{name: name for name in ("llama", "meta", "eva", "timm")}}
SAME_NAME = {"kangaroo": "hf"}  # layout -> the format that it is written as


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to write: weights under our names, a stage's config, a tokenizer's file or None, and the source's own
    lengths, ids and generation settings (`WeightSource.said`)."""

    weights: Weights
    config: ConfigDict
    tokenizer: Path | None
    said: Mapping[str, Any]


def convert(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    format: str = "",
    dtype: str = "keep",
    preset: str = "kangaroo_8b",
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
    lora: str | Path | None = None,
    ema: bool = False,
    base: str | Path | None = None,
    parts_alone: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    tell: Tell = print,
) -> Path:
    """Convert one source, or assemble a model from several (an encoder and a decoder); returns the target.

    A source that is a LoRA adapter is converted by itself; see `adapters.convert_adapter`. A run that trained one is
    the merged model, except with the format `peft`.

    Args:
        sources: files or folders; their layout is detected.
        target: a new folder.
        format: one of FORMATS; by default `hf` for one of our checkpoints and `orbax` for everything else.
        dtype: `keep`, or the type that every weight is rounded to: float32, bfloat16 or float16.
        preset: the model, if the files do not state it (an encoder has no config of its own).
        overrides: keys of a stage's config that take precedence over both.
        tokenizer: the model's tokenizer file; by default the one beside the source.
        quantize: `int8` or `int4`, which the decoder's linear maps are rounded to, for talking (`orbax`).
        lora: folder of a LoRA adapter (PEFT's, or ours), which is added to the weights.
        ema: take the average that training kept of what was trained last: of the adapter, where there is one.
        base: the model that a PEFT adapter as source adapts, by default that of `preset`; where the base of a run is.
        parts_alone: whether a decoder alone makes a model: it gets a new encoder, that of `preset`.
        seed: determines the new weights of an assembled model.
        shard_bytes: size of the largest safetensors file.
        tell: prints a line.

    Raises:
        UserError: see `open_source`; or the target exists, a weight is NaN, the disk is full. Nothing is kept.
    """
    run = len(sources) == 1 and format != "peft" and run_base(sources[0]) is not None
    if not run and any(layout_of(source) for source in sources):
        if quantize is not None:
            raise UserError(f"--quantize={quantize}: a LoRA adapter is not quantised; leave it out")
        options: dict[str, Any] = dict(format=format, dtype=dtype, ema=ema, tell=tell)
        return _adapter_alone(sources, target, base, preset, overrides, lora, **options)
    if base is not None and not run:
        raise UserError(f"--base={base}: is only for a source that is a LoRA adapter; leave it out")
    own = ema and lora is None
    if run:
        opened = [open_run(sources[0], base, own)]
    else:
        opened = [open_source(source, preset, overrides, own) for source in sources]
    beside = next((s.tokenizer for s in reversed(opened) if s.tokenizer), None)
    file = Path(tokenizer) if tokenizer else beside
    weights, config = _joined(opened, preset, overrides or {}, seed, file, parts_alone, tell)
    format = format or ("hf" if quantize is None and opened[0].layout == "orbax" and len(opened) == 1 else "orbax")
    if format not in FORMATS:
        raise UserError(f"--format={format}: use one of {', '.join(FORMATS)}")
    read_from = [fingerprint(source.path, source.files) for source in opened]
    if lora is not None:
        adapter = open_adapter(lora, config.model, ema)
        read_from.append(fingerprint(adapter.path, adapter.files))
        weights = Merged(weights, adapter)
        tell(f"{lora}: added to {sum(map(len, adapter.adapted.values()))} linear maps")
    if dtype != "keep":
        weights = Cast(weights, dict.fromkeys(weights.specs, dtype_named(dtype)))
    if quantize is not None:
        if format != "orbax":
            raise UserError(f"--quantize={quantize}: is for --format=orbax; --format={format} holds no such weights")
        weights = Quantized(weights, ModelConfig.from_config(config.model), quantize)
    said = next((s.said for s in reversed(opened) if s.said), {})
    model = Model(weights, config, file, said)
    _check_complete(model, format, [str(source.path) for source in opened])
    plan: dict[str, Any] = dict(format=format, dtype=dtype, preset=preset, seed=seed, shard_bytes=shard_bytes)
    plan.update(
        quantize=quantize, config=config.to_json_best_effort(), tokenizer=str(model.tokenizer), sources=read_from
    )
    _write(model, format, target, plan, shard_bytes, tell)
    return Path(target)


def _joined(
    opened: Sequence[WeightSource],
    preset: str,
    overrides: Mapping[str, Any],
    seed: int,
    tokenizer: Path | None,
    parts_alone: bool,
    tell: Tell,
) -> tuple[Weights, ConfigDict]:
    """Combine the sources, and print what they are; see `combine`."""
    for source in opened:
        tell(f"{source.path}: {source.layout}, {len(source.weights.specs)} parameters" + _and(source.left_out))
    weights, config, notes = combine(opened, preset, overrides, seed, tokenizer, parts_alone=parts_alone)
    for line in notes:
        tell(line)
    return weights, config


def _adapter_alone(
    sources: Sequence[str | Path],
    target: str | Path,
    base: str | Path | None,
    preset: str,
    overrides: Mapping[str, Any] | None,
    lora: str | Path | None,
    **options: Any,
) -> Path:
    """Convert a source that is a LoRA adapter. Raises UserError if there are other sources."""
    if len(sources) > 1 or lora is not None:
        raise UserError(
            f"{', '.join(map(str, sources))}: a LoRA adapter is converted alone; "
            "--from=MODEL --lora=ADAPTER adds it to a model"
        )
    return convert_adapter(sources[0], target, model_of(sources[0], base, preset, overrides), **options)


def _and(words: str) -> str:
    return f"; {words}" if words else ""


def _check_complete(model: Model, format: str, where: list[str]) -> None:
    """Raise UserError if the source lacks a part that the format holds."""
    parts = LAYOUTS[LAYOUT_OF[format]] if format != "orbax" else ("",)
    lacking = [path for path in shapes_of(model.config.model) if path.startswith(parts)]
    lacking = [path for path in lacking if path not in model.weights.specs]
    if lacking:
        tops = ", ".join(sorted({path.split("/")[0] for path in lacking}))
        raise UserError(
            f"{', '.join(where)}: has no {tops}, which the format {format} holds; "
            "assemble a model with --vision and --llm, or choose another --format"
        )


def _write(
    model: Model, format: str, target: str | Path, plan: Mapping[str, Any], shard_bytes: int, tell: Tell
) -> None:
    with Building(target, plan) as building:
        if format == "orbax":
            _write_ours(model, building, tell)
        else:
            _write_theirs(model, format, building, shard_bytes, tell)
    tell(f"{target}: {format}, done")


def _write_ours(model: Model, building: Building, tell: Tell) -> None:
    total = sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in model.weights.specs.values())
    building.need(total)
    progress = Progress("orbax", total, "bytes", tell)
    write_params(model.weights, building, progress)
    write_config(model.config.to_dict(), building.folder)
    if model.tokenizer is not None:
        for name, data in tokenizer_files(model.tokenizer).items():
            (building.folder / name).write_bytes(data)
    progress.finish()


def _write_theirs(model: Model, format: str, building: Building, shard_bytes: int, tell: Tell) -> None:
    layout = LAYOUT_OF[format]
    weights, config = model.weights, model.config
    if layout == "kangaroo":
        weights = Marked(weights, special_ids(config.model))
    elif added := config.model.llm.added_rows if "llm/" in LAYOUTS[layout] else 0:
        weights, config = Shrunk(weights, added), ConfigDict(config.to_dict())
        config.model.llm.update(vocab_size=config.model.llm.vocab_size - added, added_rows=0)
        model = dataclasses.replace(model, weights=weights, config=config)
        tell(f"{added} rows of the vocabulary that were added for the marks: left out")
    rows = [row for row in table_for(layout, config.model) if row.ours != SPECIAL]
    total = sum(nbytes_there(row, weights) for row in rows)
    building.need(total)
    if left := sorted({path.split("/")[0] for path in weights.specs if not path.startswith(LAYOUTS[layout])}):
        tell(f"format {format} has no place for {', '.join(left)}: left out")
    progress = Progress(format, total, "bytes", tell)
    _write_config_there(format, model, weights, rows, building, tell)
    if format == "meta":
        write_torch(weights, rows, building, progress, "consolidated.00.pth")
    else:
        write_safetensors(weights, rows, building, progress, limit=shard_bytes)
    progress.finish()
    if layout == "kangaroo":
        export.write_beside(model.weights, weights, config, model.tokenizer, building.folder, tell)
    elif layout == "meta" and model.tokenizer is not None:
        if is_gguf(model.tokenizer):
            (building.folder / "tokenizer.json").write_bytes(tokenizer_files(model.tokenizer)["tokenizer.json"])
        else:
            shutil.copyfile(model.tokenizer, building.folder / model.tokenizer.name)


def _write_config_there(
    format: str, model: Model, weights: Weights, rows: Sequence[NameRow], building: Building, tell: Tell
) -> None:
    """Write config.json or params.json, before the weights, so that settings it cannot express fail at once."""
    llm, folder = model.config.model.llm, building.folder
    if format == "meta":
        export.write_json(folder / "params.json", formats.write_meta(llm))
    elif format == "llama":
        raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **formats.write_llm(llm)}
        raw["torch_dtype"] = export.widest(weights, [row.ours for row in rows])
        export.write_beside_llama(raw, model.config, model.tokenizer, model.said, folder, tell)
