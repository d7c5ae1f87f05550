"""Reads the files of benchmarks: rows with the columns that are needed, and videos where published layouts have them.

Nothing is fetched and no pickle is ever loaded.
"""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.media.tables import parquet_table
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.extraction.strict import LETTERS
from kangaroo_jax.system.json_text import LARGEST_JSON, parse_json, read_lines

Row = Mapping[str, Any]
_FIELD = 1 << 20  # characters of a field of a table


def is_there(medium: Media) -> bool:
    """Whether all files of a medium exist."""
    return all(os.path.exists(path) for path in medium.frames or (medium.path,))


def found(folder: Path, *names: str) -> Path:
    """The first of these files (patterns with `*`) that is there. Raises UserError."""
    for name in names:
        matches = sorted(folder.glob(name)) if folder.is_dir() else []
        if matches:
            return matches[0]
    raise UserError(f"{folder}: there is no {' or '.join(names)}; --describe says what goes where")


def rows(path: Path, columns: Sequence[str] = (), inside: str = "") -> Iterator[tuple[str, Row]]:
    """("FILE, row N", the row) of a JSON list, JSON lines, TSV or Parquet file; `inside` names the list in an object.

    Raises UserError: the file cannot be read, or a row lacks one of `columns`.
    """
    kinds = {".jsonl": read_lines, ".tsv": _table_rows, ".parquet": _parquet_rows}
    for where, row in kinds[path.suffix](path) if path.suffix in kinds else _json_rows(path, inside):
        missing = [name for name in columns if name not in row]
        if missing:
            has = ", ".join(list(row)[:12])
            raise UserError(f"{where}: has no {' and no '.join(missing)}, only {has}; is it the right file?")
        yield where, row


def json_value(path: Path) -> Any:
    """What a JSON file holds. Raises UserError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are no list of questions; is it the right file?")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json_rows(path: Path, inside: str) -> Iterator[tuple[str, Row]]:
    value = json_value(path)
    if inside and isinstance(value, dict):
        value = value.get(inside)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of questions{f' under {inside!r}' if inside else ''}")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, item {number}: expected an object, found {type(row).__name__}")
        yield f"{path}, item {number}", row


def _table_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    count = sum(value is not None for value in row.values()) + len(row.get(None) or ())
                    names = len(reader.fieldnames or ())
                    raise UserError(f"{where}: {count} of {names} fields; a field with a line break in it needs quotes")
                yield where, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable table ({getattr(error, 'strerror', None) or error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    table = parquet_table(str(path))
    plain = tuple(leaf for leaf in table.leaves if not leaf.endswith(".bytes"))
    for number in range(len(table)):
        yield f"{path}, row {number + 1}", table.row(number, plain)


def texts(where: str, row: Row, name: str) -> tuple[str, ...]:
    """The texts or numbers of a list with at least one. Raises UserError: that is not what the row has there."""
    value = row[name]
    if not isinstance(value, list) or not value or not all(isinstance(one, str | int | float) for one in value):
        raise UserError(f"{where}: its {name} are no list of texts: {repr(value)[:60]}")
    return tuple(map(str, value))


def number(where: str, row: Row, name: str) -> float:
    """A number of a row, 0 where it has none. Raises UserError: something else stands there."""
    value = row.get(name)
    try:
        found = float(value or 0)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where}: its {name} is no number: {repr(value)[:60]}")
    return found


def video(folder: Path, names: Iterable[str]) -> str:
    """The first of these files or folders that is there, else where the first would be."""
    paths = [str(folder / name) for name in names]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def spellings(
    name: str, folders: Iterable[str] = ("",), endings: Iterable[str] = (".mp4", ".MP4", ".mkv")
) -> list[str]:
    """The paths that a video called `name` may have."""
    return [os.path.join(folder, name + ending) for folder in folders for ending in endings]


def plain_options(options: Iterable[str]) -> tuple[str, ...]:
    """Options without a letter of their own: `A. red`, `(A) red` and `A) red` are `red`."""
    plain = []
    for letter, option in zip(LETTERS, options, strict=False):
        for mark in (f"{letter}. ", f"({letter}) ", f"{letter}) ", f"{letter}: ", f"{letter}."):
            if option.startswith(mark):
                option = option[len(mark) :]
                break
        plain.append(option.strip())
    return tuple(plain)


def letter_of(text: str, options: Sequence[str]) -> tuple[str, str]:
    """(letter of the option that is the answer, "" or what is wrong with the question)."""
    places = [letter for letter, option in zip(LETTERS, options, strict=False) if option == text]
    if not places:
        return "", "the answer is none of the options"
    return places[0], "an option stands there twice" if len(set(options)) < len(options) else ""


def fault_of(letter: str, options: Sequence[str]) -> str:
    """What is wrong with a question whose answer is given as a letter."""
    if letter not in LETTERS[: len(options)] or not letter:
        return "the answer is none of the options"
    return "an option stands there twice" if len(set(options)) < len(options) else ""
