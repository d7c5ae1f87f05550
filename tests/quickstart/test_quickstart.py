"""The whole road in little: corpus, tokenizer, warm-up, five stages, evaluation, chat, report; then for nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def quickstart(workdir: Path) -> str:
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "kangaroo_jax", "quickstart", f"--workdir={workdir}", "--scale=0.004"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart_from_nothing_and_again(tmp_path):
    output = quickstart(tmp_path)
    assert "report:" in output and "chat --checkpoint=" in output.splitlines()[-1]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [stage["name"][:6] for stage in results["stages"]] == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    for stage in results["stages"]:
        for key in ("short_mcq", "long_mcq", "open_exact", "en_mcq", "zh_mcq", "useful_token_share"):
            assert 0 <= stage[key] <= 1
        assert stage["steps"] >= 2
    assert results["chance"] == 0.25 and results["seconds"] > 0 and results["peak_rss_gib"] > 0
    judged = results["judged"]
    assert list(judged["needles"]) == ["stage4_instruct", "stage5_long_video"] and 0 <= judged["official"] <= 1
    assert list(judged["controls"]) == ["no-video", "one-frame", "shuffled"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Needles: frame, stage5" in page and "What the video adds" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "stage" in page.lower()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stage*/checkpoints/*")}
    quickstart(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("stage*/checkpoints/*")}
