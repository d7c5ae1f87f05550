"""What a medium is: a digest of its bytes and of what is looked at in them, and never its name."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import struct
import threading
import time
from pathlib import Path

from kangaroo_jax.data.media.addresses import is_remote, short
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.storage import MEMBER, check_file, local
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import Stamp, stamp_of

# Digests that stay known while their files do not change.
_REMEMBERED = 65_536
# Seconds since a file was last written, within which it may be written again with no sign of it in its times.
_FRESH = 2.0
_TRIES = 3  # to read a file that is being written


@dataclasses.dataclass(frozen=True)
class Source:
    """The bytes of one file or member as they were when they were read."""

    path: str
    digest: bytes  # sha256
    stamp: Stamp  # of the file

    def unchanged(self) -> bool:
        """Whether the path still leads to these bytes. Reads them again where the file's times cannot tell."""
        try:
            stamp = _stamp(_file_of(self.path))
            if stamp == self.stamp and not _fresh(stamp):
                return True
            return source_of(self.path).digest == self.digest
        except UserError:
            return False


def media_identity(ref: MediaRef, image_size: int, model: str) -> tuple[bytes, tuple[Source, ...]]:
    """(sha256 of what the ViT will see of a medium and of who looks at it, the files that it is read from).

    `model` names the weights and the dtype that they compute in. Raises UserError where a file cannot be read.
    """
    paths = dict.fromkeys(ref.frames or (ref.path,))
    sources = {path: source_of(path) for path in paths}
    told = hashlib.sha256(b"kangaroo medium 1\0")
    for part in (
        model.encode(),
        ref.kind.encode(),
        struct.pack("<q?d", image_size, bool(ref.frames), ref.start or 0.0),
    ):
        told.update(struct.pack("<q", len(part)) + part)
    told.update(struct.pack(f"<q{len(ref.times)}d", len(ref.times), *ref.times))
    for path in ref.frames or (ref.path,):
        told.update(sources[path].digest)
    return told.digest(), tuple(sources.values())


_digests: "collections.OrderedDict[tuple[str, Stamp], bytes]" = collections.OrderedDict()
_lock = threading.Lock()


def source_of(path: str) -> Source:
    """The digest of a file's or member's bytes; read only where it is not known. Raises UserError."""
    file, member = _file_of(path), path.partition(MEMBER)[2] if _is_member(path) else ""
    check_file(file, short(path))
    for _ in range(_TRIES):
        stamp = _stamp(file)
        with _lock:
            digest = _digests.get((member, stamp))
        if digest is not None and not _fresh(stamp):
            return Source(path, digest, stamp)
        digest = _read_digest(path, file)
        if _stamp(file) == stamp:
            with _lock:
                _digests[member, stamp] = digest
                _digests.move_to_end((member, stamp))
                while len(_digests) > _REMEMBERED:
                    _digests.popitem(last=False)
            return Source(path, digest, stamp)
    raise UserError(f"{short(path)}: the file is being written; wait until it is whole")


def _is_member(path: str) -> bool:
    return MEMBER in path and not is_remote(path) and not os.path.exists(path)


def _file_of(path: str) -> Path:
    """The file that holds a medium: its own, the local copy of an address, or a container."""
    return Path(path.partition(MEMBER)[0]) if _is_member(path) else local(path)


def _read_digest(path: str, file: Path) -> bytes:
    member = member_of(path)
    if member is not None:
        return hashlib.sha256(member.read()).digest()
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UserError(f"{short(path)}: cannot be read ({error.strerror or error})") from None


def _stamp(file: Path) -> Stamp:
    with contextlib.suppress(OSError):
        return stamp_of(file.stat())
    raise UserError(f"{short(str(file))}: no such file")


def _fresh(stamp: Stamp) -> bool:
    return time.time_ns() - max(stamp[3:]) < _FRESH * 1e9
