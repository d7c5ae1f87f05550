"""Many hosts: how they find each other, and how each notices that another has died.

Every host runs the same program (JAX multi-controller). A host that dies leaves the others waiting in a
collective; the watchdog here ends that wait: every process writes a sign of life to the coordinator's store
every few seconds and reads the others'. One that stays away stops this process with an error that names it,
and the restart loop of the launch scripts brings all back.
"""

import contextlib
import ctypes
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

from kangaroo_jax.conventions import UserError
from kangaroo_jax.whole_files import write_json

LOST = 75  # exit code (EX_TEMPFAIL of sysexits.h): try again
BEAT_SECONDS = 2.0
ADDRESS, COUNT, INDEX = "KANGAROO_COORDINATOR", "KANGAROO_PROCESSES", "KANGAROO_PROCESS_ID"
AUTO = "auto"  # of COUNT: whatever JAX detects (TPU pods and GKE, which the launch scripts start so)

Tell = Callable[[str], None]


def initialize(timeout: float = 300.0) -> int:
    """Join the other processes, where the environment says that there are some; returns how many there are.

    Given addresses: KANGAROO_COORDINATOR=host:port, KANGAROO_PROCESSES, KANGAROO_PROCESS_ID. What JAX detects,
    of TPU pods and GKE: KANGAROO_PROCESSES=auto. Under Slurm with several tasks nothing need be set. Call it
    before anything touches a device. `timeout` in seconds is how long to wait for the others.

    Raises UserError where the addresses are incomplete or the others do not come.
    """
    if jax.distributed.is_initialized():
        return jax.process_count()
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    options: dict[str, Any] = {}
    if given.get(COUNT) == AUTO or (not given and int(os.environ.get("SLURM_NTASKS") or 1) > 1):
        pass
    elif given:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
        if missing:
            raise UserError(f"{', '.join(given)} without {', '.join(missing)}: set all three, or none")
        try:
            number, index = int(given[COUNT]), int(given[INDEX])
        except ValueError:
            raise UserError(f"{COUNT}={given[COUNT]} {INDEX}={given[INDEX]}: must be whole numbers") from None
        options = dict(coordinator_address=given[ADDRESS], num_processes=number, process_id=index)
    else:
        return 1
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        # JAX's own detection of a lost process ends the process without a word: ours comes first.
        jax.distributed.initialize(initialization_timeout=int(timeout), heartbeat_timeout_seconds=600, **options)
    except (RuntimeError, ValueError) as error:
        where = given.get(ADDRESS, "the launcher's coordinator")
        raise UserError(f"the processes did not come together at {where}: {' '.join(str(error).split())}") from None
    if not is_main():
        _name_a_lost_coordinator()
    return jax.process_count()


def _joined() -> Any:
    """What JAX keeps of the processes that came together, which it shows to nobody: `client`, `coordinator_address`."""
    from jax._src import distributed

    return distributed.global_state


def _coordinator_answers() -> bool:
    host, port = str(_joined().coordinator_address).rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


_libc = ctypes.CDLL(None)
_libc.signal.restype, _libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
_before: int | None = None  # the handler of SIGABRT that was there before ours; None is the default


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    _libc.alarm(15)  # an abort for another reason may leave nothing here working: then this ends it
    if not _coordinator_answers():
        stop_process("host 0, the coordinator, has died or cannot be reached")
    _libc.signal(number, _before)
    getattr(_libc, "raise")(number)  # comes when this returns


def _name_a_lost_coordinator() -> None:
    """Let the end that JAX's client makes where host 0 is gone be ours: an error that names it, with code LOST.

    The client aborts within milliseconds of the loss, before the watchdog can see it, and the callback that it
    takes for this cannot be written in Python (its argument has no conversion). Any other abort stays what it was.
    Python's own `signal` would run its handler only when the process is gone. To be called again after a library
    that sets handlers of its own (as those that drive devices may).
    """
    global _before
    ours = ctypes.cast(_on_abort, ctypes.c_void_p).value
    before = _libc.signal(signal.SIGABRT, ours)
    _before = _before if before == ours else before


