"""`kangaroo doctor`: what works passes, what is broken or missing is named, and nothing takes the doctor with it."""

import sys
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.doctor import checks, run
from kangaroo_jax.errors import UserError


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A distribution of this package's kind, with requirements that are given."""

    def install(*requirements: str, name: str = "pretend-kangaroo") -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        extras = sorted({line.rpartition("extra == ")[2].strip("'") for line in requirements if "extra" in line})
        lines = [f"Name: {name}", "Version: 1.0", *(f"Provides-Extra: {extra}" for extra in extras)]
        lines += [f"Requires-Dist: {line}" for line in requirements]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(run, "DISTRIBUTION", "pretend-kangaroo")
    return install


def test_requirements_that_are_not_met_are_named_by_extra(pretend):
    pretend("nested>=3; extra == 'deep'", "numpy; extra == 'other'", name="nested-one")
    pretend(
        "numpy>=1",
        "numpy>=99",
        "no-such-package>=2; python_version >= '3.0'",
        "no-such-package; python_version < '3.0'",
        "pillow; extra == 'met'",
        "absent-one; extra == 'lacking'",
        "nested-one[deep]; extra == 'through'",
        "nested-one[other]; extra == 'fine'",
    )
    assert dict(run.requirements()) == {
        "": ["numpy>=99", "no-such-package>=2"],
        "fine": [],
        "lacking": ["absent-one"],
        "met": [],
        "through": ["nested>=3"],
    }
    assert dict(run.requirements(["met"])) == {"met": []}
    with pytest.raises(UserError, match="no extra 'lackin' .did you mean 'lacking'"):
        run.check_extras(["lackin"])


def test_a_missing_requirement_is_wrong_and_a_missing_extra_is_not(pretend, monkeypatch):
    monkeypatch.setattr(run, "CHECKS", {})
    pretend("numpy", "absent-one; extra == 'lacking'")
    lines: list[str] = []
    assert run.examine(tell=lines.append)
    assert any(line.startswith("--") and "[lacking]" in line and "absent-one: pip install" in line for line in lines)
    assert run.examine(["lacking"], lines.append)


def test_a_core_requirement_that_is_missing_is_wrong(pretend, monkeypatch):
    monkeypatch.setattr(run, "CHECKS", {})
    pretend("numpy>=99")
    lines: list[str] = []
    assert not run.examine(tell=lines.append)
    assert lines[0].startswith("NO  packages") and "numpy>=99" in lines[0] and "something is wrong" in lines[-1]


def test_a_package_that_raises_or_kills_the_process_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "matplotlib.py").write_text("raise OSError('libfreetype.so.6:\\n  cannot open')\n")
    works, said = run.outcome("plots")
    assert not works and said.startswith("OSError: libfreetype.so.6: cannot open (")
    (tmp_path / "matplotlib.py").write_text("import os\nos.abort()\n")
    works, said = run.outcome("plots")
    assert not works and said.startswith("the process ended by signal 6")


def test_what_works_is_said_to_work():
    lines: list[str] = []
    assert run.examine(["nothing"], lines.append) and lines[-1].startswith("what is installed works")
    works, said = run.outcome("decoding")
    assert works and "FFmpeg" in said and "h264" in said


def test_a_self_test_that_is_not_done_is_ended(monkeypatch):
    monkeypatch.setattr(run, "LONGEST", 0.05)
    assert run.outcome("decoding") == (False, "was not done after 0.05 s")


def test_wrong_frames_are_found(tmp_path):
    clip = write_h264(tmp_path / "clip.mp4", [np.full((64, 64, 3), 40, np.uint8)] * 16, 4)
    with pytest.raises(RuntimeError, match="frames at"):
        checks.check_clip(clip)


@pytest.mark.slow
def test_everything_that_is_installed_here_works(capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # its virtual devices
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\nok  training" in out and "\nNO" not in out


def test_every_extra_of_a_self_test_is_one_of_the_package():
    declared = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    assert all(f'"{check.extra}": ' in declared for check in checks.CHECKS.values() if check.extra)
