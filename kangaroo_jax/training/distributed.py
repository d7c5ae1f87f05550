"""Training on many hosts: how they find each other, and how each notices that another has died.

Every host runs the same program (JAX multi-controller). A host that dies leaves the others waiting in a collective. The
watchdog here ends that wait: every process writes a heartbeat to the coordinator's store every few seconds and reads
those of the others. If one is missing, this process stops with an error that names it, and the restart loop of the
launch scripts starts all of them again.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from kangaroo_jax.errors import EndsTogether, UserError, one_line
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.progress import Tell

LOST = 75  # exit code EX_TEMPFAIL of sysexits.h: try again
BEAT_SECONDS = 2.0
WAITING_SECONDS = 10.0  # seconds before a process prints that it waits for others
ADDRESS, COUNT, INDEX = "KANGAROO_COORDINATOR", "KANGAROO_PROCESSES", "KANGAROO_PROCESS_ID"
AUTO = "auto"  # value of COUNT: use what JAX detects (TPU pods and GKE, as the launch scripts start them)


def initialize(timeout: float = 300.0) -> int:
    """Join the other processes if the environment names some; returns the number of processes.

    The environment sets KANGAROO_COORDINATOR=host:port, KANGAROO_PROCESSES and KANGAROO_PROCESS_ID, or
    KANGAROO_PROCESSES=auto for what JAX detects (TPU pods, GKE). Slurm with several tasks needs no setting. Call it
    before anything touches a device. It waits `timeout` seconds for the others.

    Raises UserError if the addresses are incomplete or invalid. Where trying again may help (the others do not come,
    the coordinator's port is in use), the process ends with one line and code LOST.
    """
    if jax.distributed.is_initialized():
        return int(jax.process_count())
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    options: dict[str, Any] = {}
    where = "the launcher's coordinator"
    if given.get(COUNT) == AUTO:
        pass
    elif given:
        options = _addresses(given)
        where = given[ADDRESS]
    elif not _slurm_tasks():
        return 1
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _named_if_alone(where, options, timeout):
            # JAX's own detection of a lost process ends this process without a message, and JAX aborts after its own
            # wait for the others. So both of its timeouts are longer than ours.
            jax.distributed.initialize(
                initialization_timeout=int(timeout) + 60, heartbeat_timeout_seconds=600, **options
            )
    except (RuntimeError, ValueError) as error:
        text = one_line(error)
        if any(sign in text for sign in ("Failed to start RPC server", "ddress already in use", "DEADLINE_EXCEEDED")):
            _try_again(f"the processes did not come together at {where}: {text[:300]}")
        raise UserError(f"the processes did not come together at {where}: {text}") from None
    if not is_main():
        _name_a_lost_coordinator()
    return int(jax.process_count())


def _addresses(given: dict[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize`. Raises UserError; stops the process if the port is in use."""
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} without {', '.join(missing)}: set all three, or none")
    try:
        number, index = int(given[COUNT]), int(given[INDEX])
    except ValueError:
        raise UserError(f"{COUNT}={given[COUNT]} {INDEX}={given[INDEX]}: must be whole numbers") from None
    if not 0 <= index < number:
        raise UserError(f"{INDEX}={index}: must be from 0 to {number - 1}, since {COUNT}={number}")
    host, colon, port = given[ADDRESS].rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS}={given[ADDRESS]}: must be host:port, such as 10.0.0.2:8476")
    if index == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    _try_again(
                        f"port {port} of {given[ADDRESS]}, the coordinator, is in use here, perhaps by a run that is "
                        "still ending"
                    )
    return {"coordinator_address": given[ADDRESS], "num_processes": number, "process_id": index}


