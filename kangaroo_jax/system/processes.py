"""Processes that may be lost: to a crash, to a file that takes too long, or to one that takes all memory.

What a library does to a file costs the job of that file only. The processes are fresh Pythons, not multiprocessing's:
they import nothing of the program that starts them (its main module included), and a fork of threads may hang. They
end with it, whatever becomes of it.
"""

import collections
import contextlib
import functools
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.children import end_with_parent, uninterrupted
from kangaroo_jax.system.terminal import warner

_START_SECONDS = 300.0
_POLL = 0.05  # seconds between looks at the memory of processes
_IN_BAND = 1 << 16  # bytes below which an array is pickled with what holds it
_SHARED = 1 << 22  # bytes from which an array gets memory of its own; a process may have 65,530 such mappings
_PIECE = 1 << 24  # bytes sent at a time
_CODE = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from kangaroo_jax.system.processes import serve
serve(connection, int(sys.argv[2]))
"""


class NoStart(UserError):
    """Processes do not start here, whatever the job."""


class Lost(Exception):
    """Why a job has no outcome: one line that is the same each time. `exit_code` where the process ended by itself."""

    def __init__(self, reason: str, exit_code: int | None = None) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class WorkerPool:
    """Processes that do one kind of job; a thread hands the jobs out and watches clock and memory.

    A job on which a process is lost ends so, and a new process takes the place of the old one.
    """

    def __init__(
        self,
        job: Callable[..., Any],
        count: int,
        time_limit: float,
        *,
        prepare: Callable[[], object] | None = None,
        lost: Callable[..., Any] | None = None,
        memory_mib: float = float("inf"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`count` processes, which start at the first job.

        Args:
            job: what they do; a function of a module, or a `functools.partial` of one. It returns errors: what it
                raises ends the process.
            count: how many.
            time_limit: seconds for one job.
            prepare: called in each process before its first job.
            lost: gives the outcome of a job whose process is lost, of the Lost and the job's arguments; by default the
                Lost is raised.
            memory_mib: resident memory of one process, looked at now and then.
            environment: variables for the processes where the program has none of that name.
        """
        self._start = functools.partial(_Worker, job, prepare, environment or {})
        self._count, self._time_limit, self._memory, self._lost = count, time_limit, memory_mib, lost
        self._queue: collections.deque[tuple[Future[Any], tuple[Any, ...]]] = collections.deque()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._thread: threading.Thread | None = None
        self._bell, self._ring = multiprocessing.Pipe(duplex=False)
        self._closed = False
        self.replaced = 0  # processes that crashed, took too long or needed too much
        self._error: Exception | None = None

    def submit(self, *arguments: Any) -> "Future[Any]":
        """The outcome to come of `job(*arguments)`: it raises Lost or NoStart, or is cancelled by `close`.

        Raises NoStart where an earlier job found so, CancelledError where the pool is closed.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise self._error or CancelledError("the worker pool is closed")
            if self._thread is None:  # the processes are this thread's: Linux ends them with it
                self._thread = threading.Thread(target=self._run, daemon=True, name="kangaroo-workers")
                self._thread.start()
            self._queue.append((future, arguments))
            alone = len(self._queue) == 1
        if alone:  # else no worker is idle, or the bell has rung
            self._ring.send_bytes(b"!")
        return future

    def close(self) -> None:
        """End the processes, even in the middle of a job; jobs that are not done are cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ring.send_bytes(b"!")
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        error = None
        try:
            for _ in range(self._count):
                self._workers.append(self._start())
            while not self._closed:
                self._hand_out()
                self._watch()
        except Exception as reason:
            error = NoStart(f"no process can be started ({reason})") if isinstance(reason, OSError) else reason
        self._end(error)

    def _hand_out(self) -> None:
        for place, worker in enumerate(self._workers):
            if worker.ready and worker.job is None:
                if worker.connection.poll():  # an idle process says nothing: this one was ended, and by no job
                    worker.stop()
                    self.replaced += 1
                    self._workers[place] = self._start()
                    continue
                job = self._next_job()
                if job is None:
                    return
                worker.begin(job, self._time_limit)

    def _next_job(self) -> "tuple[Future[Any], tuple[Any, ...]] | None":
        """The first job in the queue that was not cancelled meanwhile."""
        with self._lock:
            while self._queue:
                job = self._queue.popleft()
                if not job[0].cancelled():
                    return job
        return None

    def _watch(self) -> None:
        """Wait for something to happen, and see to it."""
        watched = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        patience = min((worker.deadline for worker in watched), default=float("inf")) - time.monotonic()
        patience = min(patience, 3600.0 if self._memory == float("inf") or not watched else _POLL)
        ready = wait([self._bell, *(worker.connection for worker in watched)], timeout=max(0.0, patience))
        if self._bell in ready:
            self._bell.recv_bytes()
        for worker in watched:
            lost: Lost | None = None
            if worker.connection.poll():
                try:
                    worker.receive()
                except (EOFError, OSError, RuntimeError):  # the last where a file descriptor should come and does not
                    lost = worker.died()
            elif time.monotonic() >= worker.deadline:
                lost = Lost(f"took more than {worker.seconds:g} s")
            elif _resident_mib(worker.pid) > self._memory:
                lost = too_much(self._memory)
            if lost is not None:
                self._replace(worker, lost)

    def _replace(self, worker: "_Worker", lost: Lost) -> None:
        worker.stop()
        self.replaced += 1
        if not worker.ready:
            raise NoStart(f"a process ended as it started ({lost}); see the lines above")
        assert worker.job is not None
        (future, arguments), worker.job = worker.job, None
        with contextlib.suppress(InvalidStateError):  # it was cancelled while a worker was at it
            if self._lost is None:
                future.set_exception(lost)
            else:
                future.set_result(self._lost(lost, *arguments))
        self._workers[self._workers.index(worker)] = self._start()

    def _end(self, error: Exception | None) -> None:
        """End everything; jobs that are not done get the error, or are cancelled."""
        with self._lock:
            self._closed, self._error = True, error
            left = [*self._queue, *(worker.job for worker in self._workers if worker.job is not None)]
        for worker in self._workers:
            worker.stop()
        for future, _ in left:
            if error is None:
                future.cancel()
            else:
                with contextlib.suppress(InvalidStateError):  # of one that was cancelled
                    future.set_exception(error)


