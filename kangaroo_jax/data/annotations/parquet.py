"""Annotations in Parquet: a record a row, whose media stay where they are in the table (`data.media.tables`)."""

import decimal
import os
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.format_media import Parsed
from kangaroo_jax.data.annotations.formats import RECORD_KEYS, Columns, parse_record
from kangaroo_jax.data.media.addresses import is_remote
from kangaroo_jax.data.media.storage import MEMBER, absolute, join
from kangaroo_jax.data.media.tables import ENDING, media_leaves, parquet_table
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import parse_json


class ParquetRecords:
    """A record a row. Only the record's own keys are read with it; media stay in the table until they are needed."""

    name = "Parquet"

    def __init__(self, file: str, root: str, columns: Columns | None) -> None:
        """Raises UserError."""
        self.files, self._root, self._columns = [Path(file)], root, columns
        self._path, self._table = file, parquet_table(file)
        self._media = media_leaves(self._table)
        leaves = [leaf for leaf in self._table.leaves if leaf not in self._media.values()]
        known = [leaf for leaf in leaves if leaf.split(".")[0] in RECORD_KEYS]
        self._leaves = tuple(leaves if columns is not None or not known else known)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Parsed:
        where = f"{self._path}, row {index + 1}"
        item = self._table.row(index, self._leaves) if self._leaves else {}
        item = {key: _from_text(value, f"{where}, '{key}'") for key, value in item.items()}
        for column, leaf in self._media.items():
            item[column] = self._in_table(index, column, leaf, item.get(column))
        return parse_record(item, where, self._root, self._columns)

    def _in_table(self, row: int, column: str, leaf: str, value: Any) -> Any:
        """Media with bytes become the address of those bytes; others keep the table's value (a path)."""
        unknown = not leaf.endswith(".bytes") or self._beside(value)
        flags = self._table.has_bytes(row, leaf) if unknown else True
        if isinstance(value, list) or isinstance(flags, list):
            values = value if isinstance(value, list) else [None] * len(flags if isinstance(flags, list) else [])
            flags = flags if isinstance(flags, list) else [flags] * len(values)
            return [self._one(row, column, i, *pair) for i, pair in enumerate(zip(values, flags, strict=False))]
        return self._one(row, column, 0, value, flags) if value is not None or leaf == column else None

    def _beside(self, value: Any) -> bool:
        """Whether the path of a medium names a file beside the table, so that its bytes may not be in the table."""
        if isinstance(value, list):
            return any(map(self._beside, value))
        path = value.get("path") if isinstance(value, dict) else None
        return isinstance(path, str) and bool(path) and (is_remote(path) or os.path.exists(join(self._root, path)))

    def _one(self, row: int, column: str, number: int, value: Any, embedded: bool) -> Any:
        if not embedded:
            return value
        path = value.get("path") if isinstance(value, dict) else None
        ending = ENDING.search(path) if isinstance(path, str) else None
        return {"at": f"{absolute(self._path)}{MEMBER}{row}/{column}/{number}{ending[0] if ending else ''}"}


def _from_text(value: Any, where: str) -> Any:
    """A plain value: tables often hold conversations as JSON text, text as bytes, and numbers as decimals."""
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return parse_json(value, where)
        except UserError:
            return value  # text that only begins like JSON
    return value
