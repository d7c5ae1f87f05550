"""Turns among owners: one who wants much done does not hold up another who wants little."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Turns:
    """Who was served when. Of several owners the one goes first who was served longest ago; each one's own in order."""

    def __init__(self) -> None:
        """Nobody was served yet."""
        self._served: dict[bytes, int] = {}
        self._clock = itertools.count(1)

    def ordered(self, items: Sequence[Item], owners: Callable[[Item], Collection[bytes]]) -> list[Item]:
        """What waits, in the order in which it should be done: the first of each owner, then the second of each.

        What several owners want counts in the turn of the one who comes first.
        """
        before: Counter[bytes] = Counter()
        places = []
        for number, item in enumerate(items):
            places.append((min((before[owner], self._served.get(owner, 0)) for owner in owners(item)), number))
            before.update(owners(item))
        return [items[number] for _, number in sorted(places)]

    def served(self, owners: Collection[bytes]) -> None:
        """These had their turn."""
        now = next(self._clock)
        self._served |= dict.fromkeys(owners, now)
