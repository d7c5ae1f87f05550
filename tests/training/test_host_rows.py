"""Rows of a host's batch on a mesh: every device has its own, and all together are the batch."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training import host_rows
from kangaroo_jax.training.host_rows import HostRows, whole_data_state

ROWS, TOKENS, FRAMES = 8, 6, 4


def batch() -> PackedBatch:
    random = np.random.default_rng(0)
    return PackedBatch(
        **{
            name: random.integers(0, 200, (ROWS, FRAMES if name.startswith("frame") else TOKENS)).astype(np.int32)
            for name in FIELDS
            if name != "frames"
        },
        frames=random.integers(0, 256, (ROWS, FRAMES, 2, 2, 3)).astype(np.uint8),
    )


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (8, 1, 1, 1), (1, 1, 4, 2), (2, 2, 1, 2)], ids=str)
def test_the_batch_on_a_mesh_is_the_batch(shape):
    rows = HostRows(make_mesh(shape, jax.devices()[:8]), ROWS)
    assert rows.numbers == list(range(ROWS))
    given = batch()
    placed = rows.put(given)
    groups = shape[0] * shape[1]
    for name in FIELDS:
        x, on_mesh = getattr(given, name), getattr(placed, name)
        np.testing.assert_array_equal(on_mesh, x)
        piece = on_mesh.sharding.shard_shape(x.shape)
        assert piece[0] == ROWS // groups, name
        if name != "frames":
            assert piece[1:] == x.shape[1:], name  # of tokens each device has whole rows
        for shard in on_mesh.addressable_shards:
            np.testing.assert_array_equal(shard.data, x[shard.index])
    frames = placed.frames.sharding.shard_shape(given.frames.shape)[1]
    assert (
        frames == {(1, 2, 2, 2): 1, (8, 1, 1, 1): 4, (1, 1, 4, 2): 1, (2, 2, 1, 2): 2}[shape]
    )  # as far as they divide


def test_a_host_reads_the_rows_of_its_devices_and_lays_them_where_they_belong(monkeypatch):
    """A host with two of four devices, of which each has a row group of its own."""
    mesh = make_mesh((1, 4, 1, 1), jax.devices()[:4])
    mine = jax.devices()[1:4:2]

    class Sharding:
        """A batch cut over four devices, two of them here."""

        def addressable_devices_indices_map(self, shape):
            places = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp")).addressable_devices_indices_map(shape)
            return {device: places[device] for device in mine}

    monkeypatch.setattr(host_rows, "sharding", lambda *_: Sharding())
    seen: dict = {}
    monkeypatch.setattr(
        host_rows.jax, "make_array_from_single_device_arrays", lambda shape, place, x: seen.update(shape=shape, x=x)
    )
    rows = HostRows(mesh, ROWS)
    assert rows.numbers == [2, 3, 6, 7]
    x = np.arange(ROWS * 3).reshape(ROWS, 3)
    rows._put(x[rows.numbers], ("batch", None))
    assert seen["shape"] == (ROWS, 3)
    for piece, device, wanted in zip(seen["x"], mine, ([2, 3], [6, 7]), strict=True):
        assert piece.devices() == {device}
        np.testing.assert_array_equal(piece, x[wanted])


def test_the_data_state_of_one_process_is_its_own_and_of_many_that_of_all(monkeypatch):
    states = [b'{"a": 1}', b'{"b": 22222}']
    loader = types.SimpleNamespace(get_state=lambda: states[0])
    assert whole_data_state(loader) == states[0]

    def allgather(x):  # what process 0 sees of two
        if x.ndim == 0:
            assert int(x) == len(states[0])
            return np.asarray([len(state) for state in states])
        assert bytes(x) == states[0].ljust(len(states[1]))
        return np.stack([np.frombuffer(state.ljust(len(states[1])), np.uint8) for state in states])

    monkeypatch.setattr(host_rows.jax, "process_count", lambda: 2)
    monkeypatch.setattr(host_rows.multihost_utils, "process_allgather", allgather)
    monkeypatch.setattr(host_rows, "merge_states", lambda found: b"|".join(found))
    assert whole_data_state(loader) == b'{"a": 1}    |{"b": 22222}'