def _slurm_tasks() -> bool:
    """Whether srun started this process as one of several tasks. Raises UserError if Slurm's variables disagree."""
    value = os.environ.get("SLURM_NTASKS") or "1"
    if not value.isdigit():
        raise UserError(f"SLURM_NTASKS={value}: must be a whole number; unset it to train in this process alone")
    if int(value) < 2:
        return False
    step = os.environ.get("SLURM_STEP_NUM_TASKS", value)
    lacking = [name for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST") if not os.environ.get(name)]
    if lacking or step != value:
        why = f"{', '.join(lacking)} not set" if lacking else f"SLURM_STEP_NUM_TASKS={step}"
        raise UserError(
            f"SLURM_NTASKS={value}, but srun did not start this process as one of them ({why}): start it with srun, or "
            "unset SLURM_NTASKS to train in this process alone"
        )
    return True


@contextlib.contextmanager
def _named_if_alone(where: str, options: dict[str, Any], timeout: float) -> Iterator[None]:
    """While inside, print whom this process waits for, and stop it with code LOST if they don't come in `timeout` s."""
    arrived, began = threading.Event(), time.monotonic()
    index, number = options.get("process_id"), options.get("num_processes")
    me = f"process {index}" if index is not None else "this process"
    others = f"the other {number - 1} of {number} processes" if number else "the other processes"

    def watch() -> None:
        if arrived.wait(min(WAITING_SECONDS, timeout)):
            return
        print(f"kangaroo: {me} waits at {where} for {others}, at most {timeout:.0f} s", file=sys.stderr, flush=True)
        if arrived.wait(max(0.0, timeout - (time.monotonic() - began))):
            return
        silent = index not in (None, 0) and not _answers(where)
        why = f"nothing answers at {where}, process 0" if silent else f"{others} did not all come to {where}"
        _try_again(
            f"{me} stops: {why} within {timeout:.0f} s: see that each was started, with its own {INDEX}, and reaches it"
        )

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        arrived.set()
        thread.join()


def _joined() -> Any:
    """JAX's private state of the joined processes, with `client` and `coordinator_address`."""
    from jax._src import distributed

    return distributed.global_state


def _coordinator_answers() -> bool:
    return _answers(str(_joined().coordinator_address))


def _answers(address: str) -> bool:
    """Whether a process listens at host:port."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


_libc = ctypes.CDLL(None)
_libc.signal.restype, _libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_before: int | None = None  # the handler of SIGABRT before ours; None is the default


def _abort(number: int) -> None:
    _libc.alarm(15)  # ends the process if an abort for another reason makes this handler hang
    if not _coordinator_answers():
        stop_process("host 0, the coordinator, has died or cannot be reached")
    _libc.signal(number, _before)
    getattr(_libc, "raise")(number)  # delivered when this handler returns


_on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(_abort)


def _name_a_lost_coordinator() -> None:
    """Replace the abort of JAX's client when host 0 is gone by an error that names it, with code LOST.

    The client aborts within milliseconds of the loss, before the watchdog can see it, and its callback for this
    cannot be written in Python (its argument has no conversion). Other aborts are unchanged. Python's own `signal`
    would run its handler too late, when the process is gone. Call this again after a library that sets its own
    handlers (device drivers may).
    """
    global _before
    ours = ctypes.cast(_on_abort, ctypes.c_void_p).value
    before = _libc.signal(signal.SIGABRT, ours)
    _before = _before if before == ours else before


def is_main() -> bool:
    """Whether this is the main process, which writes the files that exist once."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float = 1800.0) -> None:
    """Wait until every process is here, at most `timeout` seconds; a name can be used once in a run.

    It uses the coordinator, not the devices: before their first collective, processes may be minutes apart, which
    would time out the collective itself. Raises UserError if the others do not come.
    """
    if jax.process_count() > 1:
        try:
            _joined().client.wait_at_barrier(f"kangaroo/{name}", int(1000 * timeout))
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"{name}: not every process came in {timeout:.0f} s: {str(error).splitlines()[0]}"
            ) from None


def key_value_set(key: str, value: str) -> None:
    """Store `value` under `key` in the coordinator's store, for every process."""
    _joined().client.key_value_set(f"kangaroo/{key}", value, allow_overwrite=True)


def key_value_get(key: str, stopped: Callable[[], bool]) -> str | None:
    """What any process stores under `key`, waited for; None once it is `stopped`, which is looked at twice a second."""
    while not stopped():
        try:
            value: str = _joined().client.blocking_key_value_get(f"kangaroo/{key}", 500)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        else:
            return value
    return None


def key_value_delete(key: str) -> None:
    """Forget what is stored under `key`."""
    _joined().client.key_value_delete(f"kangaroo/{key}")


def said_by_main(key: str, value: Callable[[], str], timeout: float) -> str:
    """The main process's `value`, made once, for every process; a key can be used once in a run."""
    if jax.process_count() == 1:
        return value()
    if is_main():
        key_value_set(key, value())
    said: str = _joined().client.blocking_key_value_get(f"kangaroo/{key}", int(1000 * timeout))
    return said


def key_value_keys(folder: str) -> set[str]:
    """The keys under `folder`, which ends in a slash, without this prefix."""
    return {key.rsplit("/", 1)[-1] for key, _ in _joined().client.key_value_dir_get(f"kangaroo/{folder}")}


