"""What was skipped and why: one JSON line for every sample that could not be used."""

import json
import threading
import time
from pathlib import Path

from kangaroo_jax.conventions import UserError


class Ledger:
    """An append-only JSONL file of {id, path, reason, stage, time}; a sample is entered once.

    Lines are written whole and at once, so that a killed process loses none; a line cut short by a crash
    of the machine is ended and ignored. With no path the ledger is kept in memory only.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """Open, or go on with, the file at `path`. Raises UserError if it cannot be written."""
        self.path = Path(path) if path is not None else None
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
            with self.path.open("ab") as file:
                if lines[-1]:
                    file.write(b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the ledger ({error.strerror or error})") from None
        for line in lines:
            try:
                self._seen.add(str(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError):
                continue

    @property
    def count(self) -> int:
        """Samples entered, those of earlier runs with the same file included."""
        return len(self._seen)

    def add(self, sample_id: str, path: str, reason: str, stage: str) -> bool:
        """Enter a sample unless it has been; returns whether it was new.

        Args:
            sample_id: the sample's id in its annotations.
            path: the file at fault, "" where none is.
            reason: one line.
            stage: "recipe" (read, probed, tokenised) or "decode".
        """
        entry = {"id": sample_id, "path": path, "reason": reason, "stage": stage, "time": time.time()}
        with self._lock:
            if sample_id in self._seen:
                return False
            self._seen.add(sample_id)
            if self.path is not None:
                with self.path.open("ab") as file:
                    file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        return True
