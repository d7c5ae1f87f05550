"""LoRA (Hu et al. 2021): low-rank factors beside the kernels of linear maps, and alone trained.

    y[..., outputs] = x[..., inputs] (kernel[inputs, outputs] + scale * lora_a[inputs, r] lora_b[r, outputs])

`lora_a` begins uniform within 1 / sqrt(inputs), as PEFT's, `lora_b` as zeros, so that the model begins as its base. In
stacked layers both have the leading axis of layers.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.config import LoraConfig, ModelConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.layers import Linear
from kangaroo_jax.models.quantized import as_quantized, with_quantized_embedding

FACTORS = ("lora_a", "lora_b")
_MAY = re.compile(r"(llm/layers|vision/blocks|projector)/.*")  # have factors: PEFT's "all-linear"


def is_factor(path: str) -> bool:
    """Whether a parameter is one of an adapter's."""
    return path.endswith(tuple(f"/{name}" for name in FACTORS))


def linear_maps(model: nnx.Module) -> dict[str, Linear]:
    """path -> every linear map that may have factors."""
    found = (("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
    return {path: module for path, module in found if isinstance(module, Linear) and _MAY.fullmatch(path)}


def targeted(model: nnx.Module, config: LoraConfig) -> dict[str, Linear]:
    """path -> the linear maps that `config.targets` matches, which may be stacked.

    Raises UserError if there is none, the expression is none, or the rank is above the width of a map.
    """
    every = linear_maps(model)
    try:
        found = {path: module for path, module in every.items() if re.fullmatch(config.targets, path)}
    except re.error as error:
        raise UserError(f"config.lora.targets {config.targets!r} is no regular expression ({error})") from None
    if not found:
        raise UserError(
            f"config.lora.targets {config.targets!r} matches no linear map; there are {', '.join(sorted(every))}"
        )
    for path, module in found.items():
        inputs, outputs = _sides(module)
        if config.rank > (most := min(math.prod(inputs), math.prod(outputs))):
            raise UserError(
                f"config.lora.rank is {config.rank}, above the width of {path}, {most}: a rank of {most} is already "
                "as much as full training of it"
            )
    return found


def add_factors(model: nnx.Module, maps: Callable[[nnx.Module], dict[str, Linear]], rank: int, scale: float) -> None:
    """Give linear maps of an abstract model (from `nnx.eval_shape`) factors, stacked where the maps are."""
    for module in maps(model).values():
        for name, (shape, axes) in factor_shapes(module, rank).items():
            setattr(module, name, nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes))
        module.lora_scale = scale


def factor_shapes(module: Linear, rank: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of each factor of a linear map, stacked where the map is."""
    inputs, outputs = _sides(module)
    layers = module.kernel.shape[: module.kernel.ndim - len(module.axes)]
    names = ("layers",) * len(layers)
    return {
        "lora_a": ((*layers, *inputs, rank), (*names, *module.axes[: module.contracted], None)),
        "lora_b": ((*layers, rank, *outputs), (*names, None, *module.axes[module.contracted :])),
    }


def _sides(module: Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inputs and outputs of a linear map, or of one layer of it."""
    shape = module.kernel.shape[module.kernel.ndim - len(module.axes) :]
    *before, last = shape[: module.contracted]
    last *= 2 if module.kernel.dtype == jnp.uint8 else 1  # int4: two to a byte
    return (*before, last), shape[module.contracted :]


def abstract_adapted(config: ModelConfig, lora: LoraConfig) -> KangarooModel:
    """The model with the factors of `lora`, its decoder quantised as it says, with nothing allocated.

    Raises UserError; see `targeted`.
    """
    model: KangarooModel = nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0)))
    if lora.rank:
        add_factors(model, lambda model: targeted(model, lora), lora.rank, lora.scale)
    if lora.quantize:
        as_quantized(model.llm, lora.quantize)
        with_quantized_embedding(model.llm)
    return model


def initial_factors(shapes: Mapping[str, Any], seed: int) -> dict[str, jax.Array]:
    """The factors among `shapes` as they begin, float32; each depends on the seed and its own name alone."""
    factors = {}
    for path in sorted(filter(is_factor, shapes)):
        shape = shapes[path].shape
        if path.endswith("lora_b"):
            factors[path] = jnp.zeros(shape, jnp.float32)
            continue
        stacked = 1 if re.match(r"llm/layers/|vision/blocks/", path) else 0
        bound = float(np.prod(shape[stacked:-1])) ** -0.5
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()) & 0x7FFFFFFF)
        factors[path] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return factors
