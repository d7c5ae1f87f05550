"""How far a job is: a line now and then, which on a terminal takes the place of the one before."""

import shutil
import sys
import threading
import time
from collections.abc import Callable

from kangaroo_jax.system.terminal import rewrite

Tell = Callable[[str], None]  # shows a line
_EVERY, _ON_A_TERMINAL = 5.0, 0.2  # seconds between lines
_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}  # bytes


def silent(line: str) -> None:
    """Show no line."""


def duration(seconds: float) -> str:
    """`h:mm:ss` for people."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Progress:
    """Counts what is done of a total, and tells its rate and the time left. Threads may share it.

    `train: 3 of 12 clips, 0.5/s, ETA 0:00:18; more`: whole lines where `tell` is no print to a terminal.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        tell: Tell = print,
        *,
        more: Callable[[], str] = str,
    ) -> None:
        """`unit` says what is counted, `more` gives the end of each line; `name` may be "".

        `bytes` are shown as kB, MB or GB, by the size of the total.
        """
        self._name, self._total, self._unit, self._tell, self._more = name and f"{name}: ", total, unit, tell, more
        self._done = self._skipped = 0
        self._start = self._shown = time.monotonic()
        self._terminal = tell is print and sys.stdout is not None and sys.stdout.isatty()
        self._lock = threading.RLock()

    def add(self, count: int = 1, *, skipped: bool = False) -> None:
        """So many more are done, or were by an earlier run: those say nothing about this run's rate."""
        with self._lock:
            self._done += count
            self._skipped += count if skipped else 0
            if time.monotonic() - self._shown >= (_ON_A_TERMINAL if self._terminal else _EVERY):
                self._shown = time.monotonic()
                if self._terminal:
                    rewrite(self.line()[: shutil.get_terminal_size().columns - 1])
                else:
                    self._tell(self.line())

    def expect(self, count: int) -> None:
        """So many more are to be done than was known."""
        self._total += count

    def say(self, line: str) -> None:
        """Tell something else in between."""
        with self._lock:
            if self._terminal:
                rewrite("")
            self._tell(line)

    def finish(self) -> None:
        """The last line, which stays."""
        self.say(self.line())

    def line(self) -> str:
        """How far it is."""
        rate = (self._done - self._skipped) / max(time.monotonic() - self._start, 1e-9)
        left = self._total - self._done
        eta = f", ETA {duration(left / rate)}" if left > 0 and rate else ""
        more = self._more()
        if self._unit == "bytes":
            unit = next((name for name, size in _UNITS.items() if self._total >= size), "kB")
            a_second = "kB" if unit == "kB" else "MB"
            share = f" ({self._done / max(self._total, 1):.0%})"
            done, total = (f"{count / _UNITS[unit]:.2f}" for count in (self._done, self._total))
            speed = f"{rate / _UNITS[a_second]:.0f} {a_second}/s"
        else:
            unit, share = self._unit, ""
            done, total, speed = f"{self._done:,}", f"{self._total:,}", f"{rate:.1f}/s"
        return f"{self._name}{done} of {total} {unit}{share}, {speed}{eta}{'; ' if more else ''}{more}"
