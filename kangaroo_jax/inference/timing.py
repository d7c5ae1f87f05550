"""When the device is done with what it was handed, seen by a thread that waits in everybody's place."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class Finishes:
    """Tells when arrays are there, those handed in first first. Starts a thread at the first."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finishes")

    def of(self, array: Any, tell: Callable[[float], None]) -> None:
        """Call `tell` with `time.perf_counter()` when an array is there; never where the device fails."""
        self._pool.submit(_wait, array, tell)

    def close(self) -> None:
        """Tell nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _wait(array: Any, tell: Callable[[float], None]) -> None:
    jax.block_until_ready(array)
    tell(time.perf_counter())
