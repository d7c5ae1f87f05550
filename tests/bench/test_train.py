"""The benchmark runs the real step and reports what it measured."""

import json
import subprocess
import sys

import pytest

from kangaroo_jax.bench import train as bench
from kangaroo_jax.cli import main as cli
from kangaroo_jax.cli import overrides
from kangaroo_jax.config import StageConfig

pytestmark = pytest.mark.alone


def test_bench_train_reports_rates(make_micro_config, capsys, monkeypatch):
    config = make_micro_config()
    config.data.update(packs_per_batch=1, tokens_per_pack=64, frames_per_pack=4)
    stage = StageConfig.from_config(config)
    monkeypatch.setattr(overrides, "config_of", lambda job, spec, words: config)
    assert cli.main(["bench", "train", "--steps=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    steps_per_second = 1000 / result["ms_per_step"]
    for what, in_a_step in (("tokens", 64), ("frames", 4)):  # however slow the machine is
        assert result[f"{what}_per_second"] == pytest.approx(in_a_step * steps_per_second, rel=0.05, abs=0.1)
    assert result["attention"] == "xla_chunked" and result["foretold_gib"] > 0
    batch = bench.full_batch(stage)
    assert (batch.vision_index >= 0).sum() == 4 // 2 * 1 * 1  # two groups of one token: 2 x 2 patches joined


def test_bench_checkpoint_says_how_long_a_save_holds_training_up(tmp_path, capsys):
    assert cli.main(["bench", "checkpoint", f"--folder={tmp_path}", "--gib=0.01", "--rounds=2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["state_gib"] == 0.01 and 0 < result["held_seconds"] < result["save_seconds"]
    assert 0 < result["held_share"] <= result["held_share_worst"] < 1 and result["memory_over_state"] >= 0
    assert not list(tmp_path.iterdir())
    assert cli.main(["bench", "checkpoint", f"--folder={tmp_path / 'none'}"]) == 2
    assert "--folder must be there" in capsys.readouterr().err


def test_a_save_takes_little_memory_beside_the_state(tmp_path):
    command = ["checkpoint", f"--folder={tmp_path}", "--gib=0.25", "--rounds=2"]
    run = subprocess.run([sys.executable, "-m", "kangaroo_jax", "bench", *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["memory_over_state"] < 0.8  # written all at once: 1.3 and more
