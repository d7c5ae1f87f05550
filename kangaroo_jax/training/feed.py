"""From this host's share of the files to a batch over all devices.

The data are cut into `data.streams` streams, each with its own order, open packs and position. Stream s fills
rows s * B / streams and following of every batch, whichever host reads it: the global batch does not depend
on how many hosts there are, and a checkpoint of four hosts goes on with two. A host reads the streams whose
rows its devices hold.
"""

import base64
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kangaroo_jax.conventions import FIELDS, PackedBatch, UserError
from kangaroo_jax.data.loader import Loader, LoaderStats
from kangaroo_jax.sharding import sharding


class Feed:
    """Batches of this host's streams, in step with those of all other hosts."""

    def __init__(self, make_loader: Callable[[int, int], Loader], *, packs: int, streams: int, mesh: Mesh) -> None:
        """Opens the streams whose rows are on this host's devices.

        Args:
            make_loader: (stream, number of streams) -> its loader.
            packs: B of the whole batch.
            streams: into how many the data are cut.
            mesh: over which the batch is laid.

        Raises UserError where the streams do not divide the packs.
        """
        if packs % streams:
            raise UserError(f"config.data.packs_per_batch {packs} must be a multiple of data.streams {streams}")
        self._rows, self._mesh, self._packs, self._streams = packs // streams, mesh, packs, streams
        place = sharding(mesh, ("batch",), (packs,))
        needed: set[int] = set()
        for index in place.addressable_devices_indices_map((packs,)).values():
            needed.update(range(*(index or (slice(None),))[0].indices(packs)))
        self.streams = sorted({row // self._rows for row in needed})
        self._loaders = {stream: make_loader(stream, streams) for stream in self.streams}

    def __next__(self) -> tuple[PackedBatch, LoaderStats]:
        """The rows of this host's streams, in order, and what is in them."""
        parts = [next(loader) for loader in self._loaders.values()]
        if len(parts) == 1:
            return parts[0]
        batch = PackedBatch(**{name: np.concatenate([getattr(b, name) for b, _ in parts]) for name in FIELDS})
        return batch, functools.reduce(_add, (stats for _, stats in parts))

    def put(self, batch: PackedBatch) -> PackedBatch:
        """This host's rows as global arrays, packs over the mesh's batch axes."""
        if jax.process_count() == 1:
            return jax.tree.map(self._put_all, batch)
        start = {stream: i * self._rows for i, stream in enumerate(self.streams)}

        def put(x: np.ndarray) -> jax.Array:
            shape = (self._packs, *x.shape[1:])

            def rows(index: tuple[slice, ...] | None) -> np.ndarray:
                wanted = range(*(index or (slice(None),))[0].indices(self._packs))
                return x[[start[row // self._rows] + row % self._rows for row in wanted]]

            place = sharding(self._mesh, ("batch",) + (None,) * (x.ndim - 1), shape)
            pieces = place.addressable_devices_indices_map(shape).items()
            on_devices = [jax.device_put(rows(index), device) for device, index in pieces]
            return jax.make_array_from_single_device_arrays(shape, place, on_devices)

        return jax.tree.map(put, batch)

    def _put_all(self, x: np.ndarray) -> jax.Array:
        place = sharding(self._mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape)
        return jax.make_array_from_process_local_data(place, x)

    def get_state(self) -> bytes:
        """The position of every stream of every host, after the last batch handed out. All hosts must call it."""
        mine = {stream: loader.get_state() for stream, loader in self._loaders.items()}
        if self._streams == 1:
            return mine[0]
        everyone = {}
        for part in _from_all_hosts(json.dumps({s: base64.b64encode(v).decode() for s, v in mine.items()}).encode()):
            everyone.update(json.loads(part))
        return json.dumps({"streams": [everyone[str(stream)] for stream in range(self._streams)]}).encode()

    def set_state(self, state: bytes) -> None:
        """Go on where `get_state` was, on whatever number of hosts. Raises UserError for another number of streams."""
        positions = json.loads(state).get("streams")
        saved = 1 if positions is None else len(positions)
        if saved != self._streams:
            raise UserError(f"saved data position: data.streams was {saved} and is now {self._streams}; set it back")
        for stream, loader in self._loaders.items():
            loader.set_state(state if positions is None else base64.b64decode(positions[stream]))

    def close(self) -> None:
        """Stop threads and processes."""
        with contextlib.ExitStack() as stack:
            for loader in self._loaders.values():
                stack.callback(loader.close)


def _add(a: LoaderStats, b: LoaderStats) -> LoaderStats:
    """What is in two parts of a batch: counts are summed, the ids of the samples follow one another."""
    names = [field.name for field in dataclasses.fields(a)]
    return LoaderStats(**{name: _sum(getattr(a, name), getattr(b, name)) for name in names})


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, Mapping):
        return {key: a.get(key, 0) + b.get(key, 0) for key in (*a, *b)}
    return a + b


def threads_a_stream(streams_here: int) -> int:
    """Threads for each of the streams of a host, so that all together use its cores."""
    return max(1, min(8, (os.cpu_count() or 1) // max(1, streams_here)))


def _from_all_hosts(value: bytes) -> list[bytes]:
    """What every host gave, in the order of hosts."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.asarray([len(value)], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(value)] = np.frombuffer(value, np.uint8)
    gathered = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]) for row, size in zip(gathered, sizes, strict=True)]
