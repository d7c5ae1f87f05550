"""The image and the lock files: what they install is what setup.py asks for. Docker itself is not needed."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
PYTHONS = ("3.11", "3.12")
LOCKS = {version: ROOT / "launch" / "locks" / f"cpu-py{version.replace('.', '')}.txt" for version in PYTHONS}
LOCKED = ("quickstart", "curation", "serve", "web")  # extras, with cuda and tpu in the locks of these names
EXTRAS = ("tpu", "curation,ray")  # of the images that launch/gke/train.sh and launch/gke/curate.yaml name


def instructions() -> list[tuple[str, str]]:
    """(instruction, what follows it) of each line of the Dockerfile."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def pins(lock: Path) -> dict[str, str]:
    """Package -> version of a lock file."""
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a line that pins nothing"
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def declared(monkeypatch) -> tuple[list[str], dict[str, list[str]]]:
    """What setup.py asks for: always, and by extra."""
    given: dict = {}
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "setup", raising=False)
    monkeypatch.chdir(ROOT)
    importlib.import_module("setup")
    monkeypatch.delitem(sys.modules, "setup")
    return given["install_requires"], given["extras_require"]


def test_the_image_copies_what_is_there_and_what_its_context_lets_in():
    kept = [line[1:] for line in (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    sources = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert sorted(sources) == sorted(kept) and len(sources) == 9
    assert not [name for name in sources if not (ROOT / name).exists()]


def test_the_image_copies_before_it_installs_all_that_setup_reads():
    order = [rest for word, rest in instructions() if word in ("COPY", "RUN")]
    (install,) = [i for i, rest in enumerate(order) if "pip install" in rest]
    copied = {name for rest in order[:install] for name in rest.split()[:-1]}
    assert copied >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "kangaroo_jax", "configs"}


@pytest.mark.parametrize(
    ("extras", "kind"), [("tpu", "tpu"), ("curation,ray", "cpu"), ("serve,cuda,web", "cuda"), ("serve,tpu", "tpu")]
)
def test_the_image_installs_from_the_lock_of_its_accelerator(extras, kind, tmp_path):
    (line,) = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    script = tmp_path / "run.sh"
    script.write_text('set -eu\npip() { printf "%s\\n" "$@"; }\nrm() { :; }\n' + line)
    environment = {"PATH": os.environ["PATH"], "EXTRAS": extras}
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, env=environment, check=True)
    words = done.stdout.splitlines()
    (version,) = re.findall(r"^FROM python:(3\.\d+)-slim$", DOCKERFILE.read_text(), re.M)
    lock = words[words.index("--constraint") + 1]
    assert ROOT / lock == LOCKS[version].with_name(LOCKS[version].name.replace("cpu", kind))
    assert words[-1] == f".[{extras}]" and any(lock in rest.split() for word, rest in instructions() if word == "COPY")


def test_the_shell_lines_of_the_image_are_shell(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(
        "#!/bin/sh\nset -eu\nEXTRAS=tpu\n" + "\n".join(rest for word, rest in instructions() if word == "RUN")
    )
    subprocess.run(["sh", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_image_runs_kangaroo_as_a_user_without_rights():
    last = dict(instructions())
    assert last["USER"] == "kangaroo" and last["ENTRYPOINT"] == '["kangaroo"]' and last["CMD"] == '["--help"]'
    assert "kangaroo = kangaroo_jax.__main__:main" in (ROOT / "setup.py").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "kangaroo_jax", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout
    for name in ("train.sh", "curate.yaml"):  # whose volumes that user writes
        assert "fsGroup: 1000" in (ROOT / "launch/gke" / name).read_text()
    assert "--uid 1000" in DOCKERFILE.read_text()


def test_the_image_is_made_with_extras_that_exist(monkeypatch):
    _, extras = declared(monkeypatch)
    named = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE.read_text())
    assert set(named) == set(EXTRAS) and {part for name in named for part in name.split(",")} <= set(extras)


@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.parametrize("kind", ["cpu", "cuda", "tpu"])
def test_a_lock_file_pins_what_setup_asks_for(kind, version, monkeypatch):
    requirements = pytest.importorskip("packaging.requirements")
    core, extras = declared(monkeypatch)
    found = pins(ROOT / "launch" / "locks" / f"{kind}-py{version.replace('.', '')}.txt")
    lines = [*core, *(line for extra in LOCKED for line in extras[extra]), *([] if kind == "cpu" else extras[kind])]
    for requirement in map(requirements.Requirement, lines):
        name = requirement.name.lower().replace("_", "-")
        if requirement.marker is None or requirement.marker.evaluate({"python_version": version}):
            assert name in found and requirement.specifier.contains(found[name], prereleases=True), str(requirement)
    assert ("libtpu" in found) == (kind == "tpu") and ("jax-cuda12-plugin" in found) == (kind == "cuda")
    assert found["jax"] == found["jaxlib"] == found.get("jax-cuda12-plugin", found["jax"])
    assert found == {**found, **{name: pin for name, pin in pins(LOCKS[version]).items() if name in found}}


def test_a_lock_file_says_how_it_is_made_and_from_nowhere():
    locks = sorted((ROOT / "launch" / "locks").glob("*.txt"))
    assert len(locks) == 6
    for lock in locks:
        text = lock.read_text(encoding="utf-8")
        assert text.splitlines()[1] == "#    launch/locks/make.sh" and os.access(lock.parent / "make.sh", os.X_OK)
        assert not re.search(r"://|index|find-links", text)


@pytest.mark.parametrize(("words", "code", "message"), [(["--help"], 0, "launch/locks"), (["gpu"], 2, "'gpu' is none")])
def test_the_script_of_the_locks_names_mistakes(words, code, message):
    done = subprocess.run([str(ROOT / "launch/locks/make.sh"), *words], capture_output=True, text=True)
    assert done.returncode == code and message in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("extras", EXTRAS)
def test_the_packages_of_an_image_go_together(extras):
    """Resolved as the image's pip does it, for its Python and a system of its age; needs uv and the network."""
    if not shutil.which("uv"):
        pytest.skip("uv is not installed")
    flags = [flag for extra in extras.split(",") for flag in ("--extra", extra)]
    lock = LOCKS["3.11"].with_name("tpu-py311.txt") if extras == "tpu" else LOCKS["3.11"]
    for_image = ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_31", f"--constraint={lock}"]
    command = ["uv", "pip", "compile", "setup.py", "--quiet", *flags, *for_image]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if re.search("fetch|connect|dns", done.stderr, re.I):
        pytest.skip("the registry cannot be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "jax==" in done.stdout and ("libtpu==" if extras == "tpu" else "ray==") in done.stdout


@pytest.mark.slow
def test_a_clean_install_from_the_lock_trains_and_answers():
    version = "{}.{}".format(*sys.version_info)
    if version not in LOCKS:
        pytest.skip(f"no lock file for Python {version}")
    environment = {**os.environ, "PYTHON": sys.executable, "CONSTRAINTS": str(LOCKS[version]), "XLA_FLAGS": ""}
    command = [str(ROOT / "launch" / "smoke.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if re.search("NewConnectionError|ConnectTimeout|Temporary failure in name resolution", done.stderr):
        pytest.skip("the registry cannot be reached")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"jax=={pins(LOCKS[version])['jax']} " in done.stdout and "works" in done.stdout
