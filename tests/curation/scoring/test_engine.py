"""Engines: the same bytes from any of them, through any interruption, and faults that cost only their file."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kangaroo_jax.curation.curate import Options, curate, select_again
from kangaroo_jax.curation.engine import run as engine
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.curation.engine.run_shard import ShardPlan
from kangaroo_jax.curation.engine.shards import all_scores, make_shards
from kangaroo_jax.curation.stages import BY_NAME
from kangaroo_jax.errors import UserError
from tests.curation.rows import rows_of
from tests.curation.scoring.clips import breaking_job, moving, write_clip

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[3]
ROUNDS = int(os.environ.get("KANGAROO_TEST_ROUNDS", "1"))  # kills under Ray
LIGHT = ("text", "face", "caption_language")


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """An output that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_job(clips, output).check_returncode()
    return output


def command(clips: Path, output: Path, workers: int = 2, *more: str) -> list[str]:
    flags = [f"--input={clips}", f"--output={output}", f"--config.engine.workers={workers}", *more]
    off = [f"--config.{stage}.enabled=False" for stage in LIGHT]
    return [sys.executable, "-m", "kangaroo_jax", "curate", *flags, *off]


def run_job(clips: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(clips, output, 2, *more), cwd=ROOT, capture_output=True, text=True)


