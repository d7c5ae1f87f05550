"""Converts a LoRA adapter by itself: PEFT's folder to ours and back, bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.config import stage_config
from kangaroo_jax.conversion import export
from kangaroo_jax.conversion.building import Building
from kangaroo_jax.conversion.lora import SETTINGS, Adapter, kernels, layout_of, module, open_adapter
from kangaroo_jax.conversion.names import NameRow
from kangaroo_jax.conversion.shards import nbytes_there, write_safetensors
from kangaroo_jax.conversion.sources import fingerprint, open_source
from kangaroo_jax.conversion.store import write_config, write_params
from kangaroo_jax.conversion.weights import Cast, Weights, dtype_named
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.progress import Progress, Tell

FORMATS = ("orbax", "peft")


def convert_adapter(
    source: str | Path,
    target: str | Path,
    model: ConfigDict | None,
    *,
    format: str = "",
    dtype: str = "keep",
    ema: bool = False,
    tell: Tell = print,
) -> Path:
    """Convert an adapter.

    Args:
        source: a PEFT folder, or one of our adapters.
        target: a new folder.
        model: config.model of the model that it adapts; None takes it from an adapter of ours.
        format: `orbax` or `peft`; by default the other one.
        dtype: `keep`, or the type that every factor is rounded to.
        ema: take the average of the factors that a run of ours kept.
        tell: prints a line.

    Returns:
        The target.

    Raises:
        UserError: see `open_adapter`; or the target exists, a number is NaN, the disk is full. Nothing is kept.
    """
    adapter = open_adapter(source, model, ema)
    maps = sum(map(len, adapter.adapted.values()))
    tell(f"{source}: a LoRA adapter ({adapter.layout}) of rank {adapter.settings['r']} of {maps} linear maps")
    format = format or ("orbax" if adapter.layout == "peft" else "peft")
    if format not in FORMATS:
        raise UserError(f"--format={format}: an adapter is {' or '.join(FORMATS)}; --lora=ADAPTER adds it to a model")
    weights = adapter.weights
    if dtype != "keep":
        weights = Cast(weights, dict.fromkeys(weights.specs, dtype_named(dtype)))
    plan: dict[str, Any] = dict(adapter=fingerprint(adapter.path, adapter.files), format=format, dtype=dtype)
    plan.update(model=adapter.model.to_json_best_effort(), settings=adapter.settings)
    with Building(target, plan) as building:
        (_write_ours if format == "orbax" else _write_peft)(adapter, weights, building, tell)
    tell(f"{target}: {format}, done")
    return Path(target)


def _write_ours(adapter: Adapter, weights: Weights, building: Building, tell: Tell) -> None:
    total = sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in weights.specs.values())
    building.need(total)
    progress = Progress("orbax", total, "bytes", tell)
    write_params(weights, building, progress)
    adapted = {path: None if layers == (None,) else list(layers) for path, layers in adapter.adapted.items()}
    config = dict(lora=dict(adapter.settings), adapted=adapted, model=adapter.model.to_dict())
    write_config(config, building.folder)
    progress.finish()


def _write_peft(adapter: Adapter, weights: Weights, building: Building, tell: Tell) -> None:
    rows = adapter.rows
    _check_zeros(adapter, rows)
    total = sum(nbytes_there(row, weights) for row in rows)
    building.need(total)
    progress = Progress("peft", total, "bytes", tell)
    export.write_json(building.folder / SETTINGS, dict(sorted(_settings(adapter).items())))
    write_safetensors(weights, rows, building, progress, limit=total + 1, stem="adapter_model")
    progress.finish()


def _settings(adapter: Adapter) -> Mapping[str, Any]:
    """adapter_config.json as PEFT wrote it; for an adapter from training, with the keys that PEFT requires."""
    every = kernels(adapter.model)
    modules = [module(row) for path, layers in adapter.adapted.items() for row in every[path] if row.layer in layers]
    usual = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=None, bias="none")
    return {**usual, "target_modules": modules, **adapter.settings}


def _check_zeros(adapter: Adapter, rows: list[NameRow]) -> None:
    """Raise UserError if a layer that the config does not list as adapted has an adapter, which would be lost."""
    kept = {(row.ours, row.layer) for row in rows}
    for path, spec in adapter.weights.specs.items():
        if (path, None) in kept:
            continue
        for layer in range(spec.shape[0]):
            if (path, layer) in kept:
                continue
            box = (slice(layer, layer + 1), *(slice(0, n) for n in spec.shape[1:]))
            if adapter.weights.read(path, box).any():
                raise UserError(f"{adapter.path}: {path} is not zero in layer {layer}, which `adapted` leaves out")


def model_of(
    source: str | Path, base: str | Path | None, preset: str, overrides: Mapping[str, Any] | None
) -> ConfigDict | None:
    """config.model of the model that an adapter adapts: from `base`, or the preset; None if the adapter states it.

    Raises UserError if both state it, or the base cannot be read.
    """
    if layout_of(source) == "orbax":
        if base is not None:
            raise UserError(f"--base={base}: {source} says itself what it adapts; leave --base out")
        return None
    if base is not None:
        return open_source(base, preset, overrides).config.model
    config = ConfigDict(stage_config(preset).to_dict())
    config.update_from_flattened_dict(dict(overrides or {}))
    return config.model
