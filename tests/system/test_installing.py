"""The install line that messages and docs give works where it is given: no registry holds this package."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

from kangaroo_jax.system import installing
from kangaroo_jax.system.installing import install_line, requirements

ROOT = Path(__file__).parents[2]


def extras_of_setup() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    )
    assert isinstance(table, ast.Dict)
    return {ast.literal_eval(key) for key in table.keys if key is not None}


def test_in_a_clone_it_installs_the_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert install_line("curation", "ray") == "pip install -e '.[curation,ray]'"
    monkeypatch.chdir(tmp_path)
    assert install_line("convert") == f"pip install -e '{ROOT}[convert]'"


def test_installed_from_a_wheel_it_names_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(installing, "__file__", str(tmp_path / "site" / "kangaroo_jax" / "system" / "installing.py"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: DECLARED if name == "kangaroo-jax" else None)
    assert install_line("data") == "pip install pyarrow 'pillow>=12.3'"
    assert install_line("convert") == "pip install 'torch==2.13.0; python_version < \"3.14\"'"


def test_a_bare_copy_of_the_package_is_sent_to_a_clone(tmp_path, monkeypatch):
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installing, "__file__", str(tmp_path / "kangaroo_jax" / "system" / "installing.py"))
    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert install_line("data") == "pip install -e '.[data]'"


DECLARED = [
    "jax>=0.10",
    'pyarrow; extra == "data"',
    'pillow>=12.3; extra == "data"',
    'pyarrow; extra == "curation"',
    'torch==2.13.0; python_version < "3.14" and extra == "convert"',
]


def test_a_requirement_of_two_extras_is_named_once():
    assert requirements(DECLARED, ("data", "curation")) == ["pyarrow", "pillow>=12.3"]
    assert requirements(DECLARED, ("no-such-extra",)) == []


@pytest.mark.parametrize("folder", ["kangaroo_jax", "docs", "README.md", "configs", "launch"])
def test_no_text_sends_a_user_to_a_registry_for_this_package(folder):
    top = ROOT / folder
    for path in [top] if top.is_file() else [p for p in top.rglob("*") if p.suffix in (".py", ".md", ".sh", ".yaml")]:
        assert not re.search(r"pip install[^\n]*kangaroo[-_]jax\[", path.read_text(encoding="utf-8")), path


def test_every_extra_that_is_named_exists():
    known = extras_of_setup()
    for path in (ROOT / "kangaroo_jax").rglob("*.py"):
        for arguments in re.findall(r"install_line\((['\"][^)]*)\)", path.read_text(encoding="utf-8")):
            assert set(re.findall(r"['\"]([\w-]+)['\"]", arguments)) <= known, path
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for named in re.findall(r"pip install -e '\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= known, path
