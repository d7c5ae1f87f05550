"""A folder of the server's own for files that live as long as a request; what killed servers left is removed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from kangaroo_jax.errors import UserError

_PREFIX = "kangaroo-serve-"
_LOCK = "lock"


class WorkFolder:
    """A new folder `path` that nobody else can read, removed when it is closed. A context manager."""

    def __init__(self, parent: str | Path | None = None) -> None:
        """Below `parent`, by default the system's place for temporary files. Raises UserError."""
        try:
            if parent is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
            while not self._made(parent):  # another server may take it for a forsaken one before it is locked
                self._lock.close()
            remove_forsaken(self.path.parent)
        except OSError as error:
            where = parent or "the folder for temporary files"
            raise UserError(f"{where}: media cannot be written there ({error.strerror})") from None

    def _made(self, parent: str | Path | None) -> bool:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = open(self.path / _LOCK, "w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return os.fstat(self._lock.fileno()).st_nlink > 0

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove it and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_forsaken(parent: Path) -> int:
    """Remove folders whose servers are gone, those of this user alone; how many there were."""
    removed = 0
    for entry in os.scandir(parent):
        if not (entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False)):
            continue
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            with open(Path(entry.path) / _LOCK, "r+", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its server lives
                shutil.rmtree(entry.path, ignore_errors=True)
                removed += 1
    return removed