def too_much(mib: float) -> Lost:
    """The reason of a job that needed more than so much memory."""
    return Lost(f"needed more than {mib:g} MiB of memory")


class _Worker:
    """A process and the job that it is at, None while idle."""

    def __init__(
        self, job: Callable[..., Any], prepare: Callable[[], object] | None, environment: Mapping[str, str]
    ) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs, uninterrupted():
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**environment, **os.environ},
            )
        self.pid = self._process.pid
        self.job: tuple[Future[Any], tuple[Any, ...]] | None = None
        self.ready = False  # it has said so: seconds that are not the first file's fault
        self._has(_START_SECONDS)
        self._send(sys.path)
        self._send((job, prepare))

    def _send(self, value: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead: `receive` finds its end of the pipe closed
            self.connection.send(value)

    def _has(self, seconds: float) -> None:
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def begin(self, job: tuple[Future[Any], tuple[Any, ...]], seconds: float) -> None:
        self.job = job
        self._has(seconds)
        self._send(job[1])

    def receive(self) -> None:
        """Take what it says: that it is ready, or the outcome of its job. Raises EOFError or OSError if it died."""
        outcome = _receive(self.connection)
        self.ready = True
        if self.job is not None:
            (future, _), self.job = self.job, None
            with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
                future.set_result(outcome)

    def died(self) -> Lost:
        """How it ended."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return Lost("was ended", -signal.SIGKILL)
        return Lost(f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}", code)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self.connection.close()


def _resident_mib(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, IndexError, ValueError):
        return 0.0


# ---------------------------------------------------------------------------------- in the process


def serve(connection: Connection, parent: int) -> None:
    """The loop of a process."""
    end_with_parent(parent)
    warnings.showwarning = warner()
    with contextlib.suppress(EOFError, OSError):  # the other end is gone: its process was killed
        job, prepare = connection.recv()
        if prepare is not None:
            prepare()
        _send(connection, None)
        while True:
            _send(connection, job(*connection.recv()))


# ---------------------------------------------------------------------------------- outcomes


def _send(connection: Connection, outcome: Any) -> None:
    """Send an outcome. Arrays go as they lie in memory, which pickling would copy: large ones in memory of their own.

    While they go through a pipe neither process does anything else.
    """
    arrays: list[memoryview] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        data = buffer.raw()
        if data.nbytes >= _IN_BAND:
            arrays.append(data)
        return data.nbytes < _IN_BAND

    text = pickle.dumps(outcome, protocol=5, buffer_callback=in_band)
    shared = hasattr(os, "memfd_create")
    connection.send((text, [(data.nbytes, shared and data.nbytes >= _SHARED) for data in arrays]))
    for data in arrays:
        if shared and data.nbytes >= _SHARED:
            with open(os.memfd_create("kangaroo-array"), "wb") as file:
                file.write(data)
                file.flush()
                reduction.send_handle(connection, file.fileno(), os.getppid())
        else:
            for first in range(0, data.nbytes, _PIECE):
                connection.send_bytes(data[first : first + _PIECE])


def _receive(connection: Connection) -> Any:
    text, sizes = connection.recv()
    arrays: list[Any] = []
    for size, shared in sizes:
        if shared:
            with open(reduction.recv_handle(connection), "r+b") as file:  # the memory is freed with the array
                arrays.append(mmap.mmap(file.fileno(), 0))
        else:
            arrays.append(np.empty(size, np.uint8))
            for first in range(0, size, _PIECE):
                connection.recv_bytes_into(arrays[-1].data[first : first + _PIECE])
    return pickle.loads(text, buffers=arrays)
