"""The command line: how it starts, and what it passes on."""

import os
import subprocess
import sys

import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.cli.evaluator import evaluator
from kangaroo_jax.planning.here import explained_memory
from kangaroo_jax.training import curriculum, loop
from tests.cli.running import ROOT, TRAIN, run


@pytest.fixture
def trained(monkeypatch) -> list:
    """Catches the configs that would be trained."""
    configs: list = []
    monkeypatch.setattr(loop, "train", lambda config, workdir, **_: configs.append((config, workdir)))
    return configs


def test_module_is_the_same_command(capsys):
    command = [sys.executable, "-m", "kangaroo_jax", "trian"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert run(capsys, "trian") == (2, "", done.stderr)
    assert "did you mean 'train'?" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library of Linux")
@pytest.mark.parametrize(
    ("given", "job", "seen"),
    [
        ("", "train", ["", "glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.check=0", "train", ["glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.hugetlb=0", "train", ["glibc.malloc.hugetlb=0"]),
        ("", "trian", [""]),
    ],
)
def test_a_job_that_computes_begins_anew_with_huge_pages_as_the_same_process(given, job, seen):
    code = (
        "import os, sys; print(os.getpid(), os.environ['GLIBC_TUNABLES'], flush=True); "
        "from kangaroo_jax.cli import main as cli; sys.exit(cli.start())"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": given}
    with subprocess.Popen(
        [sys.executable, "-c", code, job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        out, error = process.communicate(timeout=120)
    assert out == "".join(f"{process.pid} {tunables}\n" for tunables in seen)
    assert process.returncode == 2 and error.count("\n") == 1


def test_a_table_of_the_docs_is_found_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "plan", "--table=docs/plan_compiled.jsonl")
    assert code == 0 and out.startswith("|")
    assert run(capsys, "plan", "--table=docs/none.jsonl")[0] == 2


def test_a_row_is_benched_for_the_stages_whose_samples_it_holds(capsys):
    assert run(capsys, "bench", "packing", "--row=20480x144", "--samples=50")[0] == 0
    config = [
        "bench",
        "packing",
        "--config",
        "stage4_instruct:kangaroo_8b",
        "--row=20480x144",
        "--samples=50",
        "--json",
    ]
    assert run(capsys, *config)[0] == 0


def test_train_passes_its_config_on(capsys, tmp_path, trained):
    changes = [
        "--config.optimizer.learning_rate=1e-3",
        "--config.train.mesh=1,1,1,1",
        "--config.data.train=b.jsonl",
        "--config.data.train=a.jsonl",
        "--config.train.steps=7",
        "--config.train.steps",
        "9",
        "--config.optimizer.trainable=(('.*', 1.0),)",
        "--config.optimizer.trainable=(('vision/.*', 0.5), ('.*', None))",
        "--config.train.tensorboard",
        "--config.data.fps",
        "2",
    ]
    assert run(capsys, *TRAIN, f"--workdir={tmp_path / 'new'}", "--strict", *changes)[0] == 0
    ((config, workdir),) = trained
    assert workdir == tmp_path / "new" and workdir.is_dir()
    assert config.stage == "stage3_refine" and config.model.preset == "tiny" and config.data.strict
    assert config.optimizer.learning_rate == 1e-3 and config.data.train == ("a.jsonl",)
    assert config.train.steps == 9 and config.optimizer.trainable == (("vision/.*", 0.5), (".*", None))
    assert config.train.mesh == (1, 1, 1, 1) and config.train.tensorboard and config.data.fps == 2.0


def test_curriculum_passes_its_arguments_on(capsys, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setattr(curriculum, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    command = ["curriculum", "--preset=base_100m", f"--workdir={tmp_path}", "--data=D", "--tokenizer=T"]
    assert run(capsys, *command, "--config.train.steps=7", "--config.seed=3")[0] == 0
    overrides = {"train.steps": 7, "seed": 3}
    given = {"data": "D", "tokenizer": "T", "overrides": overrides}
    given |= {"evaluator": evaluator, "explained": explained_memory}
    assert calls == [(("base_100m", tmp_path), given)]


def test_a_command_of_a_notebook_draws_without_the_notebooks_backend(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert cli.main(["--version"]) == 0
    assert os.environ["MPLBACKEND"] == "agg"
