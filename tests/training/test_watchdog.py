"""Many hosts, judged without any: a store of signs of life, a clock and what JAX says of processes are stood in for."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.training import distributed
from kangaroo_jax.training.distributed import (
    ADDRESS,
    COUNT,
    INDEX,
    LOST,
    Preempted,
    Watchdog,
    barrier,
    explained,
    initialize,
    is_main,
)
from kangaroo_jax.training.stopping import Preemption


class Store:
    """What JAX's coordinator keeps: values by key, and barriers."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.waited: list[tuple[str, int]] = []
        self.failing = False

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        if self.failing:
            raise RuntimeError("the coordinator is gone")
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        if self.failing:
            raise distributed.jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: somebody is late\nand more")
        self.waited.append((name, milliseconds))


@pytest.fixture
def two(monkeypatch) -> Store:
    """Two processes, of which this is the first, and a watchdog that looks every hundredth of a second."""
    store = Store()
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.jax, "process_index", lambda: 0)
    joined = types.SimpleNamespace(client=store, coordinator_address="127.0.0.1:1")
    monkeypatch.setattr(distributed, "_joined", lambda: joined)
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.01)
    return store


def sign(state: str = "", step: int = 1) -> str:
    return json.dumps({"beat": 0.0, "step": step, "step_time": 0.0, "state": state})


def alive(store: Store, index: int) -> dict:
    return json.loads(store.values[f"kangaroo/alive/{index}"])


def wait_until(condition) -> None:
    done = threading.Event()
    for _ in range(500):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("it did not come")


def test_signs_of_life_are_written_with_the_step_and_end_with_finished(two, tmp_path):
    beat = {"beat": 100.0, "step": 1, "step_time": 90.0, "state": "finished"}  # by the other's clock
    two.values["kangaroo/alive/1"] = json.dumps(beat)
    with Watchdog(timeout=30, path=tmp_path / "hosts.json") as watchdog:
        wait_until(lambda: "kangaroo/alive/0" in two.values)
        assert alive(two, 0)["step"] == 0
        watchdog.step(7)
        wait_until(lambda: alive(two, 0)["step"] == 7 and (tmp_path / "hosts.json").exists())
        assert alive(two, 0)["state"] == "" and alive(two, 0)["step_time"] > 0
    assert alive(two, 0)["state"] == "finished" and alive(two, 0)["step"] == 7
    hosts = json.loads((tmp_path / "hosts.json").read_text())
    assert sorted(hosts) == ["0", "1"] and 10 <= hosts["1"]["last_step_seconds_ago"] < 90


def test_no_sign_of_life_follows_the_last_word(two, monkeypatch):
    """The thread looks many times while the last word is under way to the store."""
    two.values["kangaroo/alive/1"] = sign("finished")
    write = two.key_value_set

    def slow(key, value, allow_overwrite=False):
        write(key, value, allow_overwrite)
        if "finished" in value:
            threading.Event().wait(0.1)

    with Watchdog(timeout=30):
        wait_until(lambda: "kangaroo/alive/0" in two.values)
        monkeypatch.setattr(two, "key_value_set", slow)
    assert alive(two, 0)["state"] == "finished"


@pytest.mark.parametrize(("error", "state"), [(OSError("disk\n full"), "failed: disk full"), (Preempted(), "finished")])
def test_others_are_told_of_a_failure_and_not_of_a_run_that_was_asked_to_stop(two, error, state):
    two.values["kangaroo/alive/1"] = sign("finished")
    with pytest.raises(type(error)), Watchdog(timeout=30):
        raise error
    assert alive(two, 0)["state"] == state


def test_a_host_that_failed_stops_this_one_and_host_0_lets_the_others_look_first(two, monkeypatch):
    stopped: list[str] = []
    naps: list[float] = []
    monkeypatch.setattr(distributed.time, "sleep", naps.append)
    two.values["kangaroo/alive/1"] = sign("failed: a disk is full")
    with Watchdog(timeout=30, stop=stopped.append):
        wait_until(lambda: stopped)
    assert stopped == ["host 1 failed: a disk is full"] and 3 * 0.01 in [pytest.approx(nap) for nap in naps]


def test_a_coordinator_that_does_not_answer_stops_this_process(two):
    stopped: list[str] = []
    two.failing = True
    with Watchdog(timeout=0.2, stop=stopped.append):
        wait_until(lambda: stopped)
    assert stopped == ["host 0, the coordinator, does not answer: it has died or cannot be reached"]


def test_a_coordinator_that_answers_again_is_forgiven(two):
    stopped: list[str] = []
    two.values["kangaroo/alive/1"] = sign("finished")
    two.failing = True
    with Watchdog(timeout=30, stop=stopped.append):
        threading.Event().wait(0.1)
        two.failing = False
        wait_until(lambda: "kangaroo/alive/0" in two.values)
    assert not stopped


def test_an_error_is_this_process_own_where_nobody_is_lost_and_bad_input_is_not_looked_into(two):
    two.values["kangaroo/alive/1"] = sign("finished")
    lines: list[str] = []
    with Watchdog(timeout=0.1, tell=lines.append) as watchdog:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="mine"), explained(watchdog):
            raise RuntimeError("mine\n alone")
        assert time.monotonic() - began >= 0.1 + 4 * 0.01  # in which a host that is lost would have been named
        assert lines == ["failed, looking whether a host is lost: mine alone"]
        with pytest.raises(UserError), explained(watchdog):
            raise UserError("a file is missing")
        assert len(lines) == 1


