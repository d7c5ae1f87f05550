"""What the launch scripts write, send and start is out of the reach of others on the same machines."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.sh"))
TPU = ["--name=k", "--zone=us-east5-b", "--project=p", "--type=v5litepod-32"]


def stub(folder: Path, name: str, body: str) -> None:
    """A program that stands first on PATH."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def call(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.fixture
def clone(tmp_path):
    """A clone with the launch scripts, a secret that git does not track, a tracked file with a space, one deleted."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "a b.py").write_text("x = 1\n")
    (folder / "gone.py").write_text("x = 1\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "add", "."], check=True)
    (folder / "gone.py").unlink()
    (folder / ".env").write_text("KEY=secret\n")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("private\n")
    return folder


def test_tpu_pod_sends_tracked_files_through_folders_of_its_own(clone, tmp_path):
    """Also where a link with the name of the archive lies in the shared folder for temporary files."""
    shared, programs, precious = tmp_path / "shared", tmp_path / "programs", tmp_path / "precious.txt"
    for folder in (shared, programs):
        folder.mkdir()
    precious.write_text("precious\n")
    (shared / "kangaroo_jax.tgz").symlink_to(precious)
    stub(
        programs,
        "gcloud",
        f"""echo "$@" >>{tmp_path}/calls
case "$*" in
  *describe*) echo ACTIVE ;;
  *tpu-vm\\ scp*) for a in "$@"; do
      [[ "$a" == *.tgz ]] && {{ tar -tzf "$a"; stat -c %a "$a" "$(dirname "$a")"; }} >{tmp_path}/sent
    done ;;
esac
true""",
    )
    command = [str(clone / "launch/tpu_pod.sh"), *TPU, "--bucket=gs://b/f", "--", "train"]
    done = call(command, PATH=f"{programs}:{os.environ['PATH']}", TMPDIR=str(shared), PAUSE_SECONDS="0", RESTARTS="1")
    assert done.returncode == 0, done.stderr
    *names, mode, mode_of_folder = (tmp_path / "sent").read_text().splitlines()
    assert "a b.py" in names and "launch/tpu_pod.sh" in names
    assert not {".env", "runs/log", "gone.py"} & set(names)
    assert (mode, mode_of_folder) == ("600", "700")
    assert precious.read_text() == "precious\n" and [p.name for p in shared.iterdir()] == ["kangaroo_jax.tgz"]
    calls = (tmp_path / "calls").read_text()
    assert "777" not in calls and "k:/tmp" not in calls and "~/kangaroo_jax.tgz" in calls


def test_tpu_pod_needs_a_clone(clone, tmp_path):
    shutil.rmtree(clone / ".git")
    command = [str(clone / "launch/tpu_pod.sh"), *TPU, "--bucket=gs://b/f", "--dry-run", "--", "train"]
    done = call(command, GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert done.returncode == 2 and "no git clone" in done.stderr


def test_the_name_of_a_bucket_is_one_word_on_the_hosts(clone, tmp_path):
    programs, folder = tmp_path / "programs", tmp_path / "folder"
    programs.mkdir()
    folder.mkdir()
    stub(programs, "gcsfuse", 'printf "%s\\n" "$@"')
    stub(
        programs,
        "gcloud",
        f"""[[ "$*" == *describe* ]] && echo ACTIVE
