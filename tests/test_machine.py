"""What is written of the machine and the versions of a run."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax

from kangaroo_jax import machine
from kangaroo_jax.cli import main as cli
from kangaroo_jax.system.memory import host_memory

ROOT = Path(__file__).parents[1]


def test_facts_are_those_of_this_process():
    found = machine.facts()
    assert json.loads(json.dumps(found)) == found
    assert (
        found["packages"]["jax"] == importlib.metadata.version("jax") and found["python"] == platform.python_version()
    )
    assert sum(found["devices"].values()) == jax.device_count() and found["processes"] == 1
    total, free = host_memory()
    assert 0 < free < total and abs(found["memory_gib"] - total / 2**30) < 0.1
    assert found["variables"]["JAX_PLATFORMS"] == "cpu"
    assert not {"HF_TOKEN", "PATH"} & set(found["variables"])


def test_a_commit_is_marked_where_files_differ(tmp_path):
    clone = tmp_path / "clone"
    (clone / "kangaroo_jax").mkdir(parents=True)
    (clone / "setup.py").touch()
    for name in ("__init__.py", "machine.py", "chips.py", "errors.py"):
        shutil.copy(ROOT / "kangaroo_jax" / name, clone / "kangaroo_jax")
    shutil.copytree(ROOT / "kangaroo_jax" / "system", clone / "kangaroo_jax" / "system")

    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *identity, *words], cwd=clone, check=True, capture_output=True, text=True).stdout

    def said() -> str:
        line = [sys.executable, "-c", "from kangaroo_jax import machine; print(machine.commit())"]
        return subprocess.run(line, cwd=clone, env={}, check=True, capture_output=True, text=True).stdout.strip()

    assert said() == ""
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "c")
    head = git("rev-parse", "--short", "HEAD").strip()
    assert said() == head
    (clone / "setup.py").write_text("# changed")
    assert said() == f"{head}+"


def test_info_prints_what_facts_has(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}" in printed and "x cpu" in printed and "GiB free here" in printed
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["jax"] == jax.__version__
