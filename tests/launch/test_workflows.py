"""The workflows: what they run exists, with the Pythons and releases of JAX that setup.py allows."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
STEPS = [(name, step) for name, flow in WORKFLOWS.items() for job in flow["jobs"].values() for step in job["steps"]]
VERSIONS = WORKFLOWS["versions"]["jobs"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_whole(name):
    flow = WORKFLOWS[name]
    assert flow["permissions"] == {"contents": "read"} and flow[True]  # yaml reads `on` as a truth
    for job in flow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 180
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) if "uses" in step else step["run"]
            named = re.findall(r"matrix\.(\w+)", str(step))
            assert set(named) <= set(job.get("strategy", {}).get("matrix", {})), step


def test_the_scripts_and_flags_of_the_workflows_exist(pytestconfig):
    scripts = set()
    for _, step in STEPS:
        for word in shlex.split(step.get("run", ""), comments=True):
            if word.startswith(("./", ".ci/")):
                scripts.add(word.removeprefix("./"))
                assert (ROOT / word).stat().st_mode & 0o111, word
    assert scripts == {".ci/run", "launch/test.sh", "launch/smoke.sh"}
    (nightly,) = [step["run"] for _, step in STEPS if "--nightly" in step.get("run", "")]
    for flag in shlex.split(nightly)[1:]:
        pytestconfig.getoption(flag)  # which raises for one that there is not


def test_the_matrix_is_what_setup_allows():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    low, high = re.findall(r'"jax>=0\.(\d+),<0\.(\d+)"', text)[0]
    matrix = VERSIONS["matrix"]["strategy"]["matrix"]
    assert matrix["jax"] == [f"0.{minor}" for minor in range(int(low), int(high))]
    assert matrix["python"] == ["3.11", "3.12"] == VERSIONS["nightly"]["strategy"]["matrix"]["python"]
    assert matrix["exclude"] == [{"python": "3.11", "jax": jax} for jax in ("0.11", "0.12")]


def test_every_lock_that_a_workflow_tries_is_there():
    (step,) = [step for step in VERSIONS["locks"]["steps"] if "CONSTRAINTS" in step.get("run", "")]
    for version in VERSIONS["locks"]["strategy"]["matrix"]["python"]:
        line = f"PYTHON_VERSION={version}; {step['run']}".replace("./launch/smoke.sh", "bash -c 'echo $CONSTRAINTS'")
        lock = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.strip()
        assert (ROOT / lock).exists() and lock == f"launch/locks/cpu-py{version.replace('.', '')}.txt"
