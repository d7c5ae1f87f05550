"""A log of skipped samples: one JSON line, with the reason, for every sample that could not be used."""

import contextlib
import os
import threading
import time
from pathlib import Path

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import json_line, json_lines


class Ledger:
    """An append-only JSONL file of {id, path, reason, stage, time, source, number}; a sample is entered once.

    A sample is identified by its source and number, because ids repeat; in lines of an earlier version, which lack the
    source, by id and path. Each line is written whole and at once, so that a killed process loses none; a line cut
    short by a crash of the machine is ended and ignored. Without a path the ledger is kept in memory only.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """Open the file at `path`, to append to it if it exists. Raises UserError if it cannot be written."""
        self.path = Path(path) if path is not None else None
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int]] = set()  # (source, number)
        self._seen_before: set[tuple[str, str]] = set()  # (id, path), of lines without a source
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")  # a kill left half a line
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the ledger ({error.strerror or error})") from None
        for _, entry in json_lines(self.path):
            with contextlib.suppress(KeyError, TypeError):  # of an edit, or of what a kill left
                if isinstance(entry, dict) and "source" in entry:
                    self._seen.add((str(entry["source"]), entry["number"]))
                elif isinstance(entry, dict):
                    self._seen_before.add((str(entry["id"]), str(entry["path"])))

    @property
    def count(self) -> int:
        """The number of samples entered, including those of earlier runs with the same file."""
        return len(self._seen) + len(self._seen_before)

    def add(self, index: tuple[str, int], sample_id: str, path: str, reason: str, stage: str) -> bool:
        """Enter a sample unless it is already there; returns whether it was new.

        Args:
            index: name of its source, and its number there.
            sample_id: the sample's id in its annotations.
            path: the file that caused it, "" where no file did.
            reason: one line.
            stage: "recipe" (read, probed, tokenised) or "decode".
        """
        source, number = index
        entry = {"id": sample_id, "path": path, "reason": reason, "stage": stage, "time": time.time()}
        with self._lock:
            if index in self._seen or (sample_id, path) in self._seen_before:
                return False
            self._seen.add(index)
            if self.path is not None:
                with self.path.open("ab") as file:
                    file.write(json_line(entry | {"source": source, "number": number}))
        return True
