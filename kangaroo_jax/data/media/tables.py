"""Parquet files as containers of records and media, at a cost that does not grow with row groups.

A row group has to be decoded from its beginning. Records are decoded once, in stretches of a few rows, into an unnamed
temporary file of this process, from which rows are read. Media are not copied: they are decoded one row at a time up
to the wanted one, and the position is kept, so that reading rows in order costs one pass.
"""

import functools
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from kangaroo_jax.data.media.storage import current_cache
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.installing import install_line

IMAGE_KEYS, VIDEO_KEYS = ("image", "images"), ("video", "videos")
MEDIA_KEYS = frozenset((*IMAGE_KEYS, *VIDEO_KEYS))

_STRETCH = 32  # rows decoded at a time
_GROWTH, _FREE = 100, 64 << 20  # records may take this many times the file's size, plus this many bytes
_MEDIA = 8 << 30  # bytes of media in a row group; the limit on records holds too, as media do not shrink
_FEW_ROWS = 100_000  # a file may have this many rows, plus one for each of its bytes
ENDING = re.compile(r"\.\w{1,8}$")


class ParquetTable:
    """Random access to the rows of a Parquet file, from any thread."""

    def __init__(self, path: str) -> None:
        """Raises UserError if it cannot be opened or pyarrow is not installed."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError(f"{path}: a Parquet file needs the package pyarrow: {install_line('data')}") from None
        self._path, self._pa, self._pq = path, pa, pq
        self._errors = (OSError, pa.ArrowException, ValueError, LookupError)  # the last two for damaged names and types
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            self.schema = self._file.schema_arrow
            schema = self._file.schema
            self.leaves = [schema.column(i).path for i in range(len(schema))]  # dotted names of all leaf columns
        except self._errors as error:
            raise UserError(f"{path}: not a readable Parquet file ({one_line(error)})") from None
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        size = os.path.getsize(path)
        if len(self) > _FEW_ROWS + size:
            raise UserError(f"{path}: {len(self):,} rows in {size:,} bytes; a table that grows so much is refused")
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._place_of: tuple[int, str] | None = None  # group and leaf of the media read last
        self._place: tuple[int, Any, Any] = (-1, None, None)
        self._spool: Any = None
        self._kept: dict[tuple[int, tuple[str, ...]], tuple[list[tuple[int, int]], Any] | UserError] = {}
        self._flags: dict[tuple[int, str], list[Any]] = {}
        self._room = _FREE + _GROWTH * size
        self._media = min(_MEDIA, self._room)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """One row of some (leaf) columns, as plain values. Raises UserError."""
        group, inside = self._group_of(index)
        with self._lock:
            if (group, columns) not in self._kept:
                try:
                    self._kept[group, columns] = self._spooled(group, columns)
                except UserError as error:  # keep the error, so that the group's other rows fail at once
                    self._kept[group, columns] = error
            kept = self._kept[group, columns]
        if isinstance(kept, UserError):
            raise UserError(str(kept))
        stretches, schema = kept
        offset, size = stretches[inside // _STRETCH]
        data = os.pread(self._spool.fileno(), size, offset)
        try:
            batch = self._pa.ipc.read_record_batch(self._pa.py_buffer(data), schema)
            row: dict[str, Any] = batch.slice(inside % _STRETCH, 1).to_pylist()[0]
            return row
        except self._errors as error:
            raise UserError(f"{self._path}, row {index + 1}: cannot be read ({error})") from None

    def _group_of(self, index: int) -> tuple[int, int]:
        """A row's group, and its index in the group."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _spooled(self, group: int, columns: tuple[str, ...]) -> tuple[list[tuple[int, int]], Any]:
        """Decode a group's records into the spool; returns offset and size of each stretch, and their schema."""
        stretches, schema = [], None
        plain = set(columns) == set(self.leaves)  # otherwise the stated size includes media
        if plain and self._file.metadata.row_group(group).total_byte_size > self._room:
            raise self._too_large()
        try:
            if self._spool is None:
                folder = current_cache().folder
                folder.mkdir(parents=True, exist_ok=True)
                self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            for batch in self._batches(self._file, group, list(columns), _STRETCH):
                batch = self._without_dictionaries(batch)
                schema, data = batch.schema, batch.serialize()
                if len(data) > self._room:
                    raise self._too_large()
                self._room -= len(data)
                stretches.append((self._spool.tell(), len(data)))
                self._spool.write(data)
            self._spool.flush()
        except self._errors as error:
            raise self._unreadable(group, error) from None
        return stretches, schema

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """All rows of some columns, one after another, as plain values. Raises UserError."""
        room = self._room
        for group in range(self._file.num_row_groups):
            try:
                for batch in self._batches(self._file, group, columns, _STRETCH):
                    batch = self._without_dictionaries(batch)
                    room -= batch.nbytes
                    if room < 0:
                        raise self._too_large()
                    yield from batch.to_pylist()
            except self._errors as error:
                raise self._unreadable(group, error) from None

    def _too_large(self) -> UserError:
        return UserError(
            f"{self._path}: its records take more than {_GROWTH} times the file's size, and {_FREE >> 20} MiB; "
            "a table that grows so much is refused"
        )

    def _batches(self, file: Any, group: int, columns: list[str], rows: int) -> Any:
        return file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)

    def _without_dictionaries(self, batch: Any) -> Any:
        pa = self._pa
        fields = [field.with_type(self._plain(field.type)) for field in batch.schema]
        if all(mine.type == field.type for mine, field in zip(fields, batch.schema, strict=True)):
            return batch
        return pa.Table.from_batches([batch]).cast(pa.schema(fields)).combine_chunks().to_batches()[0]

    def _plain(self, kind: Any) -> Any:
        """The type with dictionary types replaced by their value types."""
        types = self._pa.types
        if types.is_dictionary(kind):
            return self._plain(kind.value_type)
        if types.is_struct(kind):
            return self._pa.struct([kind.field(i).with_type(self._plain(kind.field(i).type)) for i in range(len(kind))])
        if types.is_list(kind):
            return self._pa.list_(kind.value_field.with_type(self._plain(kind.value_type)))
        return kind

    def _check_size(self, group: int) -> None:
        if self._file.metadata.row_group(group).total_byte_size > self._media:
            raise UserError(
                f"{self._path}: row group {group} holds more than {self._media / (1 << 30):.3g} GiB of media "
                f"(at most {_MEDIA >> 30} GiB, and {_GROWTH} times the file); write the table with fewer rows a group"
            )

    def _unreadable(self, group: int, error: Exception) -> UserError:
        return UserError(f"{self._path}: row group {group} cannot be read ({one_line(error)[:200]})")

    # ------------------------------------------------------------------------------- media

    def has_bytes(self, index: int, leaf: str) -> Any:
        """Which media of a row have bytes in the table: a bool, or a list of them where the column holds lists."""
        group, inside = self._group_of(index)
        with self._lock:
            if (group, leaf) not in self._flags:
                self._flags[group, leaf] = self._flags_of(group, leaf)
            flags = self._flags[group, leaf]
        return flags[inside]

    def _flags_of(self, group: int, leaf: str) -> list[Any]:
        """Whether each row has bytes, from the media: reading a damaged file's statistics makes pyarrow abort."""
        self._check_size(group)
        try:
            batches = self._batches(self._file, group, [leaf], 1)
            return [_present(batch.column(0).to_pylist()[0]) for batch in batches]
        except self._errors as error:
            raise self._unreadable(group, error) from None

    def medium(self, index: int, leaf: str, number: int) -> bytes | None:
        """The bytes of a medium of a row, None if it has none. Raises UserError."""
        group, inside = self._group_of(index)
        with self._reading:  # one thread at a time: a page is held whole in memory, and may be as large as its group
            at, batches, value = self._place if self._place_of == (group, leaf) else (-1, None, None)
            try:
                if batches is None or inside < at:
                    self._check_size(group)
                    at, batches = -1, self._batches(self._file, group, [leaf], 1)
                while at < inside:
                    value = next(batches).column(0).to_pylist()[0]
                    at += 1
            except (*self._errors, StopIteration) as error:
                self._place_of = None
                raise self._unreadable(group, error) from None
            self._place_of, self._place = (group, leaf), (at, batches, value)
        if isinstance(value, list):
            value = value[number] if number < len(value) else None
        return value.get("bytes") if isinstance(value, dict) else value


