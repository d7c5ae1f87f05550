"""How much of a checkpoint is on its way to the disk at a time."""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp

WRITING_SHARE = 0.1  # of an item of a checkpoint; what is being written is in memory twice


def array_handler(arrays: Any) -> ocp.StandardCheckpointHandler:
    """A handler that writes a tenth of this process's part of `arrays` at a time.

    Without a limit Orbax has all of it in memory twice. It refuses a shard that is not smaller than the limit,
    so that this is never below three of the largest.
    """
    shards = [nbytes for x in jax.tree.leaves(arrays) for nbytes in _piece_sizes(x)]
    limit = max([2**20, 3 * max(shards, default=0), round(WRITING_SHARE * sum(shards))])
    return ocp.StandardCheckpointHandler(save_concurrent_gb=limit / 10**9)


def _piece_sizes(x: Any) -> list[int]:
    """The bytes of each different piece of an array, or of an abstract one, on this process's devices."""
    pieces = {str(index) for index in x.sharding.addressable_devices_indices_map(x.shape).values()}
    return [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize] * len(pieces)
