"""The whole way at the smallest size: a table, a base with random weights, a run, an answer, an export."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.finetune import run as finetuning
from kangaroo_jax.inference.adapters import load_adapted
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.rehearsal import rehearse
from tests.finetune.test_finetune import clips, table, write_clip  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_micro_config, make_random_model) -> Path:
    folder, config = tmp_path_factory.mktemp("base"), make_micro_config()
    train_sentencepiece(["What way does it go?", "left right up"], folder / "tokenizer.model", vocab_size=290)
    params = abstract_model(ModelConfig.from_config(config.model)).flatten(make_random_model(config.model))
    step = folder / "checkpoints" / "1"
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "params", params)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(step / "config", args=ocp.args.JsonSave(config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def mine(tmp_path_factory, clips) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("mine")
    rows = [(str(clips / f"c{i}.mp4"), "What way does it go?", "left" if i % 2 else "right") for i in range(10)]
    return table(folder, *rows)


def run(*words: object, code: int = 0) -> None:
    assert cli.main(["finetune", *map(str, words)]) == code


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


def test_a_dry_run_says_what_it_needs_and_draws_the_first_batch(base, mine, tmp_path, capsys, one_device, monkeypatch):
    monkeypatch.setattr(finetuning, "rehearse", lambda stage, batch: (None, 6.0))
    run(f"--base={base}", f"--data={mine}", f"--workdir={tmp_path / 'run'}", "--dry-run", "--rank=4")
    told = capsys.readouterr().out
    for words in (
        "8 examples to learn from, 2 held out",
        "250 steps: ",
        "warning: without --replay the model forgets",
        "warning: 8 videos to learn from",
        "GiB of memory of",
        "GiB of disk of",
        "a step takes 6.00 s here: 250 take about 0:25:00",
        "--dry-run: nothing is trained",
    ):
        assert words in told, words
    assert (tmp_path / "run" / "first_batch.png").stat().st_size > 0
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank=0",), "--rank=0: an adapter has a rank of at least 1; --full trains the weights themselves"),
        (("--rank=4096",), "config.lora.rank is 4096, above the width of llm/layers/attention/key, 16"),
        (("--freeze=vision/.*",), "finetune: --freeze is for --full"),
        (("--columns=question=frage",), "--columns=question=frage means nothing here; there are video, question"),
        (("--columns=question",), "finetune: --columns=question: give WHAT=NAME"),
        (
            ("--config.train.epochs=2",),
            "finetune: --epochs counts passes over your examples; leave --config.train.epochs",
        ),
        (("--held-out=none.csv",), "none.csv: no such file or folder"),
    ],
)
def test_a_wrong_flag_is_one_line(words, message, base, mine, tmp_path, capsys, one_device):
    run(f"--base={base}", f"--data={mine}", f"--workdir={tmp_path / 'run'}", *words, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_full_disk_is_foreseen(base, mine, tmp_path, capsys, one_device, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
    run(f"--base={base}", f"--data={mine}", f"--workdir={tmp_path / 'run'}", "--rank=4", code=2)
    assert "GiB of disk, but 0.0 are free; make room, or give another --workdir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_learns_answers_and_is_no_base(base, mine, tmp_path, capsys, one_device, monkeypatch):
    steps = []
    monkeypatch.setattr(finetuning, "rehearse", lambda *args: steps.append(rehearse(*args)) or steps[0])
    workdir = tmp_path / "run"
    words = (f"--base={base}", f"--data={mine}", f"--workdir={workdir}", "--rank=4", "--config.train.steps=6")
    run(*words, "--config.eval.every=3", f"--replay={mine}")
    told = capsys.readouterr().out
    assert "half of the samples are replayed from" in told and "held-out loss" in told
    assert f"a step takes {steps[0][1]:.2f} s here" in told and steps[0][0]._cache_size() == 1  # compiled once
    for name in ("curves.png", "held_out/report.html", "held_out/results.json", "best", "data/train.jsonl"):
        assert (workdir / name).exists(), name
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval" in line for line in lines) == 2
    best = reading.find(workdir)
    assert best == (workdir / "best").resolve()
    loaded = load_adapted(workdir)
    assert loaded.folder == base / "checkpoints" / "1"
    assert np.abs(np.asarray(loaded.model.llm.layers[0].mlp.up.lora_b[...])).max() > 0
    assert loaded.model.llm.embedding[...].dtype == jnp.float32
    run(f"--base={workdir}", f"--data={mine}", f"--workdir={tmp_path / 'again'}", code=2)
    assert "is itself an adapter" in capsys.readouterr().err
