"""One process that may be lost, for calls of which a caller waits for each; it tells what each of them took."""

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.memory import peak_mib
from kangaroo_jax.system.processes import Lost, NoStart, WorkerPool, too_much

# Settings of glibc: it returns the memory of pictures at once, which saves a fifth of it.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "8388608", "MALLOC_TRIM_THRESHOLD_": "16777216"}


class SetupError(UserError):
    """Nothing can be scored here, whatever the file: a package is missing, or processes do not start."""


class Stopped(Exception):
    """The guard was closed while it waited."""


class Guard:
    """Calls `job(*arguments)` in a process of its own, which is replaced when it is lost."""

    def __init__(self, job: Callable[..., Any], *, seconds: float, memory_mib: int) -> None:
        """`seconds` for one call; `memory_mib` of resident memory."""
        self._pool = WorkerPool(
            functools.partial(_outcome, job, memory_mib),
            1,
            seconds,
            prepare=functools.partial(_prepare, memory_mib),
            memory_mib=memory_mib,
            environment=_MALLOC,
        )

    def call(self, *arguments: Any) -> tuple[Any, float, float]:
        """What the job returns, the CPU seconds that it took, and the most memory so far (resident MiB).

        Raises:
            SetupError: a package is missing, or the process does not start.
            UserError: as the job raised it.
            Lost: the job failed in another way, or the process was lost to it.
            Stopped: the guard was closed.
        """
        try:
            outcome, seconds, memory = self._pool.submit(*arguments).result()
        except CancelledError:
            raise Stopped from None
        except NoStart as error:
            raise SetupError(str(error)) from None
        if isinstance(outcome, UserError | Lost):
            raise outcome
        return outcome, seconds, memory

    def close(self) -> None:
        """End the process, even in the middle of a call from another thread."""
        self._pool.close()


def _prepare(memory_mib: int) -> None:
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
    if sys.platform == "linux":  # the kernel refuses what the parent, which looks now and then, might see too late
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mib << 21, memory_mib << 21))


def _outcome(job: Callable[..., Any], memory_mib: int, *arguments: Any) -> tuple[Any, float, float]:
    """In the process: what `job` returns, or the error that `Guard.call` is to raise."""
    begin = time.process_time()
    try:
        outcome = job(*arguments)
    except (SetupError, ImportError) as error:
        outcome = SetupError(one_line(error))
    except UserError as error:
        outcome = UserError(one_line(error))
    except MemoryError:
        outcome = too_much(memory_mib)
    except Exception as error:  # what a library raises on a file
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        outcome = too_much(memory_mib) if "alloc" in reason.lower() else Lost(reason)
    return outcome, time.process_time() - begin, peak_mib()
