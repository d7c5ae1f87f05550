"""Limits how much of a checkpoint is written to disk at a time."""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp

WRITING_SHARE = 0.1  # share of a checkpoint's item that is written at a time, and so is in memory twice


def array_handler(arrays: Any) -> ocp.StandardCheckpointHandler:
    """A handler that writes a tenth of this process's part of `arrays` at a time.

    Without a limit Orbax has all of it in memory twice. It refuses shards that are not smaller than the limit, so the
    limit is at least three times the largest shard.
    """
    shards = [nbytes for x in jax.tree.leaves(arrays) for nbytes in _piece_sizes(x)]
    limit = max([2**20, 3 * max(shards, default=0), round(WRITING_SHARE * sum(shards))])
    return ocp.StandardCheckpointHandler(save_concurrent_gb=limit / 10**9)


def _piece_sizes(x: Any) -> list[int]:
    """The bytes of each distinct shard of a (perhaps abstract) array on this process's devices."""
    pieces = {str(index) for index in x.sharding.addressable_devices_indices_map(x.shape).values()}
    return [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize] * len(pieces)
