"""What a step reports: lines of JSON in order, rates over a window, one line for people."""

import json
import os
import sys
import types

import pytest

from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.training import metrics
from kangaroo_jax.training.boards import TensorBoard, open_boards
from kangaroo_jax.training.metrics import MetricLog, SampleLog, StepLine, drop_after, number, read_metrics


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_every_step_is_a_line_with_the_seconds_since_the_one_before(tmp_path, clock):
    log = MetricLog(tmp_path, name="metrics.3.jsonl")
    for step, seconds in ((1, 2.5), (2, 0.25)):
        clock.now += seconds
        log.write(step, {"loss": 1.0 / step})
    expected = [{"step": 1, "loss": 1.0, "seconds": 2.5}, {"step": 2, "loss": 0.5, "seconds": 0.25}]
    assert read_metrics(tmp_path / "metrics.3.jsonl") == expected
    log.rewind(1)
    log.write(2, {"loss": 7.0})
    log.close()
    assert [line["loss"] for line in read_metrics(log.path)] == [1.0, 7.0]


def test_tensorboard_gets_every_number_at_its_step_and_is_closed(tmp_path, monkeypatch):
    """The package is stood in for: it need not be installed."""
    written: list = []
    made = types.SimpleNamespace
    writer = made(add_event=written.append, close=lambda: written.append("closed"))
    summary = made(Summary=lambda value: {v.tag: v.simple_value for v in value})
    summary.Summary.Value = lambda tag, simple_value: made(tag=tag, simple_value=simple_value)
    stand_ins = {
        "tensorboard.compat.proto": made(
            event_pb2=made(Event=lambda wall_time, summary, step=0: (step, summary)), summary_pb2=summary
        ),
        "tensorboard.summary.writer.event_file_writer": made(EventFileWriter=lambda folder: writer),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    log = MetricLog(tmp_path, boards=[TensorBoard(tmp_path)])
    for step in (41, 42):
        log.write(step, {"loss": 1.5, "why": "words are no scalars", "eval": {"loss": 2, "of": "words"}})
    assert [(step, set(values), values["loss"], values["eval/loss"]) for step, values in written] == [
        (41, {"loss", "seconds", "eval/loss"}, 1.5, 2),
        (42, {"loss", "seconds", "eval/loss"}, 1.5, 2),
    ]
    log.close()
    assert written[-1] == "closed"


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, **options) -> None:
        self.options, self.logged = options, []

    def log(self, values, step) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.logged.append("finished")


def test_weights_and_biases_gets_every_number_of_one_run(tmp_path, monkeypatch):
    """The package is stood in for: it need not be installed. A run that goes on has the same id."""
    runs: list[FakeRun] = []
    init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    stage = StageConfig().changed({"train.wandb": "mine", "stage": "refine"})
    for step in (1, 2):
        log = MetricLog(tmp_path, boards=open_boards(stage, tmp_path))
        log.write(step, {"loss": 0.5})
        log.close()
    one, two = runs
    assert one.options == two.options and one.options["project"] == "mine" and one.options["resume"] == "allow"
    assert one.options["config"]["stage"] == "refine" and one.options["dir"] == str(tmp_path)
    assert one.logged[0][0] == 1 and one.logged[0][1]["loss"] == 0.5 and one.logged[1] == "finished"
    assert open_boards(StageConfig(), tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "module"), [("wandb", "mine", "wandb"), ("tensorboard", True, "tensorboard.compat")]
)
def test_a_board_whose_package_is_missing_is_one_line(name, value, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"config.train.{name} needs the package {name}: pip install .*{name}"):
        open_boards(StageConfig().changed({f"train.{name}": value}), tmp_path)


def test_lines_after_a_step_are_dropped_and_that_step_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "x": [step]}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "x')
    drop_after(path, 2)
    assert path.read_text() == '{"step": 1, "x": [1]}\n{"step": 2, "x": [2]}\n'


@pytest.mark.parametrize(("size", "full"), [(2**26 - 100, False), (2**26, True)])
def test_a_log_of_samples_begins_anew_at_64_mib(tmp_path, size, full):
    path = tmp_path / "samples.jsonl"
    path.touch()
    os.truncate(path, size)  # a file of nothing: it takes no place
    log = SampleLog(tmp_path)
    log.write(1, ["a"])
    log.close()
    assert (tmp_path / "samples.jsonl.1").exists() == full and (path.stat().st_size == 0) == full


def test_strange_lines_are_passed_over_and_what_is_no_number_counts_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    strange = '[1]\n7\nx\n{"step": true}\n{"step": 1.5}\n{"step": 1}\n{"step": 2, "tokens": "x", "elapsed": NaN}\n'
    path.write_text(strange + '{"step": 3, "tokens": 5, "elapsed": 0.5}\n')
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [number(line, "tokens") for line in lines] == [0, 0, 5]
    assert [number(line, "elapsed") for line in lines] == [0, 0, 0.5]


VALUES = {"loss": 1.23456, "grad_norm": 0.5, "learning_rate": 2e-4}


def test_rates_are_of_the_window_and_of_a_chip(clock):
    lines: list[str] = []
    line = StepLine("stage9", 200, lines.append, chips=4)
    for _ in range(2):
        clock.now += 5
        line.add(tokens=600, frames=30, capacity=1000, wait=1.02345, frame_capacity=40, counts={"a/en": 3, "b/zh": 1})
    assert line.window() == (2, 10.0)
    rates = {"tokens_per_second_per_chip": 30.0, "frames_per_second_per_chip": 1.5, "data_wait": 0.2047}
    assert line.rates() == rates
    line.tell(20, VALUES, 3, {"mfu_causal": 0.4321, "mfu_full": 0.5})
    assert lines == [
        "stage9  20/200  loss 1.2346  grad 0.50  lr 2.0e-04  120 tok/s  6 frames/s  useful 60% frames 75%  "
        "a/en 75%  b/zh 25%  wait 20%  MFU 43.2% causal 50.0% full  skipped 3  ETA 0:15:00"
    ]
    clock.now += 2
    line.add(tokens=500, frames=0, capacity=1000, wait=0.0, counts={"a/en": 1})
    assert line.window() == (1, 2.0)
    line.tell(199, VALUES, 0)
    assert lines[1] == (
        "stage9 199/200  loss 1.2346  grad 0.50  lr 2.0e-04  250 tok/s  0 frames/s  useful 50%  wait 0%  ETA 0:00:02"
    )


def test_the_six_most_frequent_sources_are_shown(clock):
    lines: list[str] = []
    line = StepLine("s", 10, lines.append)
    clock.now += 1
    counts = {f"{name}/en": i for i, name in enumerate("abcdefgh", start=1)}
    line.add(tokens=1, frames=1, capacity=1, wait=0.0, counts=counts)
    assert line.rates() == {"tokens_per_second_per_chip": 1.0, "frames_per_second_per_chip": 1.0, "data_wait": 0.0}
    line.tell(1, VALUES, 0)
    assert "h/en 22%  g/en 19%  f/en 17%  e/en 14%  d/en 11%  c/en 8%  wait" in lines[0]
    line.tell(2, VALUES, 0)  # no time and no step since
    assert "0 tok/s" in lines[1]
