"""From the vision encoder's width to the language model's: time, 3D patchify, projector."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from kangaroo_jax.config import PatchifyConfig
from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.layers import Linear, constant, parameter

PROJECTORS = ("linear", "mlp2x_gelu")


def time_encoding(seconds: Float[Array, "*batch"], width: int, theta: float) -> Float[Array, "*batch D"]:
    """Temporal position encoding of width D.

    The sinusoids of Vaswani et al. (2017) of the frame's real time: element 2i is
    sin(seconds / theta^(2i / width)) and element 2i + 1 the cosine of the same angle.
    """
    frequencies = theta ** -(np.arange(0, width, 2) / width)
    angles = seconds.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*seconds.shape, width)


class Patchify(nnx.Module):
    """A depthwise 3D convolution whose stride is its kernel: joins frames and neighbouring patches.

    It starts as average pooling.
    """

    def __init__(self, config: PatchifyConfig, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.kernel_size = tuple(config.kernel)
        mean = 1.0 / float(np.prod(self.kernel_size))
        axes = (None, None, None, "vision_embed")
        shape = (*self.kernel_size, width)
        self.kernel = parameter(constant(mean), shape, axes, rngs=rngs, dtype=param_dtype)
        self.has_bias = config.bias
        if config.bias:
            self.bias = parameter(constant(0.0), (width,), ("vision_embed",), rngs=rngs, dtype=param_dtype)

    def __call__(self, x: Float[Array, "B F H_p W_p D"]) -> Float[Array, "B F_k H_r W_c D"]:
        """[B, F / frames, H_p / rows, W_p / columns, D]; a rest at the border is cut off.

        Raises UserError where F is no multiple of the frames joined.
        """
        k, r, c = self.kernel_size
        b, f, rows, columns, d = x.shape
        if f % k:
            raise UserError(f"{f} frames a pack: choose data.frames_per_pack as a multiple of {k}")
        rows, columns = rows // r, columns // c
        x = x[:, :, : rows * r, : columns * c].reshape(b, f // k, k, rows, r, columns, c, d)
        kernel = self.kernel[...].astype(x.dtype)
        cells = [x[:, :, i, :, j, :, m] * kernel[i, j, m] for i in range(k) for j in range(r) for m in range(c)]
        y = functools.reduce(operator.add, cells)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class Projector(nnx.Module):
    """Vision width -> language width: `linear`, or `mlp2x_gelu` (Linear, exact GELU, Linear).

    Raises UserError for another kind.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        if kind not in PROJECTORS:
            raise UserError(f"projector {kind!r} is unknown: set model.projector to one of {', '.join(PROJECTORS)}")
        options: dict[str, Any] = dict(bias=True, rngs=rngs, param_dtype=param_dtype)
        self.first = Linear((inputs,), (outputs,), ("vision_embed", "embed"), **options)
        self.second = Linear((outputs,), (outputs,), (None, "embed"), **options) if kind == "mlp2x_gelu" else None

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """From the vision encoder's width to the decoder's."""
        x = self.first(x)
        return x if self.second is None else self.second(jax.nn.gelu(x, approximate=False))
