"""What hosts must decode, and meshes that give a row to as few hosts as can be."""

import dataclasses
import inspect
import itertools

import pytest

from kangaroo_jax.chips import parse_topology
from kangaroo_jax.cli.plan import plan
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.stream import batches_ahead
from kangaroo_jax.planning.feeding import FRAMES_A_CPU, feeding
from kangaroo_jax.sharding import arranged, hosts_of_rows
from kangaroo_jax.training.placement import resolve

from .test_plan import needs_libtpu


@dataclasses.dataclass(frozen=True)
class Place:
    """A TPU on a slice, whose hosts have 2 x 2."""

    coords: tuple[int, int, int]
    process_index: int
    slice_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"


def places(topology: str, slices: int = 1) -> list[Place]:
    x, y, z = (*map(int, topology.partition(":")[2].split("x")), 1)[:3]
    kind = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5"}[topology.partition(":")[0]]
    return [
        Place((i, j, k), ((one * z + k) * (y // 2) + j // 2) * (x // 2) + i // 2, one, kind)
        for one, k, j, i in itertools.product(range(slices), range(z), range(y), range(x))
    ]


@pytest.mark.parametrize(
    ("topology", "slices", "shape", "hosts"),
    [
        ("v5e:4x8", 1, (1, 16, 1, 2), 1),
        ("v5e:4x8", 1, (1, 8, 1, 4), 1),  # 2 in JAX's own order, whose group of 4 is a line
        ("v5e:4x8", 1, (1, 8, 2, 2), 1),
        ("v6e:4x8", 1, (1, 4, 1, 8), 2),  # 4 in JAX's own order
        ("v5e:4x8", 2, (2, 8, 1, 4), 1),
        ("v5p:4x4x4", 1, (1, 16, 1, 4), 1),
        ("v5p:4x4x4", 1, (1, 1, 16, 4), 16),
    ],
)
def test_a_row_is_on_as_few_hosts_as_can_be(topology, slices, shape, hosts):
    devices = places(topology, slices)
    grid = arranged(shape, devices)
    assert sorted(grid.flat, key=devices.index) == devices and grid.shape == shape
    assert {len(found) for found in hosts_of_rows(grid)} == {hosts}
    if hosts == 1 and shape[3] == 4:  # neighbours in the ring of a host are a link apart
        for group in grid.reshape(-1, 4):
            for a, b in itertools.pairwise((*group, group[0])):
                assert sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)) == 1


def test_a_cpus_frames_are_those_of_the_command():
    assert inspect.signature(plan).parameters["frames_a_cpu"].default == FRAMES_A_CPU


@needs_libtpu
def test_hosts_are_where_the_compiler_has_them():
    from kangaroo_jax.planning.compile import topology_devices

    real = topology_devices(parse_topology("v5e:4x8"))
    by_coords = {tuple(device.coords): device.process_index for device in real}
    assert by_coords == {place.coords: place.process_index for place in places("v5e:4x8")}


def needs(spec: str, topology: str, seconds: float, samples: float = 8.0, frames_a_cpu=FRAMES_A_CPU, **changes):
    target = parse_topology(topology)
    config = resolve(StageConfig.load(spec).changed(changes), target.chip, target.devices)
    return feeding(config, target, places(topology) if "v" in topology else [], seconds, samples, frames_a_cpu)


def test_what_a_host_must_decode():
    found = needs("stage5_long_video:kangaroo_8b", "v5p:4x4x4", 9.2)
    assert (found.hosts, found.hosts_of_a_row, found.cpus, found.advice) == (16, 1, 208, "")
    assert found.frames_a_second == pytest.approx(4 * 204 / 9.2, abs=0.1)
    assert found.cpus_needed == pytest.approx(4 * 204 / 9.2 / FRAMES_A_CPU, abs=0.1)
    assert found.frames_a_second_a_chip == pytest.approx(found.frames_a_second / 4, abs=0.01)
    assert found.gb_a_second_to_a_device == pytest.approx(204 * 448**2 * 3 / 9.2e9, abs=1e-4)
    assert needs("stage5_long_video:kangaroo_8b", "v5p:4x4x4", 9.2, **{"data.frames_per_pack": 0}) is None
    slower = needs(
        "stage5_long_video:kangaroo_8b", "v5p:4x4x4", 9.2, frames_a_cpu=5.0
    )  # as measured on one's own videos
    assert slower.cpus_needed == pytest.approx(4 * 204 / 9.2 / 5, abs=0.1) and "CPUs at 5 frames a second" in str(
        slower
    )
    gpus = needs("stage5_long_video:kangaroo_8b", "H100:128", 2.0)  # a process each, two of which share a row
    assert (gpus.hosts, gpus.hosts_of_a_row, gpus.cpus) == (128, 2, 12)
    assert gpus.frames_a_second == pytest.approx(204 / 2 / 2.0)


def test_where_the_chips_would_wait_it_says_what_to_do():
    hour = "hour_video:kangaroo_8b"
    found = needs(hour, "v5p:4x4x4", 48.0, 3.0)
    assert found.hosts_of_a_row == 16 and "each row by 16 together" in str(found)
    assert found.frames_a_second == pytest.approx(4 * 3712 / 16 / 48, abs=0.1)
    assert found.threads_busy == 28 and not found.advice  # a part of one video a row, of seven batches
    # 3,600 do not divide by a row's 64 devices: the context axis alone cuts them, and a host has two of 16 pieces.
    cut = needs(hour, "v5p:4x4x4", 48.0, **{"data.frames_per_pack": 3600})
    assert cut.frames_a_second == pytest.approx(4 * 3600 / 8 / 48, abs=0.1)
    uncut = needs(hour, "v5p:4x4x4", 48.0, **{"data.frames_per_pack": 3601})  # by no axis: each host has all of them
    assert uncut.frames_a_second == pytest.approx(4 * 3601 / 48, abs=0.1)
    slow = needs(hour, "v5p:4x4x4", 2.0, 1.0)
    assert "no more than 28 videos" in slow.advice and "THE CHIPS WOULD WAIT" in str(slow)
    assert "hosts with more CPUs" in needs("stage1_image_pretrain:kangaroo_8b", "v5p:4x4x4", 0.01).advice


def test_hosts_of_many_cpus_and_few_rows_decode_more_batches_at_a_time():
    row = 204 * 448**2 * 3
    assert batches_ahead(2, 1, row) == batches_ahead(8, 4, row) == 2  # as many as on a small machine
    assert batches_ahead(180, 1, row) == 8 and batches_ahead(12, 4, row) == 3
    assert batches_ahead(208, 4, 3600 * 448**2 * 3) == 2  # an hour's rows are 2 GB each
    fast = needs("stage5_long_video:kangaroo_8b", "v6e:16x16", 1.15, 2.62)
    assert fast.cpus_needed == pytest.approx(11.8, abs=0.1) and fast.threads_busy == 20 and not fast.advice
