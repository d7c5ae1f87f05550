"""How a run ends: a loss that is not finite, signals, the clock, a reader that is gone, a full disk."""

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.reading import NotFinite
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.stream import LoaderStats
from kangaroo_jax.errors import UserError
from kangaroo_jax.training import curriculum, loop, observe, saving, stopping
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.distributed import ADDRESS, COUNT, INDEX, LOST, Watchdog, initialize
from kangaroo_jax.training.host_rows import HostRows
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import MetricLog, SampleLog, StepLine, read_metrics, read_samples
from kangaroo_jax.training.observe import Observer
from kangaroo_jax.training.reporting import Pending, Reporter
from kangaroo_jax.training.saving import SaveClock
from kangaroo_jax.training.stopping import explained_disk, unbroken
from tests.training.test_distributed import free_port
from tests.training.test_loop import STEPS, small_stage

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def poison(monkeypatch):
    """`poison(4, 5)`: the weights of the fourth and fifth batches that go to the device are NaN."""

    def at(*numbers: int) -> None:
        put, seen = HostRows.put, iter(range(1, 1000))

        def planted(self, batch):
            bad = next(seen) in numbers
            return put(self, batch.replace(weights=batch.weights * np.float32("nan")) if bad else batch)

        monkeypatch.setattr(HostRows, "put", planted)

    return at


