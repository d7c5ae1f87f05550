"""Turns the rows that each host reads into a batch over all devices, and joins the hosts' data positions."""

import collections
import threading
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.data.batches.loader import Loader, merge_states
from kangaroo_jax.data.batches.sharing import SharedRow, Sharing
from kangaroo_jax.sharding import Axes, batch_axes, sharding
from kangaroo_jax.training.distributed import key_value_delete, key_value_get, key_value_set


class HostRows:
    """The rows of the batch that are on this host's devices.

    Devices of several hosts may hold the same row, if the tokens or the weights' columns are cut over hosts. Then each
    of these hosts reads the row, and decodes the frames of it that its own devices hold.
    """

    def __init__(self, mesh: Mesh, packs: int) -> None:
        """`packs` is B of the whole batch, which is sharded over `mesh`."""
        self._mesh, self._packs = mesh, packs
        pieces = sharding(mesh, ("batch",), (packs,)).addressable_devices_indices_map((packs,)).values()
        self.numbers = sorted({row for piece in pieces for row in self._range(piece)})

    def sharing(self, frames: int) -> Sharing:
        """Which of these rows other hosts have as well, and which of a row's `frames` the devices here hold."""
        hosts: dict[int, set[int]] = collections.defaultdict(set)
        here: dict[int, set[int]] = collections.defaultdict(set)
        shape = (self._packs, frames)
        places: Mapping[Any, Any] = sharding(self._mesh, FIELDS["frames"].axes[:2], shape).devices_indices_map(shape)
        for device, (rows, columns) in places.items():
            host = int(device.process_index)
            for row in self._range((rows,)):
                hosts[row].add(host)
                if host == jax.process_index():
                    here[row].update(range(*columns.indices(frames)))
        shared = {row: SharedRow(frozenset(hosts[row]), frozenset(here[row])) for row in here if len(hosts[row]) > 1}
        others = frozenset().union(*(row.hosts for row in shared.values()))
        return Sharing(shared, HostMessages(others) if shared else None)

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


class HostMessages:
    """What hosts that have the same rows tell each other, through the coordinator's store.

    It can be used in any thread beside the training step, which a collective of the devices could not.
    """

    _made = 0  # hosts make theirs in the same order

    def __init__(self, hosts: frozenset[int]) -> None:
        """`hosts` are all that this one has messages with."""
        HostMessages._made += 1
        self._folder, self._begun, self._hosts = f"messages/{HostMessages._made}", 0, hosts
        self._kept: list[str] = []  # keys of this host's messages that another may not have read yet
        self._stopped = threading.Event()

    def exchange(self, name: str, text: str, hosts: Collection[int]) -> dict[int, str]:
        """See `Messages`; raises RuntimeError once it is stopped."""
        folder, me, found = f"{self._folder}/{self._begun}/{name}", jax.process_index(), {}
        before, self._kept = self._kept, [*self._kept, f"{folder}/{me}"]
        key_value_set(f"{folder}/{me}", text)
        for host in sorted(hosts):
            said = text if host == me else key_value_get(f"{folder}/{host}", self._stopped.is_set)
            if said is None:
                raise RuntimeError("stopped while waiting for other hosts")
            found[host] = said
        if self._hosts <= set(hosts):  # each of them has read what came before, as it says this
            for key in before:
                key_value_delete(key)
            self._kept = self._kept[len(before) :]
        return found

    def begin_anew(self) -> None:
        """See `Messages`."""
        self._begun += 1
        self._stopped.clear()

    def stop(self) -> None:
        """See `Messages`."""
        self._stopped.set()


def whole_data_state(loader: Loader) -> bytes:
    """The loader's state with the rows of all hosts. All hosts must call this after the same batch."""
    mine = loader.get_state()
    if jax.process_count() == 1:
        return mine
    sizes = multihost_utils.process_allgather(np.array(len(mine)))
    padded = np.frombuffer(mine.ljust(int(sizes.max())), np.uint8)  # padded with spaces, which JSON allows at the end
    return merge_states([bytes(state) for state in multihost_utils.process_allgather(padded)])
