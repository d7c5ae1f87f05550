"""The measurement on a GPU, at tiny size on the CPU: each command runs, and one that fails stops no other."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch/bench_gpu.sh"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_help_and_bad_input():
    assert "ten minutes at most" in run("--help").stdout
    for arguments, environment, message in (
        (["--fast"], {}, "unknown flag --fast"),
        ([], {"DEPTH": "x"}, "DEPTH is a whole number, not 'x'"),
    ):
        done = run(*arguments, **environment)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_every_command_runs_at_tiny_size(tmp_path):
    small = {
        "PRESET": "tiny",
        "DEPTH": "1",
        "STEPS": "1",
        "SECONDS_IN_ALL": "3000",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = run(str(tmp_path), **small, ATTENTIONS="xla_chunked triton", KANGAROO_BENCH_STAGES="stage3_refine")
    assert done.returncode == 1 and "does not run on this device" in done.stderr  # the kernel, without a GPU
    (kept,) = tmp_path.glob("gpu-*.jsonl")
    measured, failed = (json.loads(line) for line in kept.read_text().splitlines())
    assert measured["stage"] == "stage3_refine" and measured["attention"] == "xla_chunked" and measured["depth"] == 1
    assert measured["ms_per_step"] > 0 and measured["foretold_gib"] > 0
    assert failed == {"stage": "stage3_refine", "depth": 1, "attention": "triton", "failed": True}
    assert any((tmp_path / "trace-stage3_refine").rglob("*.xplane.pb"))
