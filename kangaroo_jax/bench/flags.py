"""Types of the flags of benches."""

import argparse


def positive(text: str) -> int:
    """The type of an argument of argparse that counts things, of which there is at least one."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)
