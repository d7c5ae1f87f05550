"""Linear maps of a layer whose tokens and weights are cut over devices: each device multiplies what it holds.

Between a layer's parts tokens are cut over the tensor axis as well. A part gathers them for its first products, whose
outputs are cut instead, and sums the results of its last one over devices, of which each keeps its tokens: a
reduce-scatter (Korthikanti et al. 2022). The gradient does the same the other way round. Left to itself the compiler
summed whole rows on every device and threw most of them away. The gradient of a weight is taken from a device's own
tokens and summed into its piece of the weight; left to itself the compiler joined all tokens of an hour for it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from kangaroo_jax.conventions import Array
from kangaroo_jax.models.layers import Linear, product
from kangaroo_jax.sharding import STORAGE, constrain, divides, gather, per_device, shards, sum_scatter

RESIDUAL = ("batch", "residual_tokens", "activation")  # between a layer's parts
INPUT = ("batch", "tokens", "activation")  # of a part's matrix products


def spread(x: Float[Array, "B T D"], maps: Sequence[Linear]) -> list[Float[Array, "B T *outputs"]]:
    """What each of `maps` makes of x, which is cut as RESIDUAL; results are cut by tokens and by their own axes."""
    if not _cut(x, RESIDUAL, maps):
        x = constrain(x, INPUT)
        return [one(x) for one in maps]

    def local(x: Array, kernels: list[Array]) -> list[Array]:
        x = gather(x, "token_parts", 1)
        return [product(x, _whole(kernel, one), one.contracted) for kernel, one in zip(kernels, maps, strict=True)]

    outputs = [(*INPUT[:2], *one.axes[one.contracted :]) for one in maps]
    run = per_device(local, (RESIDUAL, [one.axes for one in maps]), outputs)
    results: list[Array] = run(x, [one.weight(x.dtype) for one in maps])
    return results


def summed(x: Float[Array, "B T *inputs"], map: Linear) -> Float[Array, "B T D"]:
    """What `map` makes of x, which is cut by tokens and by the map's inputs; the result is cut as RESIDUAL."""
    axes = (*INPUT[:2], *map.axes[: map.contracted])
    x = constrain(x, axes)
    if not _cut(x, axes, [map]):
        return map(x)

    def local(x: Array, kernel: Array) -> Array:
        return sum_scatter(product(x, _whole(kernel, map), map.contracted), "token_parts", 1)

    y: jax.Array = per_device(local, (axes, map.axes), RESIDUAL)(x, map.weight(x.dtype))
    return y


def _cut(x: Array, axes: Sequence[str | None], maps: Sequence[Linear]) -> bool:
    """Whether tokens are cut here, x and all kernels divide, and their kernels are all that the maps have.

    Where a few tokens are generated it is x that moves, and the pieces of a kernel stay where they are.
    """
    if shards("residual_tokens") == 1 or x.shape[1] % shards("residual_tokens") or not divides(x.shape, axes):
        return False
    kernels = [one.kernel[...] for one in maps]
    if shards("embed") > 1 and any(kernel.size > x.size for kernel in kernels):
        return False
    return all(one.bare and divides(kernel.shape, one.axes) for one, kernel in zip(maps, kernels, strict=True))


def _whole(kernel: Array, map: Linear) -> Array:
    """A kernel whose STORAGE axes are cut, with these whole. In `per_device`."""
    for dimension, axis in enumerate(map.axes):
        if axis in STORAGE:
            kernel = gather(kernel, axis, dimension)
    whole: Any = checkpoint_name(kernel, "weight")
    return jnp.asarray(whole)
