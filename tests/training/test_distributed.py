"""Real processes on this machine: they train as one, notice a death, go on with fewer, save when asked to stop."""

import collections
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training import distributed
from kangaroo_jax.training.distributed import ADDRESS, COUNT, INDEX, LOST, Watchdog, initialize
from kangaroo_jax.training.measuring import history as measured
from kangaroo_jax.training.metrics import read_metrics, read_samples
from tests.quick import quick_flags
from tests.training.test_measuring import quiz_of

pytestmark = pytest.mark.alone

SCRIPT = Path(__file__).with_name("processes.py")
ROUNDS = int(os.environ.get("KANGAROO_TEST_ROUNDS", "2"))  # kills of a host: 0, which coordinates, 1, 2, 3, 0, ...
SAVES = int(os.environ.get("KANGAROO_TEST_SAVES", "4"))  # kills during a save
STEPS = 40  # JAX looks for a SIGTERM once a second: steps enough for that to be in the midst of them
STOP_SECONDS = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    corpus: Path,
    workdir: Path,
    count: int,
    steps: int = STEPS,
    every: int = 4,
    quiz: Path | None = None,
    context: int = 0,
    spike: int = 0,
) -> list[subprocess.Popen]:
    """`count` processes of one training; their output goes to WORKDIR.N.log.

    With `context` they share its rows; with `spike` the last host's rows are spoilt in that step.
    """
    port, processes = free_port(), []
    workdir.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        flags = " ".join(quick_flags())  # on one device
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[2])}
        if count > 1:
            environment.update({ADDRESS: f"127.0.0.1:{port}", COUNT: str(count), INDEX: str(index)})
        command = [sys.executable, str(SCRIPT), str(corpus), str(workdir), str(steps), str(every)]
        command += [str(quiz or ""), str(context or ""), str(spike or "")]
        with open(f"{workdir}.{index}.log", "a") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    return processes


def output(workdir: Path, index: int) -> str:
    return Path(f"{workdir}.{index}.log").read_text()


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit codes; kills what still runs after `seconds`, whose code is then -9."""
    end = time.time() + seconds
    try:
        for process in processes:
            process.wait(timeout=max(0.1, end - time.time()))
    except subprocess.TimeoutExpired:
        pass
    for process in processes:
        if process.poll() is None:
            process.kill()
    return [process.wait() for process in processes]


def wait_for_step(workdir: Path, step: int, seconds: float = 400) -> None:
    """Until the log of the main process has a line of `step`."""
    end, path = time.time() + seconds, Path(f"{workdir}.0.log")
    while time.time() < end:
        if f" {step}/" in path.read_text().replace("  ", " ") if path.exists() else False:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after {seconds} s: {path.read_text()[-2000:]}")


def history(workdir: Path) -> tuple[dict[int, float], dict[int, collections.Counter]]:
    """Losses by step, and which samples all hosts together had in it."""
    losses, samples = {}, collections.defaultdict(collections.Counter)
    for path in sorted(workdir.glob("metrics*.jsonl")):
        for line in read_metrics(path):
            if path.name == "metrics.jsonl":
                assert line["step"] not in losses, "a step stands twice in the log"
                losses[line["step"]] = line["loss"]
    for path in sorted(workdir.glob("samples*.jsonl")):
        for step, ids in read_samples(path).items():
            samples[step].update(ids)
    return losses, samples


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """The folder of the training that one process did without interruption."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert wait(start(corpus, workdir, 1), 600) == [0], output(workdir, 0)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_killed_host_stops_all_and_two_hosts_go_on_where_four_were(corpus, alone, tmp_path, round_):
    random, workdir = np.random.default_rng(round_), tmp_path / "run"
    processes = start(corpus, workdir, 4)
    wait_for_step(workdir, int(random.integers(5, 10)))
    victim = round_ % 4
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.time()
    codes = wait(processes, STOP_SECONDS)
    assert time.time() - killed < STOP_SECONDS
    for index, code in enumerate(codes):
        if index != victim:
            assert code == LOST, (index, code, output(workdir, index)[-2000:])
            assert f"host {victim}" in output(workdir, index).splitlines()[-1], output(workdir, index)[-2000:]
    print(f"round {round_}: host {victim} killed, all stopped after {time.time() - killed:.1f} s")
    assert wait(start(corpus, workdir, 2), 600) == [0, 0], output(workdir, 0)[-3000:]
    (losses, samples), (expected, expected_samples) = history(workdir), history(alone)
    assert sorted(losses) == list(range(1, STEPS + 1)) and samples == expected_samples
    np.testing.assert_allclose(list(losses.values()), [expected[step] for step in losses], rtol=2e-5)


