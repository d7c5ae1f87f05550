"""`--api-key-file`: keys that no list of processes shows."""

import os
from pathlib import Path

from kangaroo_jax.errors import UserError

_LARGEST = 1 << 20  # bytes; more is some other file


def keys_in(path: str) -> list[str]:
    """The keys in a file, one a line, empty lines left out; none for "".

    Raises:
        UserError: the file cannot be read, has no key, or a key that no header can carry.
    """
    if not path:
        return []
    try:
        with open(Path(os.path.expanduser(path)), encoding="utf-8-sig") as file:
            keys = [line.strip() for line in file.read(_LARGEST).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--api-key-file={path}: cannot be read ({reason})") from None
    if not keys:
        raise UserError(f"--api-key-file={path}: there is no key in it")
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"--api-key-file={path}: key {number} is no word of ASCII letters, digits and signs")
    return keys
