"""What an earlier commit left opens and goes on: a stage, its place in the data, a curated folder.

tests/fixtures/former/make.py made the fixture, at the commit before files moved to one room a trade (6efe8a0).
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # two processes of the command line
FIXTURE = Path(__file__).parent / "fixtures" / "former" / "former.tar.xz"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def former(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(folder: Path, *command: str) -> str:
    """What a job of the command line prints, in a process of its own with one device."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    job = [sys.executable, "-m", "kangaroo_jax", *command]
    done = subprocess.run(job, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stage_goes_on_from_its_checkpoint_with_the_same_samples_and_losses(former):
    said = run(former, "train", "--config=stage.py", "--workdir=stage", "--config.train.steps=8")
    assert "goes on after step 4" in said and "edited" not in said
    assert lines(former / "stage" / "samples.jsonl") == lines(former / "samples.jsonl")
    now, then = lines(former / "stage" / "metrics.jsonl"), lines(former / "metrics.jsonl")
    assert [line["step"] for line in now] == list(range(1, 9))
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "frames"):
        np.testing.assert_allclose([x[key] for x in now], [x[key] for x in then], rtol=1e-4, err_msg=key)


def test_a_curated_folder_is_chosen_from_again_alike(former):
    """What a stage found is known by the absolute path of its clip, which is another one here: only select runs."""
    files = [former / "curated" / name for name in ("selected.jsonl", "dropped.jsonl", "funnel.json")]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    run(former, "curate", "select", "--output=curated")
    assert [file.read_bytes() for file in files] == before