@pytest.fixture(scope="module")
def damaged(corpus, tmp_path_factory) -> Path:
    """The corpus with half of a video overwritten, and the end of another."""
    folder = shutil.copytree(corpus, tmp_path_factory.mktemp("damaged") / "corpus")
    for name, first, last in (("red_5s", 0.3, 0.8), ("blue_2s", 0.8, 1.0)):
        path = folder / f"{name}.mp4"
        data = bytearray(path.read_bytes())
        place = data.index(b"mdat")
        end = place + int.from_bytes(data[place - 4 : place], "big") - 4
        a, b = (int(place + 4 + share * (end - place - 4)) for share in (first, last))
        data[a:b] = bytes(b - a)
        path.write_bytes(data)
    return folder


@pytest.mark.slow
def test_hosts_of_the_same_rows_decode_a_part_each_and_train_as_one_alone(damaged, tmp_path):
    steps, single, workdir = 8, tmp_path / "single", tmp_path / "run"
    assert wait(start(damaged, single, 1, steps, 100, context=1), 600) == [0], output(single, 0)[-3000:]
    processes = start(damaged, workdir, 2, steps, context=2)
    wait_for_step(workdir, 5)
    processes[1].send_signal(signal.SIGKILL)
    assert wait(processes, STOP_SECONDS)[0] == LOST and "host 1" in output(workdir, 0).splitlines()[-1]
    assert wait(start(damaged, workdir, 2, steps, context=2), 600) == [0, 0], output(workdir, 0)[-3000:]
    for host in ("", ".1"):  # each has all rows
        found, expected = (
            read_metrics(folder / f"metrics{at}.jsonl") for folder, at in ((workdir, host), (single, ""))
        )
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for line, other in zip(found, expected, strict=True):
            assert line.get("samples") == other.get("samples") and line.get("frames") == other.get("frames")
            assert line.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=2e-5), line["step"]
            assert line.get("eval", {}) == pytest.approx(other.get("eval", {}), rel=2e-5)
        assert read_samples(workdir / f"samples{host}.jsonl") == read_samples(single / "samples.jsonl")
        lost = [
            {json.loads(line)["id"] for line in (folder / f"ledger{at}.jsonl").open()}
            for folder, at in ((workdir, host), (single, ""))
        ]
        assert lost[0] == lost[1] and "red_5s" in lost[1]
    decoded = [int(output(workdir, host).rsplit("decoded ", 1)[1].split()[0]) for host in range(2)]
    whole = int(output(single, 0).rsplit("decoded ", 1)[1].split()[0])
    print(f"frames decoded: {whole} by one process, from where it was killed {decoded} by two")
    assert max(decoded) < 0.75 * whole


@pytest.mark.slow
def test_a_spike_of_one_hosts_rows_is_passed_over_by_both(corpus, tmp_path):
    steps, spike, single, workdir = 12, 10, tmp_path / "single", tmp_path / "run"
    for folder, count in ((single, 1), (workdir, 2)):
        assert wait(start(corpus, folder, count, steps, 1, spike=spike), 600) == [0] * count, output(folder, 0)[-3000:]
    spoilt, held = [], []
    for host in range(2):
        lines = output(workdir, host).splitlines()
        spoilt += [line for line in lines if line.startswith("spoilt rows")]
        held.append([line.split()[1:] for line in lines if line.startswith("holds ")])
    assert spoilt == ["spoilt rows []", "spoilt rows [2, 3]"]
    assert held[0] == held[1], "both hosts have the same weights, moments and counts after every step"
    assert [(int(step), int(spikes)) for step, _, _, spikes in held[0]] == [
        (step, int(step >= spike)) for step in range(1, steps + 1)
    ]
    weights = {int(step): digest for step, digest, *_ in held[0]}
    assert weights[spike] == weights[spike - 1] and len({*weights.values()}) == steps - 1
    expected = read_metrics(single / "metrics.jsonl")
    for name in ("metrics.jsonl", "metrics.1.jsonl"):
        found = read_metrics(workdir / name)
        assert [line.get("spikes", 0) for line in found] == [line.get("spikes", 0) for line in expected]
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-3), key
    assert "is a spike: passed over" in output(workdir, 0)


