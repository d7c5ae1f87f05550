"""Where media are stored: local files, members of archives and tables, and addresses fetched into a bounded cache.

clips/7.mp4                              a file
gs://bucket/7.mp4, s3://..., https://... fetched whole, once
data:video/mp4;base64,...                in the address itself
shard-000.tar::7.mp4@1536+80123          a member: its first byte and its size
train.parquet::12/images/0               row 12, column `images`, medium 0
set-train.array_record-0...::12/0        record 12 of `kangaroo data build`, medium 0
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from kangaroo_jax.data.media.addresses import check_scheme, is_remote, short
from kangaroo_jax.data.media.download import Limits, download
from kangaroo_jax.errors import UserError, one_line, printable
from kangaroo_jax.system.files import user_cache
from kangaroo_jax.system.json_text import utf8

MEMBER = "::"  # separates a container from its member

_FORSAKEN = 3600.0  # seconds after which the partial download of a dead process is removed


def join(root: str, path: str) -> str:
    """`path` from `root`; addresses, members of containers and absolute paths stay as they are."""
    if path.startswith("file://"):
        path = urllib.parse.unquote(path.removeprefix("file://"))
    if is_remote(path) or os.path.isabs(path):
        return path
    if is_remote(root):
        return f"{root.rstrip('/')}/{path}"
    return normal(os.path.join(root, path))


def absolute(path: str | Path, root: str | Path = "") -> str:
    """The absolute form, without `..`, of a local path that starts from `root` (the working folder).

    A link before a `..` is resolved, as the system does; other links keep their names.
    """
    place = ""
    for part in normal(os.path.join(os.getcwd(), root, path)).split("/")[1:]:
        if part == "..":
            place = os.path.dirname(os.path.realpath(place) if os.path.islink(place) else place).rstrip("/")
        else:
            place += f"/{part}"
    return place or "/"


def normal(path: str) -> str:
    """A path without `.` and double slashes; `name/..` stays, because the `..` of a link leads elsewhere."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if any(after == ".." and before != ".." for before, after in itertools.pairwise(parts)):
        return ("/" if path.startswith("/") else "") + "/".join(parts)
    return os.path.normpath(path)


# ----------------------------------------------------------------------------------- cache


@dataclasses.dataclass(frozen=True)
class MediaCache:
    """A folder of fetched files; the least recently used are removed beyond `limit` bytes.

    Any number of processes share it: files appear whole (written to a temporary file, then renamed), and a file that
    is removed while open stays readable.
    """

    folder: Path
    limit: int
    limits: Limits = Limits()  # for each address

    def with_private(self) -> "MediaCache":
        """The same cache, except that addresses may also lead to this machine and to private networks."""
        return dataclasses.replace(self, limits=dataclasses.replace(self.limits, allow_private=True))

    def fetch(self, address: str) -> Path:
        """The local copy of an address, fetched if it is not there. Raises UserError."""
        check_scheme(address)
        name = urllib.parse.urlparse(address).path if not address.startswith("data:") else ""
        target = self.folder / (hashlib.sha256(utf8(address)).hexdigest()[:32] + _suffix(address, name))
        with contextlib.suppress(OSError):
            os.utime(target)  # mark it as just used
            return target
        self._write(target, lambda file: download(address, file, self.limits), address)
        self._evict(keep=target)
        return target

    def _write(self, target: Path, fill: Callable[[BinaryIO], None], address: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".part-")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the media cache ({error.strerror or error})") from None
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
            os.replace(temporary, target)
        except UserError:
            raise
        except Exception as error:  # fsspec's backends raise their libraries' exceptions
            reason = printable(one_line(error)) or type(error).__name__
            raise UserError(f"{short(address)}: cannot be fetched ({reason[:200]})") from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _evict(self, keep: Path) -> None:
        entries, total, forsaken = [], 0, time.time() - _FORSAKEN
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                status = entry.stat()
                part = entry.name.startswith(".part-")
                if part and status.st_mtime < forsaken:
                    os.unlink(entry.path)
                    continue
                total += status.st_size
                if not part:
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
        for _, size, path in sorted(entries):
            if total <= self.limit:
                return
            if path != str(keep):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    total -= size


def _suffix(address: str, name: str) -> str:
    """The file's ending, which tells images from videos."""
    if address.startswith("data:"):
        kind = re.match(r"data:[\w.+-]+/([\w.+-]+)", address)
        return f".{kind[1]}" if kind else ""
    ending = os.path.splitext(name)[1].lower()
    return ending if re.fullmatch(r"\.\w{1,12}", ending) else ""


def default_cache() -> MediaCache:
    """`~/.cache/kangaroo/media` (or below XDG_CACHE_HOME), at most 50 GiB."""
    return MediaCache(user_cache("media"), 50 << 30)


_cache: list[MediaCache] = []


def use_cache(cache: MediaCache) -> None:
    """Make `cache` the cache of this process."""
    _cache[:] = [cache]


def current_cache() -> MediaCache:
    """The cache of this process."""
    if not _cache:
        use_cache(default_cache())
    return _cache[0]


def local(path: str | Path) -> Path:
    """A local path for a path or address; addresses are fetched. Raises UserError."""
    text = str(path)
    if is_remote(text):
        return current_cache().fetch(text)
    try:
        if b"\0" not in os.fsencode(text):
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise UserError(f"{short(text)}: no file can have such a name")


# --------------------------------------------------------------------------------- members


def check_file(path: str | Path, name: str = "") -> None:
    """Raise a UserError that says what is wrong if `path` is not a file or is empty.

    The message calls it `name`.
    """
    file, path = Path(path), name or path
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(
            f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}"
        ) from None
    if file.is_dir():
        raise UserError(f"{path}: this is a folder, not a media file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: a pipe, a device or a socket, not a media file")
    if status.st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes)")
