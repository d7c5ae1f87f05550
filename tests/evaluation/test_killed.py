"""An evaluation that is killed at random moments: the same results as one that was not, and no answer twice."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.evaluation.test_asking_server import server  # noqa: F401

AT_A_TIME = 2


def command(server, folder: Path, workdir: Path) -> list[str]:  # noqa: F811
    words = [f"--server={server.address}", "--benchmark=mvbench", f"--data={folder}", f"--workdir={workdir}"]
    return [sys.executable, "-m", "kangaroo_jax", "eval", *words, "--side=32", "--frames=2", f"--at-a-time={AT_A_TIME}"]


@pytest.mark.slow
@pytest.mark.alone
def test_kills_lose_and_repeat_nothing(server, data, tmp_path):  # noqa: F811
    folder, rng = data("mvbench"), random.Random(3)
    subprocess.run(command(server, folder, tmp_path / "whole"), check=True, capture_output=True)
    asked, path, kills = len(server.seen), tmp_path / "killed" / "samples.jsonl", 0
    process = None
    while kills < 10:
        process = subprocess.Popen(command(server, folder, tmp_path / "killed"), stdout=-3, stderr=-3)
        before = path.stat().st_size if path.exists() else 0
        while process.poll() is None and (path.stat().st_size if path.exists() else 0) == before:
            time.sleep(0.01)  # until it asks
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.wait()
        kills += 1
    subprocess.run(command(server, folder, tmp_path / "killed"), check=True, capture_output=True)
    names = ("results.json", "scored.jsonl")
    assert [(tmp_path / "whole" / n).read_bytes() for n in names] == [
        (tmp_path / "killed" / n).read_bytes() for n in names
    ]
    rows = Counter(json.loads(line)["id"] for line in path.read_text().splitlines())
    assert len(rows) == 40 and set(rows.values()) == {1}
    assert len(server.seen) - asked <= 40 + 10 * AT_A_TIME  # only what was under way when it was killed
