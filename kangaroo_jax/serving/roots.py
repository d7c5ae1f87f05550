"""The folder below which `file://` addresses of requests may lie."""

import contextlib
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.failures import ApiError

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = _READ | os.O_NONBLOCK  # a pipe without a writer does not hold the opener up
_FOLDER = _READ | os.O_DIRECTORY


class MediaRoot:
    """Opens files below a folder, and nothing else, whatever links change meanwhile."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError where it is no folder."""
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such folder; --allowed-media-root names one")
        self.path = os.path.realpath(path)

    @contextlib.contextmanager
    def opened(self, address: str, where: str) -> Iterator[tuple[int, os.stat_result]]:
        """The descriptor of what an address `file:///PATH` names, and what it is.

        Links may stand in the path and lead to what is below the root. What lies outside is refused in the same words
        whether it is there or not.

        Raises:
            ApiError: it is not below the root, or cannot be opened.
        """
        names = self._below(address, where)
        folder = os.open(self.path, _FOLDER)
        try:
            for name in names[:-1]:
                inner = self.open_in(folder, name, where, _FOLDER)
                os.close(folder)
                folder = inner
            opened = self.open_in(folder, names[-1], where) if names else os.dup(folder)
        finally:
            os.close(folder)
        try:
            yield opened, os.fstat(opened)
        finally:
            os.close(opened)

    def _below(self, address: str, where: str) -> list[str]:
        """The names that lead from the root to an address's file, none of them a link when it was looked at."""
        text = address.partition("://")[2]
        if not text.startswith("/"):
            raise ApiError(f"{where}: a file of this server is file:///PATH, without a host", param=where)
        path = urllib.parse.unquote_to_bytes(text)
        if b"\0" in path:
            raise ApiError(f"{where}: no file can have such a name", param=where)
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (OSError, ValueError):
            real = ""
        if real != self.path and not real.startswith(self.path.rstrip("/") + "/"):
            raise ApiError(
                f"{where}: the file is not below this server's media root (--allowed-media-root)",
                param=where,
                status=403,
                code="file_not_allowed",
            )
        return real[len(self.path.rstrip("/")) + 1 :].split("/") if real != self.path else []

    @staticmethod
    def open_in(folder: int, name: str, where: str, flags: int = _FILE) -> int:
        """The descriptor of a file in an open folder; a link is not followed. Raises ApiError."""
        try:
            return os.open(name, flags, dir_fd=folder)
        except (OSError, ValueError):
            raise ApiError(
                f"{where}: no file that can be opened below this server's media root", param=where, code="no_such_file"
            ) from None
