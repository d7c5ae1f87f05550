"""What is said of accelerators, against figures copied once more from the makers' data sheets."""

import pytest

from kangaroo_jax.chips import CHIPS, find_chip, parse_topology
from kangaroo_jax.errors import UserError

# Dense TFLOPS in bfloat16 (float16 of T4 and V100), GB of memory, and its GB/s, of one device as JAX counts them.
# cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, TPU7x of two devices a chip); NVIDIA's data sheets, without sparsity.
PUBLISHED = {
    "v4": (275, 32, 1228),
    "v5e": (197, 16, 819),
    "v5p": (459, 95, 2765),
    "v6e": (918, 32, 1640),
    "tpu7x": (2307 / 2, 192 / 2, 7380 / 2),
    "T4": (65, 16, 320),
    "L4": (242 / 2, 24, 300),
    "L40S": (733 / 2, 48, 864),
    "V100": (125, 32, 900),
    "A100": (624 / 2, 80, 2039),
    "H100": (1979 / 2, 80, 3350),
    "H200": (1979 / 2, 141, 4800),
    "B200": (4500 / 2, 180, 8000),
}


def test_every_chip_is_in_the_second_list():
    assert set(CHIPS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_peak_and_memory_are_the_published_ones(name):
    tflops, gigabytes, bandwidth = PUBLISHED[name]
    assert CHIPS[name].hbm_gb == pytest.approx(bandwidth, rel=0.02)
    assert CHIPS[name].tflops == pytest.approx(tflops, rel=0.02)
    assert 0.85 * gigabytes < CHIPS[name].gib <= 1.01 * gigabytes  # GiB, less what the system keeps


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_chips_are_found_by_the_name_that_jax_gives(kind, name):
    assert getattr(find_chip(kind), "name", None) == name


def test_topologies_are_counted():
    assert [parse_topology(text).devices for text in ("v5e:4x8", "v5p:2x2x4", "H100:8", "tpu7x:2x2")] == [32, 16, 8, 8]
    assert parse_topology("V5E:4x8", slices=2).devices == 64 and str(parse_topology("v5e:4x8", 2)) == "2 x v5e:4x8"
    assert str(parse_topology("h100:8")) == "H100:8" and parse_topology("h100:8").chip.platform == "gpu"
    for text, slices in (("v9:2x2", 1), ("v5e:0x4", 1), ("v5e", 1), ("v5e:2x2x2x2", 1), ("v5e:4x8", 0)):
        with pytest.raises(UserError, match="topology|slices"):
            parse_topology(text, slices)
