"""Answers that were given, a line each in `samples*.jsonl`: the text, and what was asked of which weights about what.

Every answer is appended with one write, so that a killed run loses none and a line that is not whole is none. The last
line of a question is its answer now.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import json_line, json_lines

Row = dict[str, Any]
Name = tuple[str, str, str]  # benchmark, variant ("" or a control), question


def key_of(identity: Mapping[str, Any]) -> str:
    """The sha256 of all that an answer depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Samples:
    """The answers in a folder; a context manager, which closes it.

    Attributes:
        latest: the answer of each question now, or why it has none.
    """

    def __init__(self, folder: Path, part: str = "", kind: str = "samples") -> None:
        """Read all files of the folder, to append to the one of `part` ("2-of-4"; "" where one process does all).

        Raises UserError where another process appends to it, or a file holds something else.
        """
        self.latest: dict[Name, Row] = {}
        self._known: dict[str, Row] = {}
        path = folder / f"{kind}{f'-{part}' if part else ''}.jsonl"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another evaluation is writing to it; take another --workdir") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._cut_torn_line(path)
        for one in sorted(folder.glob(f"{kind}*.jsonl"), key=lambda p: (p == path, p.name)):
            self._read(one, own=one == path)

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def answer(self, key: str) -> Row | None:
        """The answer with this identity, None where there is none."""
        return self._known.get(key)

    def add(self, row: Row) -> None:
        """Append a row. Once this has returned a kill of the process does not lose it. Raises UserError."""
        data = json_line(row)
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise UserError(f"the answers cannot be written ({error.strerror})") from None
        self._hold(row)

    def _hold(self, row: Row) -> None:
        self.latest[row["benchmark"], row["variant"], row["id"]] = row
        if not row.get("failure"):
            self._known[row["key"]] = row

    def _read(self, path: Path, own: bool) -> None:
        for where, row in json_lines(path):
            if isinstance(row, UserError):
                if own:
                    raise row
                continue  # another process is just writing it
            if not {"benchmark", "variant", "id", "key"} <= set(row):
                raise UserError(f"{where}: no answer of an evaluation; take another --workdir")
            self._hold(row)

    def _cut_torn_line(self, path: Path) -> None:
        """Cut what a killed process left of a line."""
        size = os.fstat(self._file).st_size
        end, step = size, 1 << 16
        while end > 0:
            begin = max(end - step, 0)
            block = os.pread(self._file, end - begin, begin)
            place = block.rfind(b"\n")
            if place >= 0:
                end = begin + place + 1
                break
            end = begin
        if end < size:
            os.ftruncate(self._file, end)
