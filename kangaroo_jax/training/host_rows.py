"""Turns the rows that each host reads into a batch over all devices, and joins the hosts' data positions."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.loader import Loader, merge_states
from kangaroo_jax.sharding import Axes, batch_axes, sharding


class HostRows:
    """The rows of the batch that are on this host's devices.

    Devices of several hosts may hold the same row, if the tokens or the weights' columns are cut over hosts. Then each
    of these hosts reads the row.
    """

    def __init__(self, mesh: Mesh, packs: int) -> None:
        """`packs` is B of the whole batch, which is sharded over `mesh`."""
        self._mesh, self._packs = mesh, packs
        pieces = sharding(mesh, ("batch",), (packs,)).addressable_devices_indices_map((packs,)).values()
        self.numbers = sorted({row for piece in pieces for row in self._range(piece)})

    def _range(self, index: tuple[slice, ...] | None) -> range:
        return range(*(index or (slice(None),))[0].indices(self._packs))

    def put(self, batch: PackedBatch) -> PackedBatch:
        """Numpy arrays of `numbers` rows as global arrays of B rows, sharded over the mesh by `batch_axes`."""
        placed: PackedBatch = jax.tree.map(self._put, batch, batch_axes())
        return placed

    def _put(self, x: np.ndarray, axes: Axes) -> jax.Array:
        shape = (self._packs, *x.shape[1:])
        where = sharding(self._mesh, axes, shape)
        pieces = []
        indices = where.addressable_devices_indices_map(shape)
        for index in indices.values():
            rows = self._range(index)  # adjacent rows of the batch are adjacent here: `numbers` is sorted
            first = self.numbers.index(rows.start)
            pieces.append(x[(slice(first, first + len(rows)), *(index or ())[1:])])
        # an explicit transfer, which the loop's guard against implicit ones allows
        return jax.make_array_from_single_device_arrays(shape, where, jax.device_put(pieces, list(indices)))


def whole_data_state(loader: Loader) -> bytes:
    """The loader's state with the rows of all hosts. All hosts must call this after the same batch."""
    mine = loader.get_state()
    if jax.process_count() == 1:
        return mine
    sizes = multihost_utils.process_allgather(np.array(len(mine)))
    padded = np.frombuffer(mine.ljust(int(sizes.max())), np.uint8)  # padded with spaces, which JSON allows at the end
    return merge_states([bytes(state) for state in multihost_utils.process_allgather(padded)])
