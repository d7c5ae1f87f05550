"""The scripts of examples/ run as their heads say, from an empty folder; three share what one has trained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "clips"}


def run(name: str, *flags: str, cwd: Path) -> list[str]:
    """What an example prints."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES[name]), *flags]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where examples/train.py has run for a few steps with its defaults."""
    here = tmp_path_factory.mktemp("examples")
    lines = run("train", "--steps=3", cwd=here)
    assert re.fullmatch(r"3 steps in \d+ s, \d+% of the tokens useful", lines[-1])
    return here


def test_every_example_has_a_test_and_fits_a_screen():
    assert set(EXAMPLES) == {"train", "chat", "convert", "curate", "plan"}
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name, path in EXAMPLES.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60 and f"\n    python examples/{name}.py " in text and f"({name}.py)" in page


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_head_of_an_example_names_flags_that_it_has(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    named = set(re.findall(r"\[(--\w+)=", text.split('"""')[1]))
    assert named == set(re.findall(r'add_argument\(\s*"(--\w+)"', text)) and named


def test_plan_prints_a_line_a_stage(tmp_path):
    lines = run("plan", "--topology=L4:16", cwd=tmp_path)
    assert [line[:6] for line in lines[:5]] == [f"stage{number}" for number in range(1, 6)]
    assert " fits " in lines[0] and "does not fit" in lines[4] and lines[5].endswith("chip-hours in all")


def test_curate_keeps_the_two_good_clips_and_says_why_not_the_others(tmp_path):
    pytest.importorskip("scenedetect")
    lines = [line.split() for line in run("curate", cwd=tmp_path)]
    found = {line[1]: line[2:3] for line in lines if line[0] in ("selected", "dropped")}
    assert found == {
        "red.mp4": [],
        "blue.mp4": [],
        "cut_off.mp4": ["broken"],
        "still.mp4": ["motion"],
        "red_again.mp4": ["duplicate"],
    }
    assert (tmp_path / "runs/examples/curated/report.html").exists()


@pytest.mark.slow
def test_train_takes_a_file_of_ones_own_and_goes_on_where_it_stopped(folder, tmp_path):
    data = folder / "runs/examples/data/clips.jsonl"
    run("train", f"--data={data}", f"--workdir={tmp_path}", "--steps=2", cwd=tmp_path)
    lines = run("train", f"--data={data}", f"--workdir={tmp_path}", "--steps=3", cwd=tmp_path)
    assert lines[-1].startswith("3 steps") and not (tmp_path / "data").exists()
    assert len((tmp_path / "train" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_chat_answers_both_rounds(folder):
    first, second = run("chat", cwd=folder)
    assert first.startswith("What colour is it?") and second.startswith("Which way does it move?")


@pytest.mark.slow
def test_convert_changes_no_bit(folder):
    lines = run("convert", cwd=folder)
    assert any(re.match(r"\d+ tensors are bit for bit what they were", line) for line in lines)
    assert "  config.json" in lines and "  model.safetensors" in lines