def test_one_process_has_no_watchdog_thread_and_no_barrier(monkeypatch):
    with Watchdog(timeout=0.01, tell=pytest.fail) as watchdog:
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        watchdog.explain(OSError("x"))
    barrier("nobody else")
    assert is_main()
    monkeypatch.setattr(distributed.jax, "process_index", lambda: 1)
    assert not is_main()


def test_a_barrier_waits_for_all_and_names_itself_where_they_do_not_come(two):
    barrier("stage begins", timeout=2.5)
    assert two.waited == [("kangaroo/stage begins", 2500)]
    two.failing = True
    with pytest.raises(
        UserError, match="stage ends: not every process came in 3 s: DEADLINE_EXCEEDED: somebody is late$"
    ):
        barrier("stage ends", timeout=3)


def test_a_signal_is_noticed_and_the_handler_before_it_comes_back():
    seen: list[int] = []
    handler = lambda number, frame: seen.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    try:
        preemption = Preemption()
        preemption.stepping()
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2) and not seen
        preemption.close()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_of_several_processes_jax_says_when_all_stop(two, monkeypatch):
    from jax.experimental import multihost_utils

    numbers: list[int] = []
    asked = lambda number: numbers.append(number) or len(numbers) == 3  # noqa: E731
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    before = signal.getsignal(signal.SIGTERM)
    first = Preemption()
    assert signal.getsignal(signal.SIGTERM) is before  # JAX's own handler stays
    assert not first.reached(1) and not first.reached(2)
    first.close()
    second = Preemption()  # of the next stage: JAX compares its steps with a number that the first may have led to
    assert [second.reached(step) for step in (1, 2)] == [True, True]
    second.close()
    assert [number - numbers[0] for number in numbers] == [0, 1, 2]
    assert Preempted().code == 0


@pytest.fixture
def joining(monkeypatch) -> list[dict]:
    """How JAX is asked to join the others, without doing so."""
    for name in (ADDRESS, COUNT, INDEX, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    asked: list[dict] = []
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: asked.append(options))
    return asked


BEATS = {
    "initialization_timeout": 20 + 60,  # ours ends the wait first
    "heartbeat_timeout_seconds": 600,
}


def test_given_addresses_are_those_that_are_joined(joining, monkeypatch):
    for name, value in ((ADDRESS, "10.0.0.1:99"), (COUNT, "4"), (INDEX, "3")):
        monkeypatch.setenv(name, value)
    assert initialize(timeout=20.5) == 1  # as many as JAX says
    assert joining == [BEATS | {"coordinator_address": "10.0.0.1:99", "num_processes": 4, "process_id": 3}]


@pytest.mark.parametrize(
    ("name", "value", "asks"),
    [
        (COUNT, "auto", True),
        ("SLURM_NTASKS", "4", True),
        ("SLURM_NTASKS", "1", False),
        ("SLURM_NTASKS", "", False),
    ],
)
def test_jax_looks_itself_where_it_is_told_to_or_slurm_has_several_tasks(joining, monkeypatch, name, value, asks):
    monkeypatch.setenv(name, value)
    for of_srun in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"):
        monkeypatch.setenv(of_srun, "1")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert initialize(timeout=20) == 1
    assert joining == ([BEATS] if asks else [])


def test_processes_that_have_come_together_are_not_asked_again(joining, monkeypatch):
    monkeypatch.setenv(COUNT, "auto")
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: True)
    assert initialize() == 1 and not joining


def test_processes_that_do_not_come_together_are_one_line(joining, monkeypatch):
    def fail(**options):
        raise RuntimeError("DEADLINE\n EXCEEDED")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fail)
    for name, value in ((ADDRESS, "10.0.0.1:99"), (COUNT, "4"), (INDEX, "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="did not come together at 10.0.0.1:99: DEADLINE EXCEEDED"):
        initialize()
    monkeypatch.delenv(ADDRESS), monkeypatch.delenv(INDEX)
    monkeypatch.setenv(COUNT, "auto")
    with pytest.raises(UserError, match="at the launcher's coordinator: DEADLINE"):
        initialize()


@pytest.mark.parametrize("listens", [True, False])
def test_a_process_that_waits_in_vain_says_whether_anything_answers(joining, listens, monkeypatch):
    lines, stopped = [], threading.Event()
    monkeypatch.setattr(distributed, "WAITING_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "_try_again", lambda line: (lines.append(line), stopped.set()))
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: stopped.wait(30))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        where = f"127.0.0.1:{other.getsockname()[1]}"
        for name, value in ((ADDRESS, where), (COUNT, "2"), (INDEX, "1")):
            monkeypatch.setenv(name, value)
        initialize(timeout=0.05)
    why = (
        f"the other 1 of 2 processes did not all come to {where}"
        if listens
        else f"nothing answers at {where}, process 0"
    )
    assert f"process 1 stops: {why} within" in lines[0]


def test_a_process_is_stopped_at_once_with_a_code_that_says_try_again():
    program = """
import threading
import time
from kangaroo_jax.training.distributed import stop_process
threading.Thread(target=threading.Event().wait).start()  # which would wait for ever
stop_process("host 2 is gone")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == LOST == 75
    assert done.stderr.endswith("kangaroo: host 0 stops: host 2 is gone; start again to go on\n")
