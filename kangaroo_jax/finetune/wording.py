"""Counts and answers as the lines of a run say them."""

_SHOWN = 60  # characters of an answer that a line repeats


def counted(count: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{count} {noun}" + "s" * (count != 1)


def quoted(answer: str) -> str:
    """An answer in quotation marks, cut where it is long."""
    return repr(answer if len(answer) <= _SHOWN else answer[:_SHOWN] + "...")
