"""A training that was cut off goes on with the weights, the optimiser, the data and the log of its last checkpoint."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.training.distributed import Preempted
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import read_metrics
from tests.training.test_loop import STEPS, small_stage

pytestmark = pytest.mark.usefixtures("one_device")

EVERY = 3


@pytest.fixture(scope="module")
def config(corpus):
    config = small_stage("stage4_instruct", corpus)
    config.train.update(checkpoint_every=EVERY, log_every=1, keep_checkpoints=3)
    return config


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory, one_device) -> Path:
    """The folder of a training that nothing interrupted, with its checkpoints after 3, 6 and 7."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(config, workdir, tell=lambda _: None)
    return workdir


@pytest.fixture
def cut_off(straight, tmp_path) -> Path:
    """The folder as a kill leaves it whose last whole checkpoint is that after step 3; its log goes on to the end."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for step in range(EVERY + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
    assert reading.find(workdir).name == str(EVERY)
    return workdir


def history(workdir: Path) -> list[tuple]:
    """What every step came to, in the order of the log."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "samples", "tokens", "frames")
    return [tuple(str(line[key]) for key in keys) for line in read_metrics(workdir / "metrics.jsonl")]


def test_what_was_cut_off_and_then_asked_to_stop_comes_out_bit_for_bit_as_if_nothing_had_been(
    config, straight, cut_off
):
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # what would end this process where nobody listens
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if f" {EVERY + 1}/{STEPS}" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Preempted) as stopped:
            train(config, cut_off, tell=tell)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"stage4_instruct: goes on after step {EVERY}" in lines
    saved = int(reading.find(cut_off).name)
    assert EVERY < saved < STEPS and lines[-1] == f"stage4_instruct: asked to stop; saved after step {saved}"
    assert stopped.value.code == 0 and history(cut_off) == history(straight)[:saved]
    train(config, cut_off, tell=lines.append)
    assert f"stage4_instruct: goes on after step {saved}" in lines
    assert [step[0] for step in history(straight)] == [str(step) for step in range(1, STEPS + 1)]
    assert history(cut_off) == history(straight)