def is_main() -> bool:
    """Whether this is the process that writes what there is one of."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float = 1800.0) -> None:
    """Wait until every process is here, at most `timeout` seconds; a name serves once in a run.

    It asks the coordinator, no device: processes that are seconds or minutes apart, as they are before their
    first collective, would let the collective itself time out. Raises UserError where the others do not come.
    """
    if jax.process_count() > 1:
        try:
            _joined().client.wait_at_barrier(f"kangaroo/{name}", int(1000 * timeout))
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"{name}: not every process came in {timeout:.0f} s: {str(error).splitlines()[0]}"
            ) from None


# -------------------------------------------------------------------------------- preemption


class Preemption:
    """Whether somebody wants this run to end: SIGTERM, which clouds and Slurm send before they take a machine."""

    def __init__(self) -> None:
        """Listens from now on. Of several processes JAX listens, and lets all stop after the same step."""
        self._asked = False
        self._many = jax.process_count() > 1
        self._before: Any = None
        if not self._many and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to save after `step` and stop. To be asked by every process after every step."""
        if not self._many:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Listen no more."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class Preempted(SystemExit):
    """The run was asked to stop, has saved, and ends with code 0."""

    def __init__(self) -> None:
        super().__init__(0)


# ---------------------------------------------------------------------------------- watchdog


class Watchdog:
    """Signs of life of every process; stops this one, with an error that names it, when another gives none."""

    def __init__(self, *, timeout: float, tell: Tell = print, path: Path | None = None, stop: Any = None) -> None:
        """Starts a thread, where there are several processes.

        Args:
            timeout: seconds without a sign of life after which a process counts as lost.
            tell: prints a line.
            path: file in which the main process keeps every host's step and the age of its last step.
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
        """A step is done."""
        self._step, self._step_time = step, time.time()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """The run is over, for this process: its silence means nothing from now on, or the others must stop too."""
        if self._thread is not None:
            failed = error is not None and not isinstance(error, Preempted)
            self._finished.set()
            with contextlib.suppress(Exception):
                self._write(f"failed: {' '.join(str(error).split())[:300]}" if failed else "finished")
            self._done.set()
            self._thread.join(timeout=5)
            self._thread = None

    def explain(self, error: Exception) -> None:
        """Something failed, perhaps because a process is lost: then wait until it is named and this one stopped.

        Returns where every host is alive, so that the error is this process's own.
        """
        if self._thread is not None:
            self._tell(f"failed, looking whether a host is lost: {' '.join(str(error).split())[:200]}")
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
            except Exception:  # the coordinator's own errors have no common class
                failing_since = failing_since or time.time()
                if time.time() - failing_since > self._timeout / 2:
                    self._stop("host 0, the coordinator, does not answer: it has died or cannot be reached")
                    return
                continue
            lost = self._look(values, begin)
            if lost:
                if is_main():  # the store goes with this process, and JAX aborts who loses it: the others look first
                    time.sleep(3 * BEAT_SECONDS)
                self._stop(lost)
                return

    def _look(self, values: dict[str, str], begin: float) -> str:
        """The error's line where a process is lost, else ""."""
        now, hosts = time.time(), {}
        for index in range(jax.process_count()):
            value = next((v for k, v in values.items() if k.rsplit("/", 1)[-1] == str(index)), "")
            if value != self._seen.get(index, ("", 0.0))[0] or index not in self._seen:
                self._seen[index] = (value, now if value else begin)
            known: dict[str, Any] = json.loads(value) if value else {"step": 0, "step_time": begin, "state": ""}
            silent = now - self._seen[index][1]  # by our own clock: theirs may differ
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
    """End this process at once, whatever its threads wait for, with code LOST."""
    print(f"kangaroo: host {jax.process_index()} stops: {message}; start again to go on", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST)


@contextlib.contextmanager
def explained(watchdog: Watchdog) -> Iterator[None]:
    """Inside, what fails because a host is lost (a collective, a save) ends the process with the name of that host."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        watchdog.explain(error)
        raise