def _present(value: Any) -> Any:
    if isinstance(value, list):
        return [_present(one) for one in value]
    if isinstance(value, dict):
        value = value.get("bytes")
    return bool(value)


@functools.lru_cache(maxsize=32)
def parquet_table(path: str) -> ParquetTable:
    """The opened file, shared by the threads of this process."""
    return ParquetTable(path)


def parquet_bytes(label: str, container: str, name: str) -> bytes:
    """The medium `ROW/COLUMN/NUMBER`, with any ending, of a table. Raises UserError."""
    row, _, rest = name.partition("/")
    column, _, number = ENDING.sub("", rest).rpartition("/")
    if not (row.isdecimal() and number.isdecimal() and column):
        raise UserError(f"{label}: names no row, column and number of a Parquet file")
    table = parquet_table(container)
    leaf = media_leaves(table).get(column)
    data = table.medium(int(row), leaf, int(number)) if leaf and int(row) < len(table) else None
    if not data:
        raise UserError(f"{label}: no bytes in this row")
    return data


def media_leaves(table: ParquetTable) -> dict[str, str]:
    """Each column with media and the leaf with its bytes: a {"bytes", "path"} struct, or the bytes themselves."""
    import pyarrow as pa

    leaves = table.leaves
    found = {leaf.split(".")[0]: leaf for leaf in leaves if leaf.endswith(".bytes")}
    for field in table.schema:
        kind, types = field.type, pa.types
        while types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            kind = kind.value_type
        plain = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        if (plain or types.is_fixed_size_binary(kind)) and field.name in MEDIA_KEYS:
            found[field.name] = next(leaf for leaf in leaves if leaf.split(".")[0] == field.name)
    return found
