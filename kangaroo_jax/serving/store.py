"""Files that requests brought or named. Equal bytes are one file, which is removed with the last one who uses it.

So who waits for frames that another's request began to decode keeps their file when that request goes.
"""

import collections
import contextlib
import dataclasses
import os
import threading
from pathlib import Path

from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.limits import MIB, Limits
from kangaroo_jax.serving.roots import MediaRoot
from kangaroo_jax.serving.shares import Shares
from kangaroo_jax.system.files import stamp_of

_MOST_NAMES = 4096
_MOST_OPEN = 128  # files of the media root that names hold open

Name = tuple[bytes, str]  # a namespace, and a uuid in it


@dataclasses.dataclass
class StoredFile:
    """A local file, while somebody uses it."""

    path: Path
    size: int  # bytes written; 0 for a file of the media root
    digest: bytes
    opened: int | None = None  # descriptor of a file of the media root
    stamp: tuple[int, ...] = ()  # and what it was like
    owner: bytes = b""  # whose request wrote it
    users: int = 0

    def unchanged(self) -> bool:
        return self.opened is None or stamp_of(os.fstat(self.opened)) == self.stamp


@dataclasses.dataclass(frozen=True)
class Named:
    """What a client called by a uuid."""

    kind: str
    files: tuple[StoredFile, ...]
    is_frames: bool
    times: tuple[float, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def held(self) -> int:
        """Descriptors that it holds."""
        return sum(file.opened is not None for file in self.files)


class MediaStore:
    """Files of all requests. Every method may be called from any thread."""

    def __init__(
        self,
        folder: WorkFolder,
        limits: Limits,
        root: str | Path | None = None,
        hosts: tuple[str, ...] = (),
        *,
        several_keys: bool = False,
    ) -> None:
        """A store of files that are written below `folder`.

        Args:
            folder: the server's own.
            limits: bounds.
            root: folder below which `file://` addresses may lie; None: none may.
            hosts: `host` or `host:port` of web addresses that may be read, exactly; (): none may.
            several_keys: whose requests leave room to each other.
        """
        self.folder, self.limits = folder, limits
        self.root = MediaRoot(root) if root is not None else None
        self.hosts = frozenset(host.lower() for host in hosts)
        self._shares = Shares(limits.max_folder_mb * MIB, several=several_keys)
        self._lock = threading.Lock()
        self._files: dict[bytes, StoredFile] = {}  # by digest
        self._named: collections.OrderedDict[Name, Named] = collections.OrderedDict()

    @property
    def written(self) -> int:
        """Bytes that are not removed."""
        return self._shares.total

    def reserve(self, size: int, owner: bytes = b"", *, alone: bool = True) -> None:
        """Take room for so many bytes, of an owner whose only request it is or not. Raises ApiError: there is none."""
        with self._lock:
            why = self._shares.refuses(owner, size, alone=alone)
            if why is not None:
                raise ApiError(
                    f"the server's folder of media is full ({self.limits.max_folder_mb} MB, --max-folder-mb){why}",
                    status=429,
                    code="media_folder_full",
                    retry_after=5,
                )
            self._shares.take(owner, size)

    def give_back(self, size: int, owner: bytes = b"") -> None:
        """Free reserved room."""
        with self._lock:
            self._shares.give_back(owner, size)

    def adopt(self, file: StoredFile) -> StoredFile:
        """The file of these bytes, held once more: this one, or one that is there already."""
        with self._lock:
            there = self._files.get(file.digest)
            if there is None or not there.unchanged():
                there = self._files[file.digest] = file
            there.users += 1
        if there is not file:
            self._remove(file)
        return there

    def release(self, file: StoredFile) -> None:
        """One user less; the last one's file is removed."""
        with self._lock:
            file.users -= 1
            last = not file.users
            if last and self._files.get(file.digest) is file:
                del self._files[file.digest]
        if last:
            self._remove(file)

    def _remove(self, file: StoredFile) -> None:
        with contextlib.suppress(OSError):
            file.path.unlink()
        if file.opened is not None:
            os.close(file.opened)
        self.give_back(file.size, file.owner)

    # ------------------------------------------------------------------------------- names

    def remember(self, name: Name, named: Named) -> None:
        """Keep the files of a name, the longest unused ones no longer beyond the bytes allowed."""
        dropped = []
        with self._lock:
            if name in self._named:
                return
            for file in named.files:
                file.users += 1
            self._named[name] = named
            total, limit = sum(one.size for one in self._named.values()), self.limits.max_named_mb * MIB
            held = sum(one.held for one in self._named.values())
            while self._named and (total > limit or held > _MOST_OPEN or len(self._named) > _MOST_NAMES):
                _, oldest = self._named.popitem(last=False)
                total, held = total - oldest.size, held - oldest.held
                dropped.append(oldest)
        for old in dropped:
            for file in old.files:
                self.release(file)

    def recall(self, name: Name) -> Named | None:
        """What is kept under a name, its files held once more."""
        with self._lock:
            named = self._named.get(name)
            if named is None or not all(file.unchanged() for file in named.files):
                return None
            self._named.move_to_end(name)
            for file in named.files:
                file.users += 1
            return named

    def close(self) -> None:
        """Forget all names."""
        with self._lock:
            named = list(self._named.values())
            self._named.clear()
        for one in named:
            for file in one.files:
                self.release(file)