def test_a_nan_stops_the_run_and_is_skipped_on_purpose(corpus, tmp_path, poison):
    """Stop: code 2's error, the good checkpoints stay. Skip, in the same folder: the step changes nothing."""
    config = small_stage("stage4_instruct", corpus, **{"train.checkpoint_every": 2})
    poison(4)
    with pytest.raises(NotFinite, match=r"step 4: loss nan, gradient norm nan; samples '.*on_nonfinite=skip") as error:
        train(config, tmp_path, tell=lambda _: None)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    assert reading.find(tmp_path).name == "2"
    ids = read_samples(tmp_path / "samples.jsonl")[4]
    assert all(repr(name) in str(error.value) for name in ids[:8])

    config.train.on_nonfinite, config.train.checkpoint_every, config.train.keep_checkpoints = "skip", 1, 0
    poison(2)  # goes on after step 2
    lines: list[str] = []
    train(config, tmp_path, tell=lines.append)
    log = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert [log[step]["skipped_steps"] for step in range(1, 8)] == [0, 0, 0, 1, 1, 1, 1]
    assert np.isnan(log[4]["loss"]) and np.isfinite(log[5]["loss"]) and np.isfinite(log[6]["loss"])
    assert any("step 4: loss nan" in line and "skipped" in line and repr(ids[0]) in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == list("23567")


def test_no_checkpoint_replaces_another_while_steps_are_skipped(corpus, tmp_path, poison):
    """Weights may be finite and ruined: one that is due waits until a loss shows what they are worth."""
    settings = {"train.on_nonfinite": "skip", "train.checkpoint_every": 2, "train.keep_checkpoints": 1}
    config = small_stage("stage4_instruct", corpus, 4, **settings)
    poison(1, 4)
    with pytest.raises(NotFinite, match=r"step 4, the last, was skipped.*--config.train.steps=5 "):
        train(config, tmp_path, tell=lambda _: None)
    assert reading.find(tmp_path).name == "2"
    config.train.steps = STEPS
    poison(2, 4, 5)  # steps 4, 6 and 7
    with pytest.raises(NotFinite, match="step 7, the last"):
        train(config, tmp_path, tell=lambda _: None)
    assert reading.find(tmp_path).name == "5"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 4  # with the one before the checkpoint


def test_a_stop_waits_for_a_step_that_is_not_skipped(corpus, tmp_path, poison, monkeypatch):
    config = small_stage("stage4_instruct", corpus, **{"train.on_nonfinite": "skip"})
    monkeypatch.setattr(stopping.Preemption, "reached", lambda self, step: step >= 6)
    poison(4, 5)
    lines: list[str] = []
    with pytest.raises(SystemExit):
        train(config, tmp_path, tell=lines.append)
    assert reading.find(tmp_path).name == "6" and "saved after step 6" in lines[-1]


def test_too_many_skipped_steps_in_a_row_stop_the_run(corpus, tmp_path):
    changes = {"train.on_nonfinite": "skip", "train.nonfinite_in_a_row": 3}
    config = StageConfig.from_config(small_stage("stage4_instruct", corpus, **changes))
    reporter = Reporter(
        config,
        log=MetricLog(tmp_path),
        samples=SampleLog(tmp_path),
        line=StepLine("s", 9, print),
        observer=Observer(config, None, workdir=tmp_path, tell=print),
        tell=lambda _: None,
    )
    stats = LoaderStats(samples=1, tokens=5, frames=0, skipped=0, sample_ids=("a",))
    for step, loss in enumerate((np.nan, np.nan, 1.0, np.inf, np.nan), start=1):
        metrics = {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "target_weight": 3.0}
        reporter.report(Pending(step, metrics, stats, 0.0))
    with pytest.raises(NotFinite, match="step 6: .*, 3 such steps in a row; samples 'a'"):
        reporter.report(Pending(6, {**metrics, "loss": np.nan}, stats, 0.0))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped_steps"] == 5


def test_the_clock_of_several_processes_finds_the_same_steps(monkeypatch):
    """The first decides."""
    keys: set[str] = set()
    monkeypatch.setattr(saving.jax, "process_count", lambda: 2)
    monkeypatch.setattr(saving, "key_value_set", lambda key, value: keys.add(key.rsplit("/", 1)[-1]))
    monkeypatch.setattr(saving, "key_value_keys", lambda folder: keys)
    main, other = SaveClock(1e-9), SaveClock(1e-9)
    found: dict[str, list[int]] = {"main": [], "other": []}
    for step in range(1, 8):
        for name, clock in (("main", main), ("other", other)):  # the main process is never behind
            monkeypatch.setattr(saving, "is_main", lambda name=name: name == "main")
            if clock.due(step):
                found[name].append(step)
                clock.saved()
    assert found["main"] == found["other"] == [3, 6]


def test_a_preempted_run_saves_before_the_next_step_begins(corpus, tmp_path, monkeypatch):
    """The signal comes while the third step is under way: no fourth is begun. The clock has saved the first two."""
    config = small_stage("stage4_instruct", corpus, **{"train.checkpoint_every": 100, "train.keep_checkpoints": 0})
    config.train.checkpoint_minutes = 1e-9
    due = SaveClock.due
    monkeypatch.setattr(SaveClock, "due", lambda self, step: step < 3 and due(self, step))
    put, seen = HostRows.put, iter(range(1, 100))
    done: list[int] = []
    aside: list[float] = []
    met: list[str] = []
    shown: list[bool] = []
    took: list[float] = []
    step, save = Observer.step, Checkpoints.save
    monkeypatch.setattr(Watchdog, "step", lambda self, step: done.append(step))
    monkeypatch.setattr(Observer, "step", lambda self, *given: aside.append(given[2]) or step(self, *given))
    monkeypatch.setattr(loop, "barrier", met.append)

    def timed(self, *given):
        began = time.perf_counter()
        save(self, *given)
        took.append(time.perf_counter() - began)

    monkeypatch.setattr(Checkpoints, "save", timed)

    def third(self, batch):
        number = next(seen)
        if number == 1:
            shown.append((tmp_path / "first_batch.txt").exists())
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the thread that listens
        return put(self, batch)

    monkeypatch.setattr(HostRows, "put", third)
    lines: list[str] = []
    began = time.perf_counter()
    with pytest.raises(stopping.Preempted) as stopped:
        train(config, tmp_path, tell=lines.append)
    assert stopped.value.code == 0
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [1, 2, 3]
    assert "asked to stop; saved after step 3" in lines[-1]
    assert done == [1, 2, 3] and shown == [True]
    assert met == [f"stage4_instruct {what}" for what in ("opens", "begins", "is prepared")]
    assert aside[0] >= 0 and took[0] <= aside[1] < time.perf_counter() - began  # with the save after the first step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow  # it compiles a stage: 11 s
def test_a_signal_in_the_last_step_lets_no_stage_follow(corpus, tmp_path, monkeypatch):
    """The stage is done, to its last checkpoint; the next is begun when the command is run again."""
    put, begun = HostRows.put, []

    def last(self, batch):
        begun.append(batch)
        if len(begun) == STEPS:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # for the thread that listens
        return put(self, batch)

    monkeypatch.setattr(HostRows, "put", last)
    lines: list[str] = []

    def stages(*names: str) -> list[dict]:
        small = {name: small_stage(name, corpus) for name in names}
        return curriculum.run(
            "tiny",
            tmp_path,
            data=corpus,
            tokenizer=corpus / "tokenizer.model",
            stages=names,
            adjust=lambda name, config: config.update(small[name].to_dict() | {"init_from": config.init_from}),
            tell=lines.append,
        )

    with pytest.raises(stopping.Preempted) as stopped:
        stages("stage4_instruct", "stage5_long_video")
    assert stopped.value.code == 130 and len(begun) == STEPS and not (tmp_path / "stage5_long_video").exists()
    assert ": done in " in lines[-2]
    assert lines[-1] == f"stage4_instruct: asked to stop; saved after step {STEPS}, the last"
    assert stages("stage4_instruct")[0]["steps"] == len(begun) == STEPS


LISTENER = """
import hashlib, os, signal, sys, time
from kangaroo_jax.training.stopping import Preemption
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
preemption = Preemption(lambda line: print(line, flush=True))
phase = sys.argv[1]
if phase != "preparing":
    preemption.stepping()
if phase == "training":
    preemption.done()
print("ready", flush=True)
if phase == "training":
    while not preemption.reached(1):
        time.sleep(0.01)
    preemption.close()
    raise preemption.saved()
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)  # as a compilation: minutes without a line of Python
"""


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [
        ("compiling", signal.SIGINT, 130),
        ("preparing", signal.SIGTERM, 143),
        ("training", signal.SIGINT, 130),
        ("training", signal.SIGHUP, 0),
    ],
)
def test_signals_in_every_phase(phase, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, phase],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert ("interrupted" in err) == (phase != "training") and ("saving after" in out) == (phase == "training")


