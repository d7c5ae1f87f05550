"""Runs many coroutines at once with results in order, and prints lines of progress."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from kangaroo_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
EVERY = 10.0  # seconds between two lines of progress


class Progress:
    """Counts finished items, and prints the rate and the time left."""

    def __init__(self, total: int, what: str, tell: Callable[[str], None], more: Callable[[], str] = str) -> None:
        """`more` returns the end of each line, such as rates of calls."""
        self._total, self._what, self._tell, self._more = total, what, tell, more
        self._done = self._skipped = 0
        self._start = self._told = time.monotonic()

    def skip(self, count: int) -> None:
        """Count items of an earlier run, which do not count in this run's rate."""
        self._skipped += count

    def expect(self, count: int) -> None:
        """Raise the total by so many items."""
        self._total += count

    def step(self, count: int = 1) -> None:
        """Count finished items."""
        self._done += count
        if time.monotonic() - self._told >= EVERY:
            self.line()

    def line(self) -> None:
        """Print a line now."""
        self._told = time.monotonic()
        rate = self._done / max(self._told - self._start, 1e-9)
        finished = self._done + self._skipped
        left = (self._total - finished) / rate if rate else float("inf")
        eta = f", ETA {left:.0f} s" if 0 < left < float("inf") else ""
        more = self._more()
        self._tell(f"{finished:,} of {self._total:,} {self._what}, {rate:.1f}/s{eta}{'; ' if more else ''}{more}")


async def in_order(
    function: Callable[[Item], Awaitable[Result]], items: Sequence[Item], at_once: int, done: Callable[[], None]
) -> list[Result]:
    """Run function(item) for each item, `at_once` at a time; returns the results in the order of the items.

    The first exception cancels all others and is raised unchanged.
    """
    results: list[Result | None] = [None] * len(items)
    numbers = iter(range(len(items)))

    async def work() -> None:
        for number in numbers:
            results[number] = await function(items[number])
            done()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(items))):
                group.create_task(work())
    except* UserError as errors:
        raise _first(errors) from None
    return results  # type: ignore[return-value]


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
