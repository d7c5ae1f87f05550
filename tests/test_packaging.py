"""The package as others get it: public names, a wheel with its configs, scripts that run in any shell."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kangaroo_jax

ROOT = Path(__file__).parent.parent
SCRIPTS = ["launch/quickstart.sh", "launch/test.sh", ".ci/run"]


def test_public_names():
    from kangaroo_jax.data.video import load_video
    from kangaroo_jax.inference.chat import Kangaroo

    assert kangaroo_jax.Kangaroo is Kangaroo and kangaroo_jax.load_video is load_video
    assert callable(kangaroo_jax.sample_frames)
    assert set(kangaroo_jax.__all__) <= set(dir(kangaroo_jax))
    with pytest.raises(AttributeError, match="has no attribute 'Kangeroo'"):
        _ = kangaroo_jax.Kangeroo


def test_training_and_chat_import_no_other_framework():
    modules = "kangaroo_jax.training.curriculum, kangaroo_jax.inference.chat, kangaroo_jax.tools.quickstart"
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


@pytest.mark.slow
def test_the_wheel_holds_the_configs_and_finds_them(tmp_path):
    """Built from a copy without the network, unpacked, and used from elsewhere."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "kangaroo_jax", "configs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("kangaroo_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "kangaroo_jax/configs/stage3_refine.py" in names and "kangaroo_jax/inference/chat.py" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]
    code = "from kangaroo_jax.config_files import find_config, load_config; print(find_config('stage3_refine'))"
    code += "; load_config('configs/stage3_refine.py:tiny')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert Path(done.stdout.strip()) == (tmp_path / "site/kangaroo_jax/configs/stage3_refine.py").resolve()
