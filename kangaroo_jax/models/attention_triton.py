"""Attention by the FlashAttention kernel that JAX writes in Pallas for Triton: GPUs, segments honoured."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels
from jaxtyping import Float, Int

from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError

BLOCK = 128  # lengths are padded to a multiple of this
PADDING = -1  # segment of the padding


def triton(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    causal: bool,
    positions: Int[Array, " T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention as in `attention.attention`, for S = T.

    `segments` are twice the same. `interpret` runs the kernel on any device, slowly, for tests.

    Raises UserError where the device has only some of the queries.
    """
    if positions is not None or query.shape[1] != key.shape[1]:
        raise UserError("attention 'triton' cannot cut tokens over devices: set the mesh's context axis to 1")
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    ids = jnp.zeros(query.shape[:2], jnp.int32) if segments is None else segments[0]
    ids = jnp.pad(ids, [(0, 0), (0, -length % BLOCK)], constant_values=PADDING)
    query, key, value = (jnp.pad(x, [(0, 0), (0, -length % BLOCK), (0, 0), (0, 0)]) for x in (query, key, value))
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5
    y: jax.Array = kernels.mha(query, key, value, segment_ids=ids, sm_scale=scale, causal=causal, interpret=interpret)
    return y[:, :length]
