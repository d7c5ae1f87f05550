"""What a config leaves open is decided from the chip: mesh, accumulation, remat; what does not fit is refused."""

import pytest

from kangaroo_jax.chips import CHIPS
from kangaroo_jax.config import STAGES, StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.training.placement import resolve


def config_of(packs=32, tokens=8192, **train):
    data = {"data.packs_per_batch": packs, "data.tokens_per_pack": tokens}
    return StageConfig().changed({**data, **{f"train.{key}": value for key, value in train.items()}})


def decided(chip, devices, slices=1, **changes):
    found = resolve(config_of(**changes), CHIPS.get(chip), devices, slices)
    return tuple(found.train.mesh), found.train.accumulate, found.model.llm.remat, found.model.vision.remat


@pytest.mark.parametrize(
    ("chip", "devices", "slices", "changes", "expected"),
    [
        ("v5e", 32, 1, {}, ((1, 32, 1, 1), 1, "full", "full")),
        ("v6e", 8, 1, {}, ((1, 2, 1, 4), 16, "full", "full")),  # a small slice holds more of the state on each
        ("v5p", 16, 1, {}, ((1, 16, 1, 1), 2, "mlp", "minimal")),
        ("v5e", 64, 2, {"tokens": 1 << 14}, ((2, 16, 1, 2), 1, "full", "full")),  # the data axis runs over the slices
        ("v5e", 2, 1, {}, ((1, 1, 1, 2), 32, "full", "full")),  # a slice smaller than the group takes what it has
        ("v5e", 32, 1, {"tokens": 1 << 15}, ((1, 16, 1, 2), 2, "full", "full")),
        (
            "v5e",
            32,
            1,
            {"tokens": (1 << 15) + 128},
            ((1, 32, 1, 1), 1, "full", "full"),
        ),  # beyond the table: the default
        ("v6e", 32, 1, {"tokens": 1 << 15}, ((1, 32, 1, 1), 1, "context", "full")),
        ("H100", 64, 1, {"packs": 64}, ((1, 64, 1, 1), 1, "mlp", "minimal")),
        ("H200", 64, 1, {"packs": 64, "tokens": 26_624}, ((1, 64, 1, 1), 1, "mlp", "full")),
        ("v6e", 32, 1, {}, ((1, 32, 1, 1), 1, "minimal", "context")),
        ("v6e", 32, 1, {"tokens": 1 << 14}, ((1, 32, 1, 1), 1, "context", "context")),
        ("v5p", 64, 1, {"packs": 1, "tokens": 1 << 19}, ((1, 1, 16, 4), 1, "mlp", "full")),
        ("v5p", 256, 1, {"packs": 1, "tokens": 1 << 21}, ((1, 1, 64, 4), 1, "mlp", "full")),
        ("v5p", 256, 1, {"packs": 4, "tokens": (1 << 19) + 4096}, ((1, 1, 64, 4), 4, "mlp", "full")),
        ("v5p", 16, 1, {"packs": 16, "tokens": (1 << 21) + 4096}, ((1, 16, 1, 1), 1, "full", "full")),
        ("v5p", 16, 1, {"packs": 4, "tokens": 1 << 19}, ((1, 1, 4, 4), 4, "mlp", "full")),
        ("v5p", 16, 1, {"packs": 4}, ((1, 4, 4, 1), 1, "mlp", "minimal")),  # too few packs: longer rows of devices
        ("v5p", 16, 1, {"packs": 2}, ((1, 2, 8, 1), 1, "mlp", "minimal")),
        ("H100", 16, 1, {"packs": 4}, ((1, 4, 1, 4), 1, "full", "full")),  # on GPUs the tensor axis
        (None, 8, 1, {"packs": 8}, ((1, 8, 1, 1), 1, "full", "full")),
        (None, 1, 1, {"packs": 6}, ((1, 1, 1, 1), 6, "full", "full")),
        ("v5p", 16, 1, {"mesh": (1, 4, 1, -1)}, ((1, 4, 1, 4), 8, "mlp", "minimal")),
        ("v5p", 16, 1, {"mesh": (1, 4, 1, 4), "accumulate": 2}, ((1, 4, 1, 4), 2, "mlp", "minimal")),
    ],
)
def test_what_is_left_open_is_decided(chip, devices, slices, changes, expected):
    assert decided(chip, devices, slices, **changes) == expected


def test_each_stage_has_the_least_remat_and_tensor_axis_that_memory_allows():
    placed = {}
    for stage in STAGES:
        for chip, devices in (("v5e", 32), ("v6e", 32), ("v5p", 16), ("A100", 64)):
            found = resolve(StageConfig.load(f"{stage}:kangaroo_8b"), CHIPS[chip], devices)
            placed[stage[:6], chip] = (found.train.mesh[3], found.model.llm.remat, found.model.vision.remat)
    assert [placed[f"stage{number}", "v5e"] for number in range(1, 6)] == [
        *[(1, "full", "mlp")] * 2, (1, "full", "full"), *[(2, "full", "full")] * 2,
    ]  # fmt: skip
    assert [placed[f"stage{number}", "v6e"] for number in range(1, 6)] == [
        *[(1, "minimal", "mlp")] * 2, (1, "minimal", "context"), (1, "context", "context"), (1, "context", "full"),
    ]  # fmt: skip
    assert [placed[f"stage{number}", "v5p"] for number in range(1, 6)] == [
        *[(1, "mlp", "mlp")] * 2, (1, "mlp", "minimal"), (1, "mlp", "context"), (1, "gate", "context"),
    ]  # fmt: skip
    assert [placed[f"stage{number}", "A100"] for number in range(1, 6)] == [
        *[(1, "mlp", "mlp")] * 2, (1, "mlp", "minimal"), (1, "minimal", "minimal"), (1, "minimal", "full"),
    ]  # fmt: skip


def test_what_the_config_names_is_kept():
    config = config_of().changed({"model.llm.remat": "dots", "model.vision.remat": "dots"})
    found = resolve(config, CHIPS["v5p"], 16)
    assert (found.model.llm.remat, found.model.vision.remat) == ("dots", "dots")


@pytest.mark.parametrize(
    ("devices", "changes", "message"),
    [
        (16, {"packs": 6, "mesh": (1, 4, 1, 4)}, "packs_per_batch 6 must be a multiple of 4"),
        (16, {"packs": 8, "mesh": (1, 4, 1, 4), "accumulate": 4}, "accumulate 4: 8 packs over 4 groups"),
        (16, {"mesh": (1, 4, 1, 3)}, "its axes need 12 devices, there are 16"),
        (6, {"packs": 4}, "must be a multiple of"),
    ],
)
def test_what_does_not_fit_is_one_line(devices, changes, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(config_of(**changes), CHIPS["v5p"], devices)
    assert "\n" not in str(error.value)
