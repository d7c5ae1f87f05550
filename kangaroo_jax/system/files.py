"""Files that are there whole or not at all, and what tells that one has changed."""

import json
import os
import secrets
from pathlib import Path

from kangaroo_jax.system.json_text import utf8

Stamp = tuple[int, int, int, int, int]  # device, inode, bytes, ns of the last change of content, of any change


def stamp_of(status: os.stat_result) -> Stamp:
    """What changes with a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def write_bytes(path: Path, data: bytes) -> Path:
    """Write under a temporary name of its own beside `path`, then rename it. Returns the path.

    Processes (of several hosts, too) may write the same file at the same time: the last one's stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """The same for UTF-8 text; half a surrogate pair is written as its escape."""
    return write_bytes(path, utf8(text))


def write_json(path: Path, value: object) -> Path:
    """The same for JSON, one space a level."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def user_cache(name: str) -> Path:
    """`~/.cache/kangaroo/NAME` (or below XDG_CACHE_HOME): what may be lost, and is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "kangaroo" / name


def make_folder(path: Path) -> Path:
    """Make a folder to work in where it does not exist. Raises UserError."""
    from kangaroo_jax.errors import UserError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a working folder ({error.strerror})") from error
    return path