def test_a_reader_that_is_gone_ends_no_run(monkeypatch):
    heard: list[str] = []

    def tell(line: str) -> None:
        if len(heard) == 1:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        heard.append(line)

    monkeypatch.setattr(stopping.os, "dup2", lambda *_: None)
    told = unbroken(tell)
    for line in ("one", "two", "three"):
        told(line)
    assert heard == ["one"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: write failed [No space left on device]"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, error, line):
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=f"{line}.*the last whole checkpoint is that of step 12"),
        explained_disk(tmp_path),
    ):
        try:
            raise error
        except Exception as first:
            raise RuntimeError("a save failed") from first
    with pytest.raises(RuntimeError, match="something else"), explained_disk(tmp_path):
        raise RuntimeError("something else")


def test_what_threads_log_of_a_full_disk_does_not_stand_before_the_line(tmp_path, caplog):
    """Orbax's threads log an exception with its traceback and raise it in the thread that waits for them."""
    log = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, logger="absl"):
        with pytest.raises(UserError, match="the disk is full"), explained_disk(tmp_path):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                log.exception("save_finalize failed")
                log.warning("kept")
                raise RuntimeError("a save failed") from error
        log.error("later", exc_info=ValueError("seen"))
    assert [record.getMessage() for record in caplog.records] == ["kept", "later"]


