"""Weights of linear maps as small whole numbers: int8 with a scale an output, or int4 with a scale a group of inputs.

    int8  kernel int8[inputs, outputs]          kernel_scale float32[outputs]
    int4  kernel uint8[inputs / 2, outputs]     kernel_scale float32[inputs / g, outputs]

    embedding int8[tokens, width]               embedding_scale float32[tokens]; beside an adapter in training alone

Of several input dimensions the last is packed and grouped, by g = 128 of it, or the largest divisor of it below. A byte
of int4 holds elements i (low half) and i + g / 2 (high half) of its group, 8 added to each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

FORMATS = ("int8", "int4")
GROUP = 128
KERNEL, SCALE = "kernel", "kernel_scale"
EMBEDDING, EMBEDDING_SCALE = "embedding", "embedding_scale"
_MOST_BYTES = 64 << 20  # of a kernel that is quantised at once
DTYPES: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.uint8}

Shape = tuple[int, ...]


def group_size(inputs: int) -> int:
    """Elements of the last input dimension that share a scale of int4: even, at most GROUP. ValueError for none."""
    sizes = [size for size in range(2, GROUP + 1, 2) if inputs % size == 0]
    if not sizes:
        raise ValueError(f"{inputs} inputs cannot be packed two to a byte")
    return max(sizes)


def shapes(shape: Shape, contracted: int, form: str) -> tuple[Shape, Shape]:
    """Shapes of kernel and scale in `form`, of one whose `contracted` first dimensions are inputs."""
    if form == "int8":
        return shape, shape[contracted:]
    *before, inputs = shape[:contracted]
    outputs = shape[contracted:]
    return (*before, inputs // 2, *outputs), (*before, inputs // group_size(inputs), *outputs)


def quantize(kernel: np.ndarray, contracted: int, form: str) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [inputs, outputs] in `form`, and its scale; each number is rounded to the nearest."""
    if kernel.nbytes > _MOST_BYTES:  # a part of the outputs at a time
        parts = np.array_split(kernel, -(-kernel.nbytes // _MOST_BYTES), axis=-1)
        kernels, scales = zip(*(quantize(part, contracted, form) for part in parts), strict=True)
        return np.concatenate(kernels, axis=-1), np.concatenate(scales, axis=-1)
    kernel = kernel.astype(np.float32, copy=False)
    if form == "int8":
        axes = tuple(range(contracted))
        scale = _scale(np.abs(kernel).max(axis=axes), 127)
        return np.rint(kernel / scale).astype(np.int8), scale
    size, axis = group_size(kernel.shape[contracted - 1]), contracted
    grouped = kernel.reshape(*kernel.shape[: axis - 1], -1, size, *kernel.shape[axis:])
    scale = _scale(np.abs(grouped).max(axis=axis), 7)
    whole = (np.rint(grouped / np.expand_dims(scale, axis)) + 8).astype(np.uint8)
    low, high = np.split(whole, 2, axis=axis)
    packed = low | high << 4
    return packed.reshape(shapes(kernel.shape, contracted, form)[0]), scale


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An embedding [tokens, width] in int8, and the scale of each token; each number is rounded to the nearest."""
    whole, scale = np.empty(table.shape, np.int8), np.empty(table.shape[:1], np.float32)
    step = max(1, _MOST_BYTES // (4 * table.shape[1]))
    for first in range(0, len(table), step):
        rows = table[first : first + step].astype(np.float32)
        scale[first : first + step] = _scale(np.abs(rows).max(axis=1), 127)
        whole[first : first + step] = np.rint(rows / scale[first : first + step, None])
    return whole, scale


def _scale(largest: np.ndarray, steps: int) -> np.ndarray:
    return np.where(largest == 0, 1.0, largest / steps).astype(np.float32)


def dequantize(kernel: Any, scale: Any, contracted: int) -> Any:
    """What `quantize` was given, as float32[inputs, outputs], rounded; of NumPy's arrays or JAX's."""
    if kernel.dtype == jnp.int8:
        return kernel.astype(np.float32) * scale
    return unpack(kernel, scale, contracted, np.float32)


def unpack(kernel: Any, scale: Any, contracted: int, dtype: DTypeLike) -> Any:
    """The kernel [inputs, outputs] in `dtype` that int4 stands for."""
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    axis = contracted
    groups = scale.shape[axis - 1]
    packed = kernel.reshape(*kernel.shape[: axis - 1], groups, -1, *kernel.shape[axis:])
    whole = xp.concatenate([packed & 15, packed >> 4], axis=axis).astype(np.int8) - 8
    values = whole.astype(dtype) * xp.expand_dims(scale, axis).astype(dtype)
    return values.reshape(*kernel.shape[: axis - 1], -1, *kernel.shape[axis:])


def dense(kernel: Any, scale: Any, contracted: int, dtype: DTypeLike) -> Any:
    """The kernel [inputs, outputs] in `dtype`, which it is computed in, that either format stands for."""
    if kernel.dtype == jnp.int8:
        return kernel.astype(dtype) * scale.astype(dtype)
    return unpack(kernel, scale, contracted, dtype)


def linear_maps(decoder: nnx.Module) -> list[tuple[str, Any]]:
    """(path, linear map) of the decoder's: what is quantised. They are those that have a kernel."""
    maps = ((path, module) for path, module in nnx.iter_modules(decoder) if hasattr(module, "contracted"))
    return [("/".join(map(str, path)), module) for path, module in maps]


def with_quantized_embedding(decoder: Any) -> None:
    """Give an abstract decoder an embedding in int8, and its scales, which every device has whole."""
    decoder.embedding = nnx.Param(
        jax.ShapeDtypeStruct(decoder.embedding.shape, jnp.int8), axes=tuple(decoder.embedding.axes)
    )
    scale = jax.ShapeDtypeStruct(decoder.embedding.shape[:1], jnp.float32)
    decoder.embedding_scale = nnx.Param(scale, axes=(None,))


def as_quantized(decoder: nnx.Module, form: str) -> None:
    """Give an abstract decoder's linear maps (from `nnx.eval_shape`), stacked or not, the parameters of `form`."""
    for _, module in linear_maps(decoder):
        shape, axes = module.kernel.shape, tuple(module.kernel.axes)
        stacked = len(shape) - len(module.axes)  # dimensions of layers
        kernel, scale = shapes(shape[stacked:], module.contracted, form)
        own = axes[stacked:]
        scale_axes = own[module.contracted :] if form == "int8" else own
        lead, layers = shape[:stacked], axes[:stacked]
        module.kernel = nnx.Param(jax.ShapeDtypeStruct((*lead, *kernel), DTYPES[form]), axes=axes)
        module.kernel_scale = nnx.Param(jax.ShapeDtypeStruct((*lead, *scale), jnp.float32), axes=(*layers, *scale_axes))
