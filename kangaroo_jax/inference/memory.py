"""What is remembered of conversations, by tokens, on the host: ids of tokens, common prefixes, the second level."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_IDENTITIES = 65_536  # media whose numbers are kept
_VISION = np.uint64(1 << 63)  # flag of a vision token's id
_ROWS = 32  # bits of its row


class Identities:
    """Numbers for media, so that a vision token's id is exact: no hash of it can be another's.

    A number is never given twice. That of a medium not seen for long is forgotten, and with it what is remembered.
    """

    def __init__(self) -> None:
        self._numbers: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._next = 0

    def number(self, identity: bytes) -> int:
        """The number of a medium, by its digest."""
        if identity not in self._numbers:
            self._numbers[identity] = self._next
            self._next += 1
        self._numbers.move_to_end(identity)
        while len(self._numbers) > MOST_IDENTITIES:
            self._numbers.popitem(last=False)
        return self._numbers[identity]


def token_ids(tokens: np.ndarray, is_vision: np.ndarray, media: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint64[T] that are equal where, with equal ids before them, two tokens mean the same.

    tokens int32[T], is_vision bool[T]; media: the number and the vision tokens of each, in the order in which they
    stand. Raises ValueError where they are not as many as `is_vision` has.
    """
    ids = tokens.astype(np.uint64)
    rows = [_VISION | np.uint64(number << _ROWS) | np.arange(count, dtype=np.uint64) for number, count in media]
    if sum(map(len, rows)) != np.count_nonzero(is_vision):
        raise ValueError(
            f"{np.count_nonzero(is_vision)} vision tokens in the prompt, {sum(map(len, rows))} in its media"
        )
    if rows:
        ids[is_vision] = np.concatenate(rows)
    return ids


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two arrays have in common from the first on."""
    count = min(len(one), len(other))
    differ = one[:count] != other[:count]
    return int(np.argmax(differ)) if differ.any() else count


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """A conversation's memory, brought to the host."""

    namespace: bytes
    ids: np.ndarray
    content: Any
    bytes: int


class HostMemory:
    """The memory of conversations that have no slot any more, least recently used forgotten beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._saved: list[Saved] = []  # least recently used first
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._saved)

    def fits(self, size: int) -> bool:
        """Whether so many bytes can be remembered at all."""
        return 0 < size <= self._limit

    def holds(self, namespace: bytes, ids: np.ndarray) -> bool:
        """Whether all of these ids are remembered already; if so, they were used now."""
        found, count = self.find(namespace, ids)
        if found is None or count < len(ids):
            return False
        self.touch(found)
        return True

    def put(self, saved: Saved) -> None:
        """Remember it in place of what it goes on from; nothing where it alone is too large."""
        if not self.fits(saved.bytes):
            return
        for other in list(self._saved):
            if other.namespace == saved.namespace and common_prefix(other.ids, saved.ids) == len(other.ids):
                self._drop(other)
        self._saved.append(saved)
        self.bytes += saved.bytes
        while self.bytes > self._limit:
            self._drop(self._saved[0])

    def find(self, namespace: bytes, ids: np.ndarray) -> tuple[Saved | None, int]:
        """What has the longest prefix in common with `ids`, and how long that is."""
        best: tuple[Saved | None, int] = (None, 0)
        for saved in self._saved:
            if saved.namespace == namespace:
                count = common_prefix(saved.ids, ids)
                if count > best[1]:
                    best = saved, count
        return best

    def touch(self, saved: Saved) -> None:
        """It was used now."""
        if saved in self._saved:
            self._saved.remove(saved)
            self._saved.append(saved)

    def clear(self) -> None:
        """Forget all of it."""
        self._saved, self.bytes = [], 0

    def _drop(self, saved: Saved) -> None:
        self._saved.remove(saved)
        self.bytes -= saved.bytes
