"""Attention by tokamax's kernel for Hopper and Blackwell, in Pallas for Mosaic: whole causal rows in half precision.

A query sees from the begin of its segment, which is a run of tokens, to itself; blocks before that are skipped in the
forward pass and masked in the backward one. The module's path is tokamax's own affair, so that setup.py names its
release.
"""

import functools
from importlib import util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from kangaroo_jax.conventions import Array
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.attention_triton import Ranges, ranges_of
from kangaroo_jax.system.installing import install_line

LENGTHS = 128  # a row is a multiple of so many tokens
CAPABILITIES = (9.0, 10.0)  # of the GPUs that it is written for


@functools.cache
def installed() -> bool:
    """Whether tokamax is here."""
    return util.find_spec("tokamax") is not None


def fits(query: Float[Array, "B T N H"], causal: bool, positions: Any) -> bool:
    """Whether rows are of a kind that it computes; others are left to `attention_triton`."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return causal and positions is None and half and query.shape[1] % LENGTHS == 0


def mask_of(ranges: Ranges) -> Any:
    """What tokamax calls a mask: the first key of each query, int32[B, 1, T], and the order of tokens."""
    from tokamax._src.ops.attention.base import Mask

    return Mask(k_start=ranges.begin[:, None, :], is_causal=True)


def tokamax(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None,
) -> Float[Array, "B T N H"]:
    """Causal attention as in `attention.attention`; `segments` are twice the same, each of them a run.

    Raises UserError where tokamax is not installed.
    """
    if not installed():
        raise UserError(
            f"attention 'tokamax' is not installed: {install_line('tokamax')}, or set model.attention to auto"
        )
    from absl import flags
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    if not flags.FLAGS.is_parsed():  # tokamax would parse our command line for its own flags, and refuse it
        flags.FLAGS.mark_as_parsed()
    batch, length = query.shape[:2]
    (ranges,) = ranges_of(segments and segments[0], (batch, length), length, True)
    with jax.named_scope("tokamax_causal"):
        context: jax.Array = PallasMosaicGpuFlashAttention()(query, key, value, mask=mask_of(ranges))
    return context
