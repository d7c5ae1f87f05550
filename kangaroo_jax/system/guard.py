"""One process that may be lost: to a crash, to a video that takes too long, or to one that takes all memory.

What a library does to a file costs that file only. The process belongs to the thread that made the guard and
ends with it, whatever becomes of that one.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.children import end_with_parent, start
from kangaroo_jax.system.memory import peak_mib

_POLL = 0.05  # seconds between looks at the memory of the process
_START_SECONDS = 300.0
# Of glibc in the processes to come: memory of pictures goes back at once, which saves a fifth of it.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "8388608", "MALLOC_TRIM_THRESHOLD_": "16777216"}


class Lost(Exception):
    """Why there is no outcome, one line that is the same each time."""


class SetupError(UserError):
    """Nothing can be scored here, whatever the file: a package is missing, or processes do not start."""


class Stopped(Exception):
    """The guard was closed while it waited."""


class Guard:
    """Calls `job(*arguments)` in a process of its own, which is replaced when it is lost."""

    def __init__(self, job: Callable[..., Any], *, seconds: float, memory_mib: int) -> None:
        """`seconds` for one call; `memory_mib` of resident memory."""
        self._job, self._seconds, self._memory = job, seconds, memory_mib
        self._process: Any = None
        self._connection: Connection | None = None
        self._closed = threading.Event()

    def call(self, *arguments: Any) -> tuple[Any, float, float]:
        """What the job returns, the CPU seconds that it took, and the most memory so far (resident MiB).

        Raises:
            SetupError: a package is missing, or the process does not start.
            UserError: as the job raised it.
            Lost: the job failed in another way, or the process was lost to it.
            Stopped: the guard was closed.
        """
        connection = self._started()
        try:
            connection.send(arguments)
            kind, value, seconds, memory = self._wait(connection)
        except (EOFError, OSError):
            self._check_open()
            raise Lost(self._end()) from None
        if kind == "setup":
            raise SetupError(value)
        if kind == "user":
            raise UserError(value)
        if kind == "lost":
            raise Lost(value)
        return value, seconds, memory

    def close(self) -> None:
        """End the process, even in the middle of a call from another thread."""
        self._closed.set()
        if self._process is not None:
            with contextlib.suppress(ValueError, AttributeError):
                self._process.kill()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Stopped

    def _started(self) -> Connection:
        self._check_open()
        if self._connection is not None and self._process.is_alive():
            return self._connection
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._job, self._memory, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="kangaroo-curate")
        for name, value in _MALLOC.items():
            os.environ.setdefault(name, value)
        start(self._process)
        theirs.close()
        self._check_open()
        try:
            if not self._connection.poll(_START_SECONDS):
                raise EOFError
            self._connection.recv()
        except (EOFError, OSError):
            self._check_open()
            raise SetupError(
                f"a process of curation ended as it started ({self._end()}); see the lines above"
            ) from None
        return self._connection

    def _wait(self, connection: Connection) -> tuple[str, Any, float, float]:
        deadline = time.monotonic() + self._seconds
        while not connection.poll(_POLL):
            self._check_open()
            if time.monotonic() > deadline:
                self._end()
                raise Lost(f"took more than {self._seconds:g} s")
            if _resident_mib(self._process.pid) > self._memory:
                self._end()
                raise Lost(_too_much(self._memory))
        return connection.recv()

    def _end(self) -> str:
        """End what is left of the process; returns how it ended."""
        self._process.join(timeout=1)
        alive = self._process.is_alive()
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        self._connection = None
        if alive or code is None:
            return "was ended"
        return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


def _too_much(mib: int) -> str:
    return f"needed more than {mib} MiB of memory"


def _resident_mib(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, IndexError, ValueError):
        return 0.0


def _serve(connection: Connection, job: Callable[..., Any], memory_mib: int, parent: int) -> None:
    """The loop of the process."""
    end_with_parent(parent)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
    if sys.platform == "linux":  # the kernel refuses what the parent, which looks now and then, might see too late
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mib << 21, memory_mib << 21))
    connection.send(None)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        begin = time.process_time()
        try:
            outcome = ("ok", job(*arguments))
        except (SetupError, ImportError) as error:
            outcome = ("setup", " ".join(str(error).split()))
        except UserError as error:
            outcome = ("user", " ".join(str(error).split()))
        except MemoryError:
            outcome = ("lost", _too_much(memory_mib))
        except Exception as error:  # what a library raises on a file
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            outcome = ("lost", _too_much(memory_mib) if "alloc" in reason.lower() else reason)
        connection.send((*outcome, time.process_time() - begin, peak_mib()))