@pytest.mark.slow
def test_hosts_measure_together_and_a_killed_run_chooses_as_one_host_alone(corpus, tmp_path):
    quiz = quiz_of(corpus, tmp_path / "quiz.jsonl")
    single, workdir = tmp_path / "single", tmp_path / "run"
    assert wait(start(corpus, single, 1, 12, 100, quiz), 600) == [0], output(single, 0)[-3000:]
    processes = start(corpus, workdir, 2, 12, 100, quiz)
    end = time.time() + 400
    while time.time() < end and not list(workdir.glob("eval/8/*.jsonl")):
        time.sleep(0.02)
    for process in processes:
        process.kill()
    wait(processes, 60)
    assert wait(start(corpus, workdir, 2, 12, 100, quiz), 600) == [0, 0], output(workdir, 0)[-3000:]
    found, expected = measured(workdir, 12), measured(single, 12)
    assert list(found) == list(expected) == [4, 8, 12]
    for step, scores in expected.items():
        assert found[step] == pytest.approx(scores, rel=1e-4), step
    other = [line["eval"] for line in read_metrics(workdir / "metrics.1.jsonl") if "eval" in line]
    assert other == list(found.values()), "both hosts have the same scores"
    assert (workdir / "best").readlink() == (single / "best").readlink()
    answered = [len(list(workdir.glob(f"eval/{step}/samples-*.jsonl"))) for step in found]
    assert answered == [2, 2, 2], "each host answered a part"


@pytest.mark.slow
def test_sigterm_to_one_host_saves_on_all_and_ends_with_code_0(corpus, alone, tmp_path):
    workdir = tmp_path / "run"
    processes = start(corpus, workdir, 2, every=1000)
    wait_for_step(workdir, 3)
    processes[1].send_signal(signal.SIGTERM)
    assert wait(processes, 120) == [0, 0], output(workdir, 0)[-3000:]
    assert "asked to stop; saved after step" in output(workdir, 0)
    hosts = json.loads((workdir / "hosts.json").read_text())
    assert sorted(hosts) == ["0", "1"] and all(host["step"] >= 0 for host in hosts.values())
    assert wait(start(corpus, workdir, 1), 600) == [0], output(workdir, 0)[-3000:]
    assert list(history(workdir)[0].values()) == pytest.approx(list(history(alone)[0].values()), rel=2e-5)


@pytest.mark.slow
def test_sigterm_to_a_single_process_saves_and_ends_with_code_0(corpus, tmp_path):
    workdir = tmp_path / "run"
    (process,) = start(corpus, workdir, 1, every=1000)
    wait_for_step(workdir, 2)
    process.send_signal(signal.SIGTERM)
    assert wait([process], 120) == [0], output(workdir, 0)
    saved = int(reading.find(workdir).name)
    assert 2 <= saved < STEPS, "it did not stop, but went on to the end"
    assert output(workdir, 0).rstrip().endswith(f"asked to stop; saved after step {saved}")


