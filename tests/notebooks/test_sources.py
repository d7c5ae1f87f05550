"""The notebooks of launch/colab: they agree with their sources, and what they call exists."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kangaroo_jax.errors import UserError
from tests.test_docs import CODE, check
from tests.test_pages import broken

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "colab"
NAMES = ("chat", "finetune", "plan", "quickstart")


def cells(name: str, kind: str) -> list[str]:
    """The cells of a notebook that are code, or markdown."""
    read = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == kind]


def commands(name: str) -> list[str]:
    """Every command of `kangaroo` in a notebook, an `x` where a variable is written."""
    found = []
    for cell in cells(name, "code"):
        lines = re.findall(r"^ *!(.+)$", cell.replace("\\\n", " "), re.M)
        found += [line.partition("|| ")[2] or line for line in lines]
        found += [
            " ".join(ast.literal_eval(f"[{words}]")) for words in re.findall(r'\[("kangaroo", [^]]+)\]', _plain(cell))
        ]
    for cell in cells(name, "markdown"):
        found += [block or inline for block, inline in CODE.findall(cell)]
    lines = [re.sub(r" >> .*", "", re.sub(r" \{SHORT\}", "", line)).replace("/launch/", "launch/") for line in found]
    return [re.sub(r"\{[^}]+\}", "x", line) for line in lines if line.startswith("kangaroo ")]


def _plain(cell: str) -> str:
    return cell.replace('f"', '"')


def test_every_notebook_is_here():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_makes(name):
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "launch" / "notebooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert made.notebook(FOLDER / f"{name}.py") == text, "run python launch/notebooks.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_first_what_it_needs(name):
    first = cells(name, "markdown")[0]
    for row in ("accelerator", "time", "disk", "after a disconnection"):
        assert f"\n| {row} | " in first, row
    assert not re.search(r'"outputs": \[\s*\{', (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_notebook_exist(name):
    found = commands(name)
    assert len(found) >= 2
    for command in found:
        check(command)


def test_a_command_of_a_notebook_that_does_not_exist_is_found(monkeypatch):
    monkeypatch.setattr(f"{__name__}.cells", lambda name, kind: ["!test -e x || kangaroo convert --form={X}"])
    with pytest.raises(UserError, match="--form"):
        check(commands("chat")[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_notebook_is_python_and_every_command_is_looked_at(name):
    for cell in cells(name, "code"):
        ast.parse(re.sub(r"^( *)!.+$", r"\1pass", cell.replace("\\\n", " "), flags=re.M))
        assert len(re.findall(r"^ *!", cell, re.M)) <= len(re.findall(r"^ *assert _exit_code", cell, re.M)), cell


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_notebook_lead_somewhere(name):
    assert broken(FOLDER / f"{name}.ipynb", "\n".join(cells(name, "markdown"))) == []


def install(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(FOLDER / "install.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")


def test_an_install_takes_the_lock_of_the_accelerator(tmp_path):
    done = install("quickstart,hub", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"-c launch/locks/(cpu|tpu|cuda)-py31[12]\.txt -e \S+\[quickstart,hub(,tpu|,cuda)?\]$", done.stdout
    )
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    seen = install("quickstart", "--dry-run", PATH=f"{tmp_path}:{os.environ['PATH']}").stdout
    assert "launch/locks/cuda-py3" in seen and seen.rstrip().endswith("[quickstart,cuda]")


@pytest.mark.parametrize(("words", "message"), [((), "say which extras"), (("--x",), "unknown flag --x")])
def test_an_install_without_sense_is_refused_in_one_line(words, message):
    done = install(*words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_install_script_is_shell():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", str(FOLDER / "install.sh")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
