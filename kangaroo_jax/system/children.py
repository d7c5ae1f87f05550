"""Processes that a command starts: Ctrl-C, which a terminal sends to all of them, is the command's alone to answer.

Python takes tenths of a second to reach the first line of a child, and prints a traceback of an interruption until
then; so a child starts with the signal blocked. It ends with its parent, however that one ends.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A process that this thread starts inside never meets Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """On Linux the kernel kills this process when its parent thread dies, even in the middle of a file."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
