"""Annotation that is killed again and again ends with the bytes of one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
from pathlib import Path
from kangaroo_jax.curation.annotate.config import annotation_config
from kangaroo_jax.curation.annotate.run import annotate_clips

source, output, url = sys.argv[1:]
config = annotation_config("endpoint")
for name, backend in config.backends.items():
    backend.update(base_url=url, model=name, timeout=3.0, first_wait=0.02, concurrency=4)
config.update(part_clips=4)
config.refine.min_sentence_support = 0.0
print("begin", flush=True)
annotate_clips(Path(source), Path(output), config)
"""


def start(source: Path, output: Path, url: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), url]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begin\n"
    return process


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, server, make_clips):
    source = make_clips(tmp_path / "in", 60, frames=3)
    assert start(source, tmp_path / "whole", server).wait(120) == 0
    killed, rng = 0, random.Random(0)
    for _ in range(6):
        process = start(source, tmp_path / "killed", server)
        time.sleep(rng.uniform(0.05, 1.0))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for path in (tmp_path / "killed").rglob("*.jsonl"):  # what is there is whole
            for line in path.read_text().splitlines():
                json.loads(line)
    assert killed >= 2
    assert start(source, tmp_path / "killed", server).wait(120) == 0
    for name in ("captions.jsonl", "refined.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    begin = time.monotonic()
    assert start(source, tmp_path / "killed", server).wait(120) == 0
    print(f"{killed} kills; a finished run takes {time.monotonic() - begin:.1f} s")