for a in "$@"; do [[ "$a" == --command=*gcsfuse* ]] && echo "${{a#*=}}" >{tmp_path}/command; done
true""",
    )
    path = f"{programs}:{os.environ['PATH']}"
    bucket = "gs://b'; touch pwned; '/f $(touch pwned)"
    command = [str(clone / "launch/tpu_pod.sh"), *TPU, f"--bucket={bucket}", "--", "train"]
    done = call(command, PATH=path, PAUSE_SECONDS="0", RESTARTS="1")
    assert done.returncode == 0, done.stderr
    (mount,) = (line for line in (tmp_path / "command").read_text().splitlines() if "gcsfuse" in line)
    done = subprocess.run(["bash", "-c", mount], capture_output=True, text=True, cwd=folder, env={"PATH": path})
    assert done.stdout.splitlines()[1:] == ["--only-dir", "f $(touch pwned)", "b'; touch pwned; '", "/mnt/kangaroo"]
    assert not list(folder.iterdir())


def ray_of(folder: Path, version: str) -> str:
    """A PYTHONPATH on which a distribution `ray` of a version is installed."""
    info = folder / f"ray-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ray\nVersion: {version}\n")
    return str(folder)


def run_curation_job(folder: Path, ray_version: str) -> subprocess.CompletedProcess:
    """The job script as Slurm would run it on two nodes; what would start there says how it was called."""
    command = [str(ROOT / "launch/slurm/curate.sh"), "--nodes=2", "--cpus-per-node=8", "--dry-run", "--", "--input=a b"]
    job = call(command, VIRTUAL_ENV="").stdout
    stub(folder, "scontrol", "seq -f n%.0f 1 30000")  # more than a pipe holds, as a job of many nodes may print
    # What starts in the background has said how it was called before the script goes on.
    wait = f"until (($(wc -l <{folder}/said) >= $(wc -l <{folder}/slept))); do command -p sleep 0.05; done"
    stub(folder, "sleep", f"echo >>{folder}/slept; touch {folder}/said; {wait}")
    stub(
        folder,
        "srun",
        """printf '%s|' "$RAY_AUTH_MODE" "${RAY_AUTH_TOKEN:-}" "$(stat -c %a "$RAY_AUTH_TOKEN_PATH")" \\
  "$(cat "$RAY_AUTH_TOKEN_PATH")"; echo "$@"; echo >>FOLDER/said""".replace("FOLDER", str(folder)),
    )
    return call(
        ["bash", "-c", job],
        PATH=f"{folder}:{os.environ['PATH']}",
        HOME=str(folder),
        PYTHONPATH=ray_of(folder / "site", ray_version),
        SLURM_JOB_ID="40007",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="n[1-2]",
        RAY_AUTH_TOKEN="a token that was there before",
    )


def test_ray_under_slurm_answers_only_those_who_know_the_token_of_the_job(tmp_path):
    done = run_curation_job(tmp_path, "2.52.0")
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 3 and len({line[3] for line in lines}) == 1
    for mode, inherited, permissions, token, arguments in lines:
        assert (mode, inherited, permissions) == ("token", "", "600")
        assert re.fullmatch("[0-9a-f]{64}", token) and token not in arguments
    assert any("ray start --head --port=20007" in line[4] for line in lines)
    assert any("--ray-address=n1:20007 --input=a b" in line[4] for line in lines)
    assert not list(tmp_path.glob(".kangaroo-ray-*"))


def test_a_ray_that_knows_no_tokens_is_not_started(tmp_path):
    done = run_curation_job(tmp_path, "2.51.2")
    assert done.returncode == 1 and "Ray 2.51.2 ignores tokens" in done.stderr
    assert not done.stdout and not list(tmp_path.glob(".kangaroo-ray-*"))


def test_ray_on_kubernetes_asks_for_a_token():
    yaml = pytest.importorskip("yaml")
    cluster = yaml.safe_load((ROOT / "launch/gke/curate.yaml").read_text())["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] >= "2.52"


FLAGS = {
    "tpu_pod.sh": [*TPU, "--bucket=gs://b/f"],
    "gke/train.sh": ["--name=k", "--image=i", "--type=v5e", "--topology=4x8"],
    "slurm/train.sh": ["--nodes=4"],
    "slurm/curate.sh": ["--nodes=4", "--cpus-per-node=8"],
}


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("what", ["\n", "\r", "\x1b[2K"], ids=["newline", "return", "escape"])
def test_a_flag_is_one_line_of_a_job_script(script, what):
    """Else it could add lines of its own to the script or the manifest."""
    last = {"tpu_pod.sh": "--zone=a", "gke/train.sh": "--claim=a"}.get(script, "--partition=a")
    command = [
        str(ROOT / "launch" / script),
        *FLAGS[script],
        f"{last}{what}#SBATCH --comment=b",
        "--dry-run",
        "--",
        "x",
    ]
    done = call(command)
    assert done.returncode == 2 and "control character in a flag" in done.stderr
    assert not done.stdout and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("tpu_pod.sh", "--slices=a[$(touch pwned)]"),
        ("gke/train.sh", "--topology=a[$(touch pwned)]x4"),
        ("gke/train.sh", "--restarts=x"),
        ("slurm/train.sh", "--gpus-per-node=8 --x"),
        ("slurm/curate.sh", "--cpus-per-node=8;x"),
    ],
)
def test_what_is_no_number_is_refused_and_not_evaluated(script, flag):
    done = call([str(ROOT / "launch" / script), *FLAGS[script], flag, "--dry-run", "--", "x"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (ROOT / "pwned").exists()


@pytest.mark.parametrize("script", [name for name in SCRIPTS if os.access(ROOT / name, os.X_OK)])
def test_help_prints_the_head_and_does_nothing(script, tmp_path):
    done = call([str(ROOT / script), "--help"], PATH="/usr/bin:/bin", HOME=str(tmp_path))
    head = (ROOT / script).read_text().splitlines()[1].removeprefix("# ")
    assert done.returncode == 0 and done.stdout.startswith(head) and f"./{script}" in done.stdout
    assert "set -euo" not in done.stdout and not done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = call(
        [
            "shellcheck",
            "-s",
            "bash",
            "-x",
            "-P",
            str(ROOT),
            *[str(ROOT / name) for name in SCRIPTS],
            str(ROOT / ".ci/run"),
        ]
    )
    assert done.returncode == 0, done.stdout


def test_no_file_has_a_fixed_name_in_the_shared_temporary_folder():
    for folder in ("kangaroo_jax", "launch"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".yaml"):
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"""["' =:]/tmp/|gettempdir\(|mktemp -u|tempfile\.mktemp\(""", text), path