@pytest.mark.slow
def test_a_save_that_is_killed_is_never_taken_for_whole(corpus, alone, tmp_path):
    """Saving after every step, killed at random moments: what is found is whole, and its losses are the right ones."""
    random, workdir = np.random.default_rng(5), tmp_path / "run"
    for _ in range(SAVES):
        (process,) = start(corpus, workdir, 1, every=1)
        saves, end = workdir / "checkpoints", time.time() + 300
        seen = {path.name for path in saves.glob("*")} if saves.exists() else set()
        while process.poll() is None and time.time() < end:
            new = {path.name for path in saves.glob("*")} - seen if saves.exists() else set()
            if len(new) > 1:
                time.sleep(float(random.uniform(0, 0.3)))
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
        if saves.exists() and any(path.name.isdigit() for path in saves.iterdir()):
            folder = reading.find(workdir)
            assert reading.load_config(folder).stage == "stage4_instruct"
            binding = abstract_model(ModelConfig.from_config(reading.load_config(folder).model))
            assert all(np.isfinite(np.asarray(x)).all() for x in reading.load_params(folder, binding).values())
    assert wait(start(corpus, workdir, 1), 600) == [0], output(workdir, 0)[-3000:]
    (losses, samples), (expected, expected_samples) = history(workdir), history(alone)
    assert losses == expected and samples == expected_samples


@pytest.mark.parametrize("alive", [True, False])
def test_an_abort_is_named_only_where_the_coordinator_is_gone(alive):
    with socket.socket() as coordinator:
        coordinator.bind(("127.0.0.1", 0))
        if alive:
            coordinator.listen()
        program = f"""
import faulthandler, os
faulthandler.enable()
from jax._src import distributed as jax_distributed
from kangaroo_jax.training import distributed
jax_distributed.global_state.coordinator_address = "127.0.0.1:{coordinator.getsockname()[1]}"
distributed._name_a_lost_coordinator()
distributed._name_a_lost_coordinator()
os.abort()
"""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == (-signal.SIGABRT if alive else LOST), done.stderr
    assert ("host 0, the coordinator, has died or cannot be reached" in done.stderr) == (not alive)
    assert ("Fatal Python error: Aborted" in done.stderr) == alive  # the handler that was there before


def test_incomplete_addresses_are_one_line(monkeypatch):
    monkeypatch.setenv(ADDRESS, "127.0.0.1:1")
    with pytest.raises(UserError, match=f"without {COUNT}, {INDEX}"):
        initialize()
    monkeypatch.setenv(COUNT, "two")
    monkeypatch.setenv(INDEX, "0")
    with pytest.raises(UserError, match="whole numbers"):
        initialize()


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in (ADDRESS, COUNT, INDEX, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert initialize() == 1


class Clock:
    """A store of signs of life and a clock, for the watchdog's judgement."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(distributed.time, "time", lambda: self.now)
        monkeypatch.setattr(distributed.jax, "process_index", lambda: 0)

    def sign(self, step: int, state: str = "") -> str:
        return json.dumps({"beat": self.now, "step": step, "step_time": self.now, "state": state})


def test_the_watchdog_names_who_is_silent_or_failed_and_forgives_who_has_finished(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    watchdog = Watchdog(timeout=30, path=tmp_path / "hosts.json")
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    first = {"kangaroo/alive/0": clock.sign(3), "kangaroo/alive/1": clock.sign(3)}
    assert watchdog._look(first, clock.now) == ""
    clock.now += 20
    assert watchdog._look({**first, "kangaroo/alive/0": clock.sign(9)}, 0) == ""
    assert json.loads((tmp_path / "hosts.json").read_text())["1"]["silent_seconds"] == 20
    clock.now += 20
    assert "host 1 gave no sign of life for 40 s (last at step 3)" in watchdog._look(
        {**first, "kangaroo/alive/0": clock.sign(9)}, 0
    )
    failed = {"kangaroo/alive/0": clock.sign(9), "kangaroo/alive/1": clock.sign(4, "failed: a disk is full")}
    assert "host 1 failed: a disk is full" in watchdog._look(failed, 0)
    done = {"kangaroo/alive/0": clock.sign(9), "kangaroo/alive/1": clock.sign(12, "finished")}
    assert watchdog._look(done, 0) == ""
    clock.now += 100
    assert watchdog._look({**done, "kangaroo/alive/0": clock.sign(12)}, 0) == ""
