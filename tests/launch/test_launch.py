"""The launch scripts: a dry run prints what would be done, mistakes are named, a training is started again."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOB = ["--", "train", "--config=configs/stage5_long_video.py:kangaroo_8b", "--config.data.train=('a b.jsonl',)"]
TPU = ["--name=k", "--zone=us-east5-b", "--project=p", "--type=v5litepod-32", "--bucket=gs://bucket/folder/deep"]
GKE = ["--name=k", "--image=registry/kangaroo:1", "--type=v5e", "--topology=4x8"]
SLURM = ["--nodes=4", "--gpus-per-node=8", "--partition=gpu"]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke/train.sh", "slurm/train.sh", "restart.sh"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_tpu_pod_prints_every_command(tmp_path):
    done = run("tpu_pod.sh", *TPU, "--dry-run", "--spot", *JOB)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    assert "queued-resources create k" in lines[0] and "--spot" in lines[0] and "--node-id=k" in lines[0]
    assert "--runtime-version=v2-alpha-tpuv5-lite" in lines[0]
    assert any("gcsfuse" in line and "folder/deep" in line and "bucket" in line for line in lines)
    training = next(line for line in lines if "KANGAROO_PROCESSES=auto" in line)
    assert "--worker=all" in training and "stage5_long_video.py:kangaroo_8b" in training and "a" in training
    assert "queued-resources delete k" in lines[-1]
    slices = run("tpu_pod.sh", *TPU, "--slices=2", "--dry-run", *JOB).stdout
    assert "--node-count=2" in slices and " k-0 " in slices and " k-1 " in slices


def test_flags_of_libtpu_are_given_only_where_they_are_named():
    """Each is in the file that is named, below a word on who measured it."""
    for script, arguments in (("tpu_pod.sh", TPU), ("gke/train.sh", GKE)):
        plain, named = (run(script, *arguments, *flags, "--dry-run", *JOB).stdout for flags in ([], ["--flags=v6e"]))
        assert "LIBTPU_INIT_ARGS" not in plain and "--xla" not in plain
        for line in (LAUNCH / "tpu_flags" / "v6e.txt").read_text().splitlines():
            assert (line in named) == line.startswith("--xla"), (script, line)
        refused = run(script, *arguments, "--flags=v7", "--dry-run", *JOB)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr == f"{script}: --flags=v7: there are v6e\n"


def test_tpu_pod_runs_those_commands_and_starts_again_after_a_loss(tmp_path):
    """With a gcloud that loses the slice once: the queue is asked again, and the training started twice."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        f"""#!/usr/bin/env bash
echo "$@" >> {tmp_path}/calls
case "$*" in
  *describe*) echo ACTIVE ;;
  *KANGAROO_PROCESSES*) [[ -e {tmp_path}/lost ]] && exit 0; touch {tmp_path}/lost; exit 255 ;;
esac
"""
    )
    gcloud.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("tpu_pod.sh", *TPU, *JOB, PATH=path, PAUSE_SECONDS="0")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("KANGAROO_PROCESSES=auto") == 2 and "starting again" in done.stderr
    assert calls.strip().splitlines()[-1].startswith("compute tpus queued-resources delete k")


def test_gke_manifest_asks_for_every_host_of_the_slice():
    done = run("gke/train.sh", *GKE, "--slices=2", "--claim=disk", "--dry-run", *JOB)
    assert done.returncode == 0, done.stderr
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(done.stdout.split("<<MANIFEST\n", 1)[1].rsplit("MANIFEST", 1)[0])
    (job,) = manifest["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    assert job["replicas"] == 2 and pods["parallelism"] == pods["completions"] == 8
    assert container["args"] == JOB[1:] and container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["volumeMounts"][0]["mountPath"] == "/mnt/kangaroo"
    assert pods["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"


def test_slurm_script_is_valid_and_requeues():
    done = run("slurm/train.sh", *SLURM, "--dry-run", *JOB)
    assert done.returncode == 0, done.stderr
    script = done.stdout.split("<<JOB\n", 1)[1].rsplit("JOB", 1)[0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for wanted in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--partition=gpu",
        "srun",
        "scontrol requeue",
        "restart_until_done",
    ):
        assert wanted in script, wanted


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", [*TPU[1:], *JOB], "--name is missing"),
        ("tpu_pod.sh", TPU, "nothing to run"),
        ("tpu_pod.sh", ["--nam=k", *JOB], "unknown flag --nam=k"),
        ("gke/train.sh", ["--name=k", "--image=i", "--type=v9", "--topology=4x8", *JOB], "one of v4"),
        ("gke/train.sh", GKE, "nothing to run"),
        ("slurm/train.sh", JOB, "--nodes=N"),
    ],
)
def test_mistakes_are_named_with_exit_code_2(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(("codes", "status", "starts"), [("75 137 0", 0, 3), ("2", 2, 1), ("1 1 1 1", 1, 3)])
def test_a_failed_training_is_started_again_but_bad_input_is_not(tmp_path, codes, status, starts):
    script = f"""
set -euo pipefail
source {LAUNCH}/restart.sh
codes=({codes})
attempt() {{
  local n
  n=$(cat {tmp_path}/n 2>/dev/null || echo 0)
  echo $((n + 1)) > {tmp_path}/n
  return "${{codes[$n]}}"
}}
restart_until_done attempt
"""
    environment = {**os.environ, "PAUSE_SECONDS": "0", "RESTARTS": "3"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == status, done.stderr
    assert int((tmp_path / "n").read_text()) == starts


BLOCKS = [
    (page.name, block)
    for page in sorted((ROOT / "docs" / "launch").glob("*.md"))
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
]
SCRIPTS = [
    (page, command) for page, block in BLOCKS for command in re.findall(r"^(\./launch/(?:.*\\\n)*.*)$", block, re.M)
]


def test_what_the_pages_show_is_valid_bash():
    assert len(BLOCKS) > 12
    for _, block in BLOCKS:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize(("page", "command"), SCRIPTS, ids=[page for page, _ in SCRIPTS])
def test_a_script_that_a_page_shows_runs_dry(page, command):
    first, _, rest = command.partition(" -- ")
    done = subprocess.run(["bash", "-c", f"{first} --dry-run -- {rest}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert "stage5" in done.stdout or "/shared/curated" in done.stdout


def test_every_launcher_has_a_page():
    assert {page for page, _ in SCRIPTS} == {"tpu.md", "gke.md", "slurm.md", "ray.md"}
