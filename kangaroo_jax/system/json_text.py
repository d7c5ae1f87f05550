"""JSON and text of foreign files: read with mistakes named by line and column, written whatever a string holds.

A Python string can hold half a surrogate pair: JSON writes one as `\\ud83d`, and `os.listdir` gives the bytes of a file
name that is not UTF-8 so. UTF-8 has no place for it. Here it is written as the escape `\\udXXX`, which is what it is in
JSON too; all other text keeps its bytes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError

LARGEST_JSON = 256 << 20  # bytes of a config or index


def parse_json(text: str | bytes, path: str, line: int | None = None) -> Any:
    """The value of a JSON text, or of UTF-8 bytes with or without a byte order mark.

    Args:
        text: the whole text.
        path: what messages call its file (or part of one).
        line: the line of that file that the text is, where it is one line of many.

    Raises:
        UserError: naming line and column: not JSON, not UTF-8, nested too deep, or an integer of too many digits.
    """
    where = path if line is None else f"{path}, line {line}"
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(decoded)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise UserError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise UserError(f"{where}: JSON that is nested too deep") from None
    except (ValueError, OverflowError):
        most = sys.get_int_max_str_digits()
        raise UserError(f"{where}: JSON with an integer of more than {most:,} digits") from None


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """("FILE, line N", its object) of every line of a JSONL file but those of white space alone.

    In place of an object stands the UserError that says why a line is none. Raises UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = parse_json(line, str(path), number)
                except UserError as error:
                    row = error
                else:
                    if not isinstance(row, dict):
                        row = UserError(f"{where}: expected an object, found {type(row).__name__}")
                yield where, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of a file whose lines are all objects; raises the UserError of one that is none."""
    for where, row in json_lines(path):
        if isinstance(row, UserError):
            raise row
        yield where, row


def read_objects(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of `read_lines`."""
    return (row for _, row in read_lines(path))


def json_line(value: Any) -> bytes:
    """A value as one line of JSON, in UTF-8, with its newline; text stays readable."""
    return utf8(json.dumps(value, ensure_ascii=False)) + b"\n"


def utf8(text: str) -> bytes:
    """Text in UTF-8; half a surrogate pair is escaped, so that no text is refused."""
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path}: {path.stat().st_size} bytes are no config or index; is it the right file?")
        value = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
