"""A turnstile for threads: of each owner only a few are inside at a time, so that none fills what is behind it."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

_LOOK = 0.2  # seconds between two looks at whether one that waits is still wanted


class Turnstile:
    """Lets so many threads of each owner in at a time."""

    def __init__(self, places: int) -> None:
        """Nobody is inside."""
        self._places = places
        self._inside: Counter[bytes] = Counter()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def passed(self, owner: bytes, check: Callable[[], None]) -> Iterator[None]:
        """Inside, one of the owner's places is taken. `check` is called while it is waited for, and may raise."""
        with self._changed:
            while self._inside[owner] >= self._places:
                self._changed.wait(_LOOK)
                check()
            self._inside[owner] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[owner] -= 1
                if not self._inside[owner]:
                    del self._inside[owner]
                self._changed.notify_all()