def test_what_still_writes_when_a_save_has_failed_prints_nothing(tmp_path, monkeypatch):
    """tensorstore reports to the event loop of the save, which is closed, for as long as the process lives."""
    printed: list = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    before = sys.unraisablehook
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "something else"))
    with contextlib.suppress(KeyError), explained_disk(tmp_path):
        raise KeyError
    assert sys.unraisablehook is before
    with pytest.raises(UserError, match="the disk is full"), explained_disk(tmp_path):
        sys.unraisablehook(late)
        raise OSError(errno.ENOSPC, "No space left on device")
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert printed == [other]


def test_goodput_counts_steps_alone_and_earlier_processes(corpus, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(observe.time, "perf_counter", lambda: now[0])
    config = small_stage("stage4_instruct", corpus, 6)
    observer = Observer(
        StageConfig.from_config(config),
        None,
        workdir=tmp_path,
        tell=print,
        begin=990.0,
        before={"elapsed": 30, "stepping": 8},
    )

    class Step:
        def _cache_size(self) -> int:
            return 1

    for _ in range(5):
        now[0] += 0.5
        observer.step(1, Step(), 0.4)
    # 10 s of starting, one step that compiles and four of 0.1 s, after 30 s of which 8 went into steps
    assert observer.times() == {"elapsed": 42.5, "stepping": 8.4}
    assert observer.values(1, 1.0)["goodput"] == round(8.4 / 42.5, 4)


def test_samples_have_a_file_of_their_own_that_does_not_grow_for_ever(tmp_path):
    log = SampleLog(tmp_path, limit=400)
    for step in range(1, 101):
        log.write(step, [f"sample {step}"])
    found = read_samples(log.path)
    assert max(found) == 100 and 10 < len(found) < 40 and found[100] == ["sample 100"]
    log.rewind(90)
    log.write(91, ["again"])
    log.close()
    found = read_samples(log.path)
    assert (
        max(found) == 91 and found[91] == ["again"] and sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000
    )


# ------------------------------------------------------------------------------------ hosts


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({ADDRESS: "localhost", COUNT: "2", INDEX: "0"}, "KANGAROO_COORDINATOR=localhost: must be host:port"),
        ({ADDRESS: "h:1x", COUNT: "2", INDEX: "0"}, "must be host:port"),
        ({ADDRESS: "h:1", COUNT: "2", INDEX: "2"}, "KANGAROO_PROCESS_ID=2: must be from 0 to 1"),
        ({"SLURM_NTASKS": "4x2"}, "SLURM_NTASKS=4x2: must be a whole number"),
        ({"SLURM_NTASKS": "4"}, "srun did not start this process .*SLURM_JOB_ID, .* unset SLURM_NTASKS"),
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}
            | {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"},
            "SLURM_STEP_NUM_TASKS=1",
        ),
    ],
)
def test_an_environment_that_means_nothing_is_one_line(monkeypatch, environment, message):
    for name in (ADDRESS, COUNT, INDEX, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        initialize()


@pytest.mark.parametrize("taken", [True, False])
def test_a_taken_port_and_hosts_that_do_not_come_are_one_line_and_tried_again(taken):
    program = textwrap.dedent("""
        from kangaroo_jax.training import distributed
        distributed.WAITING_SECONDS = 0.2
        distributed.initialize(timeout=2)
    """)
    port = free_port()

    with socket.socket() as other:
        if taken:
            other.bind(("", port))
            other.listen()
        names = {ADDRESS: f"127.0.0.1:{port}", COUNT: "3", INDEX: "0", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **names}, timeout=60
        )
    assert done.returncode == LOST, done.stderr
    assert "Traceback" not in done.stderr
    line = (
        f"port {port} of 127.0.0.1:{port}, the coordinator, is in use" if taken else "stops: the other 2 of 3 processes"
    )
    assert line in done.stderr.splitlines()[-1]
    assert taken or f"process 0 waits at 127.0.0.1:{port} for the other 2 of 3" in done.stderr
