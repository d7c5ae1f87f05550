"""Plans for one's own machine and for one chip with an adapter, and what to change where memory does not suffice."""

import json
import subprocess
import types

import jax
import ml_collections
import pytest

from kangaroo_jax.chips import CHIPS, parse_topology
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import StageConfig
from kangaroo_jax.config_files import load_config
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.planning import here
from kangaroo_jax.planning.formula import peak_gib
from kangaroo_jax.training.placement import resolve


def stage_on(chip: str, **keys) -> StageConfig:
    """Stage 4 of 8B with an adapter, resolved for one chip."""
    config = ml_collections.ConfigDict(load_config("stage4_instruct:kangaroo_8b").to_dict())
    config.update_from_flattened_dict({"lora.rank": 16, "data.packs_per_batch": 4, "data.frames_per_pack": 64, **keys})
    target = parse_topology(f"{chip}:1x1")
    return resolve(StageConfig.from_config(config), target.chip, 1, 1)


INT8 = {"lora.quantize": "int8", "data.frames_per_pack": 24, "data.tokens_per_pack": 4096}


@pytest.mark.parametrize(
    ("stage", "compiled"),
    [
        (stage_on("v6e", **{"data.tokens_per_pack": 10_240}), 24.42),  # docs/finetune.md
        (stage_on("v5e", **INT8), 13.15),
    ],
)
def test_the_formula_knows_adapters_and_int8_bases(stage, compiled):
    assert compiled < peak_gib(stage, count_parameters(stage.model)) < 1.2 * compiled


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["tpu", "TPU v5 lite", 1, 0, [[0, 0, 0]]], "v5e:1x1"),
        (["tpu", "TPU v6 lite", 4, 0, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]], "v6e:2x2"),
        (["gpu", "NVIDIA H100 80GB HBM3", 8, 0, []], "H100:8"),
        (["cpu", "cpu", 2, 0, []], "CPU:1"),
    ],
)
def test_here_is_what_jax_finds(found, expected, monkeypatch):
    answer = types.SimpleNamespace(returncode=0, stdout=f"a library's word\n{json.dumps(found)}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert str(here.devices_here()) == expected


def test_a_strange_device_or_none_is_one_line(monkeypatch):
    answer = types.SimpleNamespace(returncode=0, stdout='["gpu", "Matrox", 1, 0, []]\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match="here: 'Matrox' is none of the chips that are known"):
        here.devices_here()
    answer.returncode, answer.stderr = 1, "Traceback\nRuntimeError: no TPU\n"
    with pytest.raises(UserError, match=r"here: JAX finds no device \(RuntimeError: no TPU\)"):
        here.devices_here()


def test_a_plan_for_this_cpu_is_by_formula(monkeypatch, capsys):
    monkeypatch.setattr("kangaroo_jax.planning.plan.devices_here", here.cpu_here)
    keys = ("--config.lora.rank=4", "--config.data.packs_per_batch=1")
    assert cli.main(["plan", "--config=stage4_instruct:base_100m", "--topology=here", *keys]) == 0
    told = capsys.readouterr().out
    assert "stage4_instruct on CPU:1" in told and "by formula: a stage on a CPU is measured" in told


def test_a_stage_that_is_too_large_for_this_cpu_is_planned_too(monkeypatch, capsys):
    monkeypatch.setattr("kangaroo_jax.planning.plan.devices_here", here.cpu_here)
    monkeypatch.setattr(here, "host_memory", lambda: (24 << 30, 8 << 30))
    with pytest.raises(SystemExit, match="3"):
        cli.main(["plan", "--config=stage5_long_video:kangaroo_8b", "--topology=here"])
    assert "choose a larger machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chip", "keys", "expected"),
    [
        ("v6e", {"train.accumulate": 1}, "--config.train.accumulate=4 "),
        ("v6e", {"lora.rank": 0}, "--config.lora.rank=16 "),
        ("v6e", {}, "--config.lora.quantize=int8 "),
        ("v5e", {}, "--config.lora.quantize=int8 --config.data.tokens_per_pack="),
    ],
)
def test_what_to_change_is_the_mildest_that_fits(chip, keys, expected):
    stage, capacity = stage_on(chip, **{"data.tokens_per_pack": 10_240, **keys}), CHIPS[chip].gib
    advice = here.what_to_change(stage, capacity)
    assert advice.startswith(expected)
    needed = float(advice.partition("about ")[2].split()[0])
    assert needed <= 0.95 * capacity
    assert "frames_per_pack=0" not in advice


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (("train", "--config=stage4_instruct:kangaroo_8b"), "stage4_instruct"),
        (("curriculum", "--preset=kangaroo_8b", "--data=.", "--tokenizer=t.model"), "stage1_image_pretrain"),
    ],
)
def test_out_of_memory_in_a_stage_says_what_to_change(words, stage, tmp_path, monkeypatch, capsys):
    def train(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    for room in ("loop", "curriculum"):
        monkeypatch.setattr(f"kangaroo_jax.training.{room}.train", train)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage1.jsonl").write_text("{}\n")
    monkeypatch.setattr(here, "host_memory", lambda: (16 << 30, 8 << 30))
    keys = ["--config.data.packs_per_batch=8", "--config.lora.rank=16", "--config.init_from=base"]
    assert cli.main([*words, f"--workdir={tmp_path / 'run'}", *keys]) == 2
    error = capsys.readouterr().err
    assert f"{stage}: out of memory: a cpu has 16.0 GiB; --config." in error and error.count("\n") == 1
    assert "lora.quantize=int8" in error