class Preempted(EndsTogether, SystemExit):
    """The run was asked to stop and has saved; it ends with code 0, or 130 after Ctrl-C."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)


# ---------------------------------------------------------------------------------- watchdog


class Watchdog:
    """Exchanges heartbeats of all processes; stops this one when another's is missing, with an error that names it."""

    def __init__(self, *, timeout: float, tell: Tell = print, path: Path | None = None, stop: Any = None) -> None:
        """Start a thread, if there are several processes.

        Args:
            timeout: seconds without a heartbeat after which a process counts as lost.
            tell: prints a line.
            path: file in which the main process records every host's step and the age of its last step.
            stop: called with the error's line; the default prints it and ends the process with code LOST.
        """
        self._timeout, self._tell, self._path = timeout, tell, path
        self._stop = stop or stop_process
        self._step, self._step_time = 0, time.time()
        self._seen: dict[int, tuple[str, float]] = {}
        self._done = threading.Event()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        if jax.process_count() > 1:
            if not is_main():
                _name_a_lost_coordinator()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def step(self, step: int) -> None:
        """Record a finished step."""
        self._step, self._step_time = step, time.time()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """The run is over for this process: tell the others that it finished, or failed, so that they stop too."""
        if self._thread is not None:
            failed = error is not None and not isinstance(error, EndsTogether)
            self._finished.set()
            with contextlib.suppress(Exception):
                self._write(f"failed: {one_line(error)[:300]}" if failed else "finished")
            self._done.set()
            self._thread.join(timeout=5)
            self._thread = None

    def explain(self, error: Exception) -> None:
        """After an error that a lost process may have caused, wait until the watchdog names it and stops this process.

        Returns if every host is alive, so that the error is this process's own.
        """
        if self._thread is not None:
            self._tell(f"failed, looking whether a host is lost: {one_line(error)[:200]}")
            self._done.wait(self._timeout + 4 * BEAT_SECONDS)

    def _write(self, state: str = "") -> None:
        value = json.dumps({"beat": time.time(), "step": self._step, "step_time": self._step_time, "state": state})
        _joined().client.key_value_set(f"kangaroo/alive/{jax.process_index()}", value, allow_overwrite=True)

    def _run(self) -> None:
        failing_since: float | None = None
        begin = time.time()
        while not self._done.wait(BEAT_SECONDS):
            try:
                if not self._finished.is_set():
                    self._write()
                values = dict(_joined().client.key_value_dir_get("kangaroo/alive/"))
                failing_since = None
            except Exception:  # the coordinator's errors have no common class
                failing_since = failing_since or time.time()
                if time.time() - failing_since > self._timeout / 2:
                    self._stop("host 0, the coordinator, does not answer: it has died or cannot be reached")
                    return
                continue
            lost = self._look(values, begin)
            if lost:
                if is_main():  # the store ends with this process, and JAX aborts the others then: let them look first
                    time.sleep(3 * BEAT_SECONDS)
                self._stop(lost)
                return

    def _look(self, values: dict[str, str], begin: float) -> str:
        """The error's line if a process is lost, else ""."""
        now, hosts = time.time(), {}
        for index in range(jax.process_count()):
            value = next((v for k, v in values.items() if k.rsplit("/", 1)[-1] == str(index)), "")
            if value != self._seen.get(index, ("", 0.0))[0] or index not in self._seen:
                self._seen[index] = (value, now if value else begin)
            known: dict[str, Any] = json.loads(value) if value else {"step": 0, "step_time": begin, "state": ""}
            silent = now - self._seen[index][1]  # by this process's clock: others may differ
            hosts[index] = {"step": known["step"], "silent_seconds": round(silent, 1)}
            hosts[index]["last_step_seconds_ago"] = round(silent + known.get("beat", now) - known["step_time"], 1)
            if index != jax.process_index() and known["state"].startswith("failed"):
                return f"host {index} {known['state']}"
            if silent > self._timeout and known["state"] != "finished":
                return f"host {index} gave no sign of life for {silent:.0f} s (last at step {known['step']})"
        if self._path is not None and is_main():
            write_json(self._path, hosts)
        return ""


def stop_process(message: str) -> None:
    """End this process at once, even if its threads are blocked, with code LOST."""
    _try_again(f"host {jax.process_index()} stops: {message}")


def _try_again(line: str) -> None:
    """End this process at once with this line and code LOST."""
    print(f"kangaroo: {line}; start again to go on", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST)


@contextlib.contextmanager
def explained(watchdog: Watchdog) -> Iterator[None]:
    """While inside, a failure caused by a lost host (a collective, a save) ends the process with that host's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        watchdog.explain(error)
        raise
