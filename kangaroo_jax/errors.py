"""The error of bad input and the one line that it becomes; imports nothing, for what never computes."""

import re

_STEERING = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"  # and halves of surrogate pairs
)
STEERS = re.compile(f"[{_STEERING}]|\r(?!\n)")  # what is no part of a text of lines
_IN_A_LINE = re.compile(f"[{_STEERING}\t\n\r\u2028\u2029]")


def printable(text: str) -> str:
    r"""`text` for one line: line breaks, control characters and halves of surrogate pairs as `\n`, `\x1b`, `\udcff`."""
    return _IN_A_LINE.sub(escaped, text)


def one_line(error: object) -> str:
    """The text of an error with single spaces for line breaks and other white space."""
    return " ".join(str(error).split())


def escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class UserError(Exception):
    """Bad input. The command line prints its one-line message and exits with code 2."""

    def __str__(self) -> str:
        """The message as one line, whatever names stand in it (`printable`)."""
        return printable(super().__str__())


class EndsTogether:
    """Marks an exception that every process raises after the same step, so that none of them is lost."""
