"""Shares of what the requests of all API keys hold together: no key takes more of it than it leaves free."""

from collections import Counter


class Shares:
    """An amount with a limit, of which each owner holds a part. For one thread at a time.

    Where there are several owners, one gets more only as long as it then holds no more than is free, so that there is
    always something left for another. One that is at a single thing alone is bound by the limit only.
    """

    def __init__(self, limit: int, *, several: bool) -> None:
        """`several`: whether there may be more than one owner."""
        self.total = 0
        self._limit, self._several = limit, several
        self._held: Counter[bytes] = Counter()

    def refuses(self, owner: bytes, amount: int, *, alone: bool) -> str | None:
        """None where an owner gets so much more; else why not, "" where there is simply not as much.

        `alone`: whether all that it holds is for one thing.
        """
        after = self.total + amount
        if after > self._limit:
            return ""
        if self._several and not alone and self.held(owner) + amount > self._limit - after:
            return f", {self.held(owner)} by this API key, which must leave as much to others"
        return None

    def take(self, owner: bytes, amount: int) -> None:
        """An owner holds so much more."""
        self.total += amount
        self._held[owner] += amount

    def give_back(self, owner: bytes, amount: int) -> None:
        """It holds so much less."""
        self.total -= amount
        self._held[owner] -= amount
        if not self._held[owner]:
            del self._held[owner]

    def held(self, owner: bytes) -> int:
        """What an owner holds."""
        return self._held[owner]
