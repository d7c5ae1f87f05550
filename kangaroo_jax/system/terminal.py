"""What reaches a terminal: text, and nothing that would steer it.

Names of files, ids and reasons come from elsewhere. A line break in one would fake a line of ours, an escape sequence
move the cursor or set the window's title, an override of the direction of writing show another name.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from kangaroo_jax.errors import STEERS, UserError, escaped, one_line, printable

_ERASE = "\r\x1b[K"  # to the beginning of the line, and nothing after it


class Output:
    """A stream whose text has lines and no other control characters, and that may end before its writer does.

    Where nobody reads any more (`kangaroo train ... | head`) the job goes on and what it prints is dropped: a run
    of hours does not end, unsaved, with the pager that looked at its first lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`; returns its length."""
        self._pass_on(STEERS.sub(escaped, text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what waits."""
        self._pass_on("")

    def rewrite(self, line: str) -> None:
        """Put `line` in the place of the line that the cursor of the terminal stands in."""
        self._pass_on(_ERASE + printable(line))

    def _pass_on(self, text: str) -> None:
        try:
            self._stream.write(text)
            if not text or text.startswith(_ERASE):
                self._stream.flush()
        except BrokenPipeError:
            self._drop()
        except OSError as error:
            self._drop()  # what waits in the stream would be tried again, and fail again, at the end of the process
            raise UserError(f"{self._stream.name}: cannot be written ({error.strerror or error})") from None

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def outputs() -> Iterator[None]:
    """Inside, standard output and standard error are `Output`s, and a warning is a line (`warner`)."""
    before, shown = (sys.stdout, sys.stderr), warnings.showwarning
    for stream in before:
        if hasattr(stream, "reconfigure"):  # lines appear at once in a pipe; no terminal's encoding is an error
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in before)
    warnings.showwarning = warner()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as it is where the process was started without one
                stream.flush()
        sys.stdout, sys.stderr = before
        warnings.showwarning = shown


def warner() -> Callable[..., None]:
    """What shows warnings: each text once, as a line without the place in the code, which helps no user.

    Which warnings are shown is left to Python. With its `-W` or PYTHONWARNINGS they have Python's own form.
    """
    if sys.warnoptions:
        return warnings.showwarning
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        text = printable(one_line(message))
        if text not in told and sys.stderr is not None:
            told.add(text)
            print(f"kangaroo: warning: {text}", file=sys.stderr)

    return show


def rewrite(line: str) -> None:
    """Show `line` in place of the last such line, on a terminal."""
    Output(sys.stdout).rewrite(line) if not isinstance(sys.stdout, Output) else sys.stdout.rewrite(line)
