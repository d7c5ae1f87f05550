"""Vision tokens that are there already, in place of `vision.Vision`: for comparisons that start from given ones."""

from collections.abc import Callable, Mapping

import numpy as np

from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError


class Given:
    """Looks up the vision tokens [R, D] of a medium by its path."""

    def __init__(self, rows: Mapping[str, np.ndarray]) -> None:
        """`rows` may be added to later."""
        self._rows = rows
        self.listener: Callable[[], None] = lambda: None

    def watch(self, ref: MediaRef, namespace: bytes = b"", owner: bytes = b"") -> "GivenMedium":
        """Its tokens, all ready. Raises KeyError if there are none."""
        return GivenMedium(self._rows[ref.path], ref.path)

    def pump(self) -> bool:
        """Nothing is ever to be looked at."""
        return False

    def stats(self) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def forget(self) -> None:
        """Nothing is remembered."""

    def close(self) -> None:
        """Nothing is held."""


class GivenMedium:
    """One request's hold on a medium."""

    error: UserError | None = None
    times: tuple[float, ...] = ()

    def __init__(self, content: np.ndarray, path: str) -> None:
        self._content, self.identity = content, path.encode()
        self.rows = self.ready = len(content)
        self.usage: dict[str, float] = {}

    def take(self, first: int, last: int) -> np.ndarray:
        """Vision tokens [last - first, D]."""
        return self._content[first:last]

    def release(self) -> None:
        """Nothing is held."""
