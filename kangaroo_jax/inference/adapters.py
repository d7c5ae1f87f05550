"""A model with an adapter beside it; several may share the weights of one base."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.adapters import Adapter, find_base, open_adapter, stored_sums
from kangaroo_jax.checkpoints.stored import whole
from kangaroo_jax.config import LoraConfig
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.weights import Loaded, load
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.layers import Linear
from kangaroo_jax.models.lora import FACTORS, factor_shapes, linear_maps
from kangaroo_jax.sharding import sharding

_LAYERS = re.compile(r"(llm/layers)/(\d+)/(.*)")


def load_adapted(
    path: str | Path, lora: str | Path = "", *, mesh: Mesh | None = None, ema: bool = False, **options: Any
) -> Loaded:
    """A model to talk to: a whole checkpoint, a run that trained an adapter, or a base with the adapter `lora`.

    `options` are those of `weights.load`; `ema` is of what was trained last. By default the decoder is quantised as it
    was beside the factors in training. Raises UserError; see there, and `adapted`.
    """
    folder = reading.find(path)
    if not lora and not reading.is_adapter(folder):
        return load(folder, mesh=mesh, ema=ema, **options)
    adapter = open_adapter(lora or folder, ema)
    if lora:
        base = reading.refuse_adapter(folder)
    elif adapter.base is not None:
        base = find_base(adapter.folder, adapter.base)
    else:
        raise UserError(
            f"{folder}: is an adapter that does not say of which base; give --checkpoint=BASE --lora={path}"
        )
    if options.get("quantize") is None:
        options["quantize"] = lora_of(adapter).quantize or None
    return adapted(load(base, mesh=mesh, **options), adapter, mesh)


def lora_of(adapter: Adapter) -> LoraConfig:
    """How it was trained; the defaults of one that was converted."""
    return reading.load_stage(adapter.folder).lora if adapter.base is not None else LoraConfig()


def adapted(base: Loaded, adapter: Adapter, mesh: Mesh | None = None) -> Loaded:
    """`base` with the factors of an adapter beside its linear maps. The arrays of the base are shared.

    Raises UserError if the adapter is of another base (the first tensor that differs is named), or of a linear map
    that has factors only where they are added to its weights.
    """
    if adapter.base is not None:
        adapter.base.check(base.sums, base.folder, adapter.folder)
    model: KangarooModel = nnx.merge(*nnx.split(base.model))
    depth = len(model.llm.layers) if isinstance(model.llm.layers, nnx.List) else 0
    maps: dict[str, dict[int | None, Linear]] = {}
    for path, module in linear_maps(model).items():
        found = _LAYERS.fullmatch(path)
        stacked, layer = (f"{found[1]}/{found[3]}", int(found[2])) if found else (path, None)
        maps.setdefault(stacked, {})[layer] = module
    for path in adapter.maps:
        if path not in maps:
            raise UserError(
                f"{adapter.folder}: adapts {path}, which is no linear map that may have factors beside it; add it to "
                f"the base: kangaroo convert --from={base.folder} --lora={adapter.folder} --to=DIR --format=orbax"
            )
        for name in FACTORS:
            _place(adapter, path, name, maps[path], depth, jnp.dtype(base.dtype), mesh)
    told = [base.weights_id, stored_sums(adapter.stored), adapter.scale]
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
    config, tokenizer = base.config, base.tokenizer
    if adapter.base is not None:
        stage = reading.load_stage(adapter.folder)
        config = stage.changed({"model": config.model})
        tokenizer = load_tokenizer(reading.find_tokenizer(adapter.folder))
    return Loaded(model, config, tokenizer, name, base.dtype, base.quantized, base.folder, base.sums)


def _place(
    adapter: Adapter,
    path: str,
    name: str,
    modules: dict[int | None, Linear],
    depth: int,
    dtype: Any,
    mesh: Mesh | None,
) -> None:
    """Put one factor beside a linear map, in each of its layers. Raises UserError for one that does not fit."""
    full = f"{path}/{name}"
    stacked = None not in modules
    module = next(iter(modules.values()))
    shape, axes = factor_shapes(module, adapter.rank)[name]
    wanted = (depth, *shape) if stacked else shape
    found = adapter.stored.specs[full].shape if full in adapter.stored.specs else None
    if found != wanted:
        raise UserError(
            f"{adapter.folder}: tensor {full} has shape {found}, this base wants {wanted}; it adapts another model"
        )
    for layer, module in modules.items():
        box = whole(wanted) if layer is None else (slice(layer, layer + 1), *whole(wanted[1:]))
        array = adapter.stored.read(full, box).astype(dtype)
        array = array if layer is None else array[0]
        where = sharding(mesh, axes, array.shape) if mesh is not None else None
        setattr(module, name, nnx.Param(jax.device_put(np.ascontiguousarray(array), where), axes=axes))
        module.lora_scale = adapter.scale
