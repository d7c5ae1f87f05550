"""Runs many coroutines at once, with results in order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from kangaroo_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


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
