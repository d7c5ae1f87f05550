"""Every notebook of launch/colab from top to bottom at the smallest size, by nbmake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "colab"
pytestmark = pytest.mark.nightly


def run(name: str, here: Path, **environment: str) -> None:
    """Run a notebook in a folder, with a `kangaroo` on the path that is this one."""
    for package in ("nbmake", "ipykernel"):
        pytest.importorskip(package)
    (here / "bin").mkdir(exist_ok=True)
    script = here / "bin" / "kangaroo"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kangaroo_jax "$@"\n')
    script.chmod(0o755)
    shutil.copy(FOLDER / f"{name}.ipynb", here)
    path = os.pathsep.join([str(here / "bin"), os.environ["PATH"]])
    python_path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    given = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": python_path,
        "XLA_FLAGS": "",
        "KANGAROO_TINY": "1",
        **environment,
    }
    plugin = ["--nbmake", "--nbmake-timeout=1800", "-p", "no:cacheprovider", "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, f"--rootdir={here}", str(here / f"{name}.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=given, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Where the quickstart's notebook has run: the model that the others talk to and teach."""
    here = tmp_path_factory.mktemp("quickstart")
    run("quickstart", here)
    return here / "runs" / "quickstart"


def test_the_quickstart_runs_and_its_cells_show_all_stages(trained):
    assert (trained / "report.html").exists() and (trained / "order.mp4").exists()


def test_the_chat_runs_in_int8(trained, tmp_path):
    run("chat", tmp_path, KANGAROO_MODEL=str(trained))
    assert (tmp_path / "runs" / "chat" / "int8").is_dir()


def test_the_fine_tune_runs_to_its_export(trained, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    run("finetune", tmp_path, KANGAROO_MODEL=str(trained))
    assert (tmp_path / "runs" / "finetune" / "export" / "config.json").exists()


def test_the_plan_runs(tmp_path):
    run("plan", tmp_path)
    assert len((tmp_path / "runs" / "plan" / "plans.jsonl").read_text().splitlines()) == 2
