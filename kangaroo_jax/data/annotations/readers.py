"""Records of text files, by index: JSON, JSON lines, and tables with a header (CSV, TSV)."""

import contextlib
import csv
import gzip
import json
import os
import stat
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kangaroo_jax.data.annotations.conversation import CLIP_KEYS
from kangaroo_jax.data.annotations.format_media import Parsed
from kangaroo_jax.data.annotations.formats import Columns, is_record, parse_record
from kangaroo_jax.data.media.storage import current_cache
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import parse_json

_BLOCK = 1 << 24  # bytes
_BOM = b"\xef\xbb\xbf"
_FIELD = 1 << 24  # characters in a field of a table, at most
_WHOLE = 8 << 30  # bytes of a file that is held in memory, at most
_HOLES = 100  # a file this many times larger than what it takes on disk is sparse, not text, even if compressed


def opened(path: str, file: str) -> BinaryIO:
    """An annotation file; a `.gz` is unpacked into a file without a name. Raises UserError."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: cannot read the annotations (a pipe, device or folder)")
        if not file.endswith(".gz"):
            if status.st_size > max(_WHOLE, _HOLES * 512 * status.st_blocks):
                size, held = status.st_size / (1 << 30), status.st_blocks / (1 << 21)
                raise UserError(f"{path}: {size:,.0f} GiB, of which the disk holds {held:.3g}; the file is damaged")
            return open(file, "rb")
        limits = current_cache().limits
        unpacked: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        with gzip.open(file, "rb") as source:
            while block := source.read(_BLOCK):
                if unpacked.tell() + len(block) > limits.bytes:
                    most = f"{limits.bytes / (1 << 30):g} GiB (config.data.fetch_gib)"
                    raise UserError(f"{path}: unpacks to more than {most}; unpack it with gunzip")
                unpacked.write(block)
        unpacked.seek(0)
        return unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot read the annotations ({getattr(error, 'strerror', None) or error})") from None


def _whole(path: str, stream: BinaryIO) -> bytes:
    """All bytes of a file, which is then closed. Raises UserError if it is too large to be held in memory."""
    with stream:
        data = stream.read(_WHOLE + 1)
    if len(data) > _WHOLE:
        raise UserError(f"{path}: more than {_WHOLE >> 30} GiB cannot be held in memory; write JSON lines")
    return data


def text_reader(path: str, file: str, root: str, columns: Columns | None) -> "JsonList | JsonLines | Table":
    """The reader of a text file, by its ending and its first lines. Raises UserError."""
    if file.removesuffix(".gz").lower().endswith((".csv", ".tsv")):
        return Table(path, file, root, columns)
    stream = opened(path, file)
    heads = []
    for line in stream:
        if line := line.strip().removeprefix(_BOM):
            heads.append(line)
        if len(heads) == 2:
            break
    stream.seek(0)
    if heads and _is_whole(heads):
        return JsonList(path, stream, file, root, columns)
    return JsonLines(path, stream, file, root, columns)


def _is_whole(heads: list[bytes]) -> bool:
    """Whether a file that begins with these lines is one JSON value, or several that span lines."""
    first = heads[0]
    if first.startswith(b"["):
        return not _is_messages(first)
    if not first.startswith(b"{"):
        return False
    try:
        value = json.loads(first)
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(first.decode("utf-8", "replace"))
        return goes_on and not (len(heads) > 1 and _is_object(heads[1]))
    except (ValueError, RecursionError):
        return False
    return len(heads) == 1 and not is_record(value) and _inside(value) is not None


def _is_messages(line: bytes) -> bool:
    """Whether a line is a bare list of messages, which is one record, not the list of all records."""
    try:
        first = json.loads(line)[0]
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(first, dict) and "role" in first


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _inside(value: Any) -> list[Any] | None:
    """The records in a container object: the list under one of its keys, or its values if each is a record."""
    lists = [one for one in value.values() if isinstance(one, list) and one and all(isinstance(x, dict) for x in one)]
    if len(lists) == 1:
        return lists[0]
    rows = list(value.values())
    return rows if rows and all(is_record(row) for row in rows) else None


class JsonList:
    """A JSON list, an object that holds one, or values one after another, held in memory."""

    name = "Json"

    def __init__(self, path: str, stream: BinaryIO, file: str, root: str, columns: Columns | None) -> None:
        """Raises UserError naming line and column."""
        self.files, self._path, self._root, self._columns = [Path(file)], path, root, columns
        self._items = self._values(_whole(path, stream))

    def _values(self, data: bytes) -> list[Any]:
        try:
            value: Any = parse_json(data, self._path)
        except UserError:
            if (several := _one_after_another(data)) is None:
                raise
            return several
        if isinstance(value, dict):
            inside = None if is_record(value) or self._columns is not None else _inside(value)
            return [value] if inside is None else inside
        records: list[Any] = value
        return records

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Parsed:
        return parse_record(self._items[index], f"{self._path}, item {index + 1}", self._root, self._columns)


def _one_after_another(data: bytes) -> list[Any] | None:
    """Objects that follow one another, each over several lines; None where something else does."""
    values, offset, decoder = [], 0, json.JSONDecoder()
    with contextlib.suppress(ValueError, RecursionError):
        text = data.decode("utf-8-sig").strip()
        while offset < len(text):
            value, offset = decoder.raw_decode(text, offset)
            if not isinstance(value, dict):
                return None
            values.append(value)
            while offset < len(text) and text[offset].isspace():
                offset += 1
        return values if len(values) > 1 else None
    return None


class JsonLines:
    """A record a line. Only the offsets of lines are held in memory: 8 bytes a record."""

    name = "Jsonl"

    def __init__(self, path: str, stream: BinaryIO, file: str, root: str, columns: Columns | None) -> None:
        self.files, self._path, self._root, self._columns = [Path(file)], path, root, columns
        self._file = stream
        self._begins, self._numbers, self._end = line_places(self._file)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Parsed:
        begin = int(self._begins[index])
        end = int(self._begins[index + 1]) if index + 1 < len(self._begins) else self._end
        line = os.pread(
            self._file.fileno(), end - begin, begin
        ).rstrip()  # pread is safe across threads; blank lines may follow the record
        number = index + 1 if self._numbers is None else int(self._numbers[index])
        item = parse_json(line, self._path, number)
        return parse_record(item, f"{self._path}, line {number}", self._root, self._columns)


def line_places(file: BinaryIO) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The positions of a file's lines, without the blank ones.

    Returns:
        The first byte of each, int64[n]; their numbers from 1, int64[n], None where no line is left out; the file's
        size in bytes.
    """
    found, size = [np.zeros(1, np.int64)], 0
    while block := file.read(_BLOCK):
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size + 1)
        size += len(block)
    begins = np.concatenate(found)
    begins = begins[begins < size]
    if not size:
        return begins, None, 0
    heads = np.memmap(file, np.uint8, "r")[begins]
    ends = np.append(begins[1:], size)
    blank = [
        i
        for i in np.flatnonzero(np.isin(heads, np.frombuffer(b" \t\r\n\v\f", np.uint8)))
        if not os.pread(file.fileno(), int(ends[i] - begins[i]), int(begins[i])).strip()
    ]
    if not blank:
        return begins, None, size
    numbers = np.delete(np.arange(1, len(begins) + 1), blank)
    return begins[numbers - 1], numbers, size


class Table:
    """A table with a header (CSV, or TSV), held in memory: its columns are the keys of records."""

    name = "Table"

    def __init__(self, path: str, file: str, root: str, columns: Columns | None) -> None:
        """Raises UserError naming a line."""
        self.files, self._path, self._root, self._columns = [Path(file)], path, root, columns
        try:
            text = _whole(path, opened(path, file)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
        csv.field_size_limit(_FIELD)
        tabs = file.removesuffix(".gz").lower().endswith(".tsv")
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if tabs else ",")
        try:
            self._rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not a readable table ({error})") from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Parsed:
        line, row = self._rows[index]
        where = f"{self._path}, line {line}"
        if None in row or None in row.values():
            raise UserError(f"{where}: has {'more' if None in row else 'fewer'} fields than the header")
        item = {key: _value(key, text) for key, text in row.items() if key and text != ""}
        return parse_record(item, where, self._root, self._columns)


def _value(key: str, text: str) -> Any:
    """The value of a field: numbers for a video's options, parsed JSON for lists and objects, else text."""
    if key in CLIP_KEYS or text[:1] in ("[", "{"):
        with contextlib.suppress(UserError):
            return parse_json(text, key)
    return text
