"""Rows of a host's batch on a mesh: every device has its own, and all together are the batch."""

import collections
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.training import host_rows
from kangaroo_jax.training.host_rows import HostMessages, HostRows, whole_data_state

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


def test_a_host_decodes_the_frames_of_its_devices(monkeypatch):
    """Two groups of rows, each cut over four devices, two of which are a host's."""
    mesh = make_mesh((1, 2, 4, 1), jax.devices()[:8])
    rows, submitted = HostRows(mesh, ROWS), []
    decoder = types.SimpleNamespace(submit=lambda ref, side: submitted.append(ref.moments))
    asked = [MediaRef("video", "a.mp4", (0.0, 1.0, 2.0, 3.0)), MediaRef("image", "b.png", (0.0, 0.0))]
    rows.sharing(8).ask(0, 2, asked, decoder, 16)
    assert submitted == [None, None], "a process alone decodes everything"

    Place = collections.namedtuple("Place", "process_index, id")

    class Sharding:
        """The batch over devices of four hosts."""

        def devices_indices_map(self, shape):
            places = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp", "context")).devices_indices_map(shape)
            return {Place(device.id // 2, device.id): index for device, index in places.items()}

    monkeypatch.setattr(host_rows, "sharding", lambda *_: Sharding())
    monkeypatch.setattr(host_rows.jax, "process_index", lambda: 1)
    found = rows.sharing(8)
    assert [found.frames_here(row, 8) for row in (0, 3)] == [4, 4]
    submitted.clear()
    found.ask(0, 2, asked, decoder, 16)  # frames 2 to 5 and 6 to 7 of the row, of which it has 4 to 7
    assert submitted == [(2, 3), (0, 1)]
    submitted.clear()
    found.ask(3, 0, asked[:1], decoder, 16)
    assert submitted == []


def test_hosts_tell_each_other_in_turn_and_forget_what_all_have_read(monkeypatch):
    store, news, here = {}, threading.Condition(), threading.local()

    def say(key, value):
        with news:
            store[key] = value
            news.notify_all()

    def get(key, stopped):
        with news:
            assert news.wait_for(lambda: key in store or stopped(), 30)
        return store.get(key)

    monkeypatch.setattr(host_rows, "key_value_set", say)
    monkeypatch.setattr(host_rows, "key_value_get", get)
    monkeypatch.setattr(host_rows, "key_value_delete", store.pop)
    monkeypatch.setattr(host_rows.jax, "process_index", lambda: here.host)
    monkeypatch.setattr(HostMessages, "_made", 0)

    def host(number):
        here.host = number
        with made:
            monkeypatch.setattr(HostMessages, "_made", 0)  # each is the first of its process
            messages = HostMessages(frozenset((0, 1)))
        messages.begin_anew()
        heard = [messages.exchange(str(i), f"{number}.{i}", {1, 0}) for i in range(20)]
        messages.stop()
        with pytest.raises(RuntimeError, match="stopped"):
            messages.exchange("more", "", {number, 7})
        return heard

    made = threading.Lock()
    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(host, (0, 1)))
    assert heard[0] == heard[1] == [{0: f"0.{i}", 1: f"1.{i}"} for i in range(20)]
    left = {key for key in store if "more" not in key}
    assert left <= {f"messages/1/1/{i}/{number}" for i in (18, 19) for number in (0, 1)}