def kill_and_resume(clips: Path, output: Path, workers: int, kills: int, *more: str) -> int:
    """Kill -9 at random moments, then run to the end; returns how many of the kills hit a run that was at work.

    The moments are spread over the time that a run takes here. A run that ended all the same is begun anew.
    """
    begin = time.monotonic()
    subprocess.run(command(clips, output.with_name("timed"), workers, *more), cwd=ROOT, check=True, capture_output=True)
    most, rng, hits = time.monotonic() - begin, random.Random(workers), 0
    for _ in range(kills):
        run = subprocess.Popen(command(clips, output, workers, *more), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            run.wait(timeout=rng.uniform(0.2, 0.9) * most)
            shutil.rmtree(output)
        except subprocess.TimeoutExpired:
            hits += 1
            run.send_signal(signal.SIGKILL)
            run.wait()
    subprocess.run(command(clips, output, workers, *more), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return hits


def test_a_killed_run_goes_on_to_the_same_bytes(clips, whole, tmp_path, tree):
    kill_and_resume(clips, tmp_path / "out", 2, kills=2)
    assert tree(tmp_path / "out") == tree(whole)


def test_a_finished_run_computes_nothing_and_thresholds_recompute_no_score(clips, whole, config, monkeypatch, capsys):
    stamps = {file: file.stat().st_mtime_ns for file in (whole / "stages").rglob("*.jsonl")}
    monkeypatch.setattr(ShardPlan, "guard", lambda self: pytest.fail("a process was started"))
    curate(Options(str(whole), (str(clips),)), config)
    said = capsys.readouterr().out
    assert "kept 6 clips" in said and "most were dropped" not in said
    config.select.min_motion = 50.0
    select_again(Options(str(whole)), config)
    assert "kept 0 clips, 0.00 h of video\nmost were dropped by the rule motion: " in capsys.readouterr().out
    dropped = rows_of(whole / "dropped.jsonl")
    assert [row["rule"] for row in dropped] == ["motion"] * 6
    config.select.min_motion = 0.015
    select_again(Options(str(whole)), config)
    assert stamps == {file: file.stat().st_mtime_ns for file in (whole / "stages").rglob("*.jsonl")}


def test_a_stage_whose_settings_change_is_computed_again_with_what_follows_it(clips, config, tmp_path):
    run = Options(str(tmp_path / "out"), (str(clips),))
    curate(run, config)
    stamps = {file.parent.name: file.stat().st_mtime_ns for file in (tmp_path / "out/stages").rglob("*.jsonl")}
    config.keyframes.count = 3
    curate(run, config)
    after = {file.parent.name: file.stat().st_mtime_ns for file in (tmp_path / "out/stages").rglob("*.jsonl")}
    assert {name for name in stamps if stamps[name] != after[name]} == {"keyframes", "fingerprint"}
    folders = list((tmp_path / "out/keyframes").iterdir())
    assert len(folders) == 6 and all(len(list(folder.iterdir())) == 3 for folder in folders)


def test_faults_cost_their_own_file_only(clips, config, tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    for n, name in enumerate(["segv_0", "fine_0", "hang_0", "fine_1", "eats_0", "fine_2"]):
        write_clip(media / f"{name}.mp4", moving(n, frames=10))
    (media / "empty.mp4").write_bytes(b"")
    (media / "text.mp4").write_text("<html>not found</html>")
    cut = (media / "fine_0.mp4").read_bytes()
    (media / "cut.mp4").write_bytes(cut[: len(cut) // 2])
    config.engine.update(item_seconds=6.0, memory_mib=700, shard_items=3)
    plain = json.loads(json.dumps(config.to_dict()))
    stages = tuple(BY_NAME[name] for name in ("probe", "cuts", "motion"))
    plan = ShardPlan(tmp_path / "out", stages, plain, job=breaking_job)
    shards = make_shards(read_inputs([str(media)]), 3)
    begin = time.monotonic()
    engine.run_local(shards, plan, workers=1)
    assert time.monotonic() - begin < 120
    rows = {Path(row["path"]).stem: row for row in all_scores(plan.root)}
    assert sorted(name for name, row in rows.items() if not row["failures"]) == ["fine_0", "fine_1", "fine_2"]
    assert rows["segv_0"]["failures"] == {"cuts": "crashed (SIGSEGV)"}
    assert rows["hang_0"]["failures"] == {"cuts": "took more than 6 s"}
    assert rows["eats_0"]["failures"] == {"cuts": "needed more than 700 MiB of memory"}
    assert all("probe" in rows[name]["failures"] for name in ("empty", "text", "cut"))
    assert rows["fine_0"]["motion"]["score"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_moment_of_a_kill_leads_to_the_same_bytes(clips, whole, tmp_path, tree, workers):
    assert kill_and_resume(clips, tmp_path / "out", workers, kills=7) > 0
    assert tree(tmp_path / "out") == tree(whole)


@pytest.mark.slow
def test_ray_writes_what_local_writes(clips, whole, tmp_path, tree):
    pytest.importorskip("ray", reason="of the extra `curation`")
    assert kill_and_resume(clips, tmp_path / "out", 2, ROUNDS, "--engine=ray") > 0
    assert tree(tmp_path / "out") == tree(whole)


def test_ctrl_c_ends_at_once_and_leaves_no_process(clips, whole, tmp_path, tree):
    run = subprocess.Popen(command(clips, tmp_path / "out"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "6 items" in run.stdout.readline()  # it is at work
    time.sleep(0.4)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) in (130, 0, -signal.SIGINT)  # the last where it had ended but for Python itself
    run.stdout.close()
    run_job(clips, tmp_path / "out").check_returncode()
    assert tree(tmp_path / "out") == tree(whole)


def test_training_needs_no_package_of_curation():
    core = (ROOT / "setup.py").read_text().partition("CORE = [")[2].partition("]")[0]
    assert not any(name in core for name in ("opencv", "scenedetect", "rapidocr", "onnxruntime", "ray"))


def test_mistakes_are_named(clips, config, tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        curate(Options(str(tmp_path / "out"), (str(tmp_path / "absent"),)), config)
    with pytest.raises(UserError, match="no engine 'rai'; there are local, ray"):
        curate(Options(str(tmp_path / "out"), (str(clips),), engine="rai"), config)
    with pytest.raises(UserError, match="no scores here; run kangaroo curate"):
        select_again(Options(str(tmp_path / "out")), config)


def test_a_ray_that_is_started_here_asks_for_a_token(clips, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # it reads its environment when it is imported
    plan = ShardPlan(tmp_path / "out", (BY_NAME["probe"],), json.loads(json.dumps(config.to_dict())))
    for address, mode in (("", "token"), ("auto", None)):
        for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        with pytest.raises(UserError, match="needs the package ray"):
            engine.run_ray([], plan, address)
        assert os.environ.get("RAY_AUTH_MODE") == mode
