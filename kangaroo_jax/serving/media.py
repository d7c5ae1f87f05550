"""Media of requests become local files: written by the server, or opened by it below its media root.

No address of a request reaches a reader of media. What it names is checked, written or opened once, and known by a
path of the server's own.
"""

import binascii
import contextlib
import hashlib
import http.client
import logging
import os
import re
import secrets
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import BinaryIO

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.media import animation, download
from kangaroo_jax.data.media.addresses import WEB, scheme_of, short
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES
from kangaroo_jax.data.media.kinds import HEAD, kind_of
from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.failures import ApiError, too_large
from kangaroo_jax.serving.limits import MIB, Limits
from kangaroo_jax.serving.protocol import MediaPart
from kangaroo_jax.serving.roots import MediaRoot
from kangaroo_jax.serving.store import MediaStore, Named, StoredFile
from kangaroo_jax.system.files import stamp_of

log = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes, or characters of base64, between two looks at whether the request goes on
_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_DATA_HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*);base64,", re.ASCII | re.IGNORECASE)
_LONGEST_HEAD = 256  # characters


class Cancelled(Exception):
    """The request is not wanted any more."""


class RequestMedia:
    """The media of one request. `fetch` runs in a thread; `close` may be called while it does."""

    def __init__(self, store: MediaStore, namespace: bytes = b"", owner: bytes = b"", *, alone: bool = True) -> None:
        """Names (uuid) are those of the namespace; for `owner` and `alone` see `MediaStore.reserve`."""
        self._store, self._namespace = store, namespace
        self.owner, self.alone = owner, alone
        self._lock = threading.Lock()
        self._held: list[StoredFile] = []
        self._closed = False
        self.names: dict[str, str] = {}  # where in the request a path comes from

    def fetch(self, part: MediaPart) -> tuple[Media, tuple[float, ...]]:
        """The part as local files, and the seconds of its frames where they are known.

        Raises:
            ApiError: it may not be read, is too large, or is of another kind.
            Cancelled: `close` was called.
        """
        name = (self._namespace, part.uuid)
        named = self._store.recall(name) if part.uuid else None
        if named is not None:
            with self._keeping(named.files):
                if named.kind != part.kind:
                    raise ApiError(f"{part.where}: uuid {part.uuid!r} is the name of a {named.kind}", param=part.where)
            return self._medium(named, part)
        if not part.addresses:
            raise ApiError(
                f"{part.where}: uuid {part.uuid!r} is not known (any more): send the {part.kind} itself",
                param=part.where,
                code="unknown_uuid",
            )
        files: list[StoredFile] = []
        is_frames = part.is_frames
        for address in part.addresses:
            more, is_folder = self._files_of(address, part, "image" if is_frames else part.kind)
            is_frames = is_frames or is_folder
            files += more
        found = Named(part.kind, tuple(files), is_frames, part.times)
        if part.uuid:
            self._store.remember(name, found)
        return self._medium(found, part)

    def close(self) -> None:
        """Remove what nobody else uses."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, []
        for file in held:
            self._store.release(file)

    def checked(self) -> None:
        """Raise Cancelled where the request is closed."""
        if self._closed:
            raise Cancelled

    def _medium(self, named: Named, part: MediaPart) -> tuple[Media, tuple[float, ...]]:
        paths = tuple(str(file.path) for file in named.files)
        self.names |= dict.fromkeys(paths, part.where)
        return Media(named.kind, paths[0], frames=paths if named.is_frames else ()), part.times or named.times

    @contextlib.contextmanager
    def _keeping(self, files: tuple[StoredFile, ...]) -> Iterator[None]:
        """Hold files until the request is closed; they are let go where that has happened already."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._held += files
        if closed:
            for file in files:
                self._store.release(file)
            raise Cancelled
        yield

    def _kept(self, file: StoredFile) -> StoredFile:
        file = self._store.adopt(file)
        with self._keeping((file,)):
            return file

    # ----------------------------------------------------------------------------- addresses

    def _files_of(self, address: str, part: MediaPart, kind: str) -> tuple[list[StoredFile], bool]:
        """The files of an address, and whether they are the frames in a folder."""
        self.checked()
        limits = self._store.limits
        if address.startswith("/"):  # as VLMEvalKit names a file
            address = f"file://{urllib.parse.quote(address)}"
        scheme = "data" if address[:5].lower() == "data:" else scheme_of(address)
        if scheme == "data":
            return [self._written(lambda sink: _write_data(address, sink, kind, part.where, limits), kind, part)], False
        if scheme in WEB:
            return [self._written(lambda sink: self._download(address, sink, part.where), kind, part)], False
        if scheme == "file":
            return self._below_root(address, part, kind)
        raise ApiError(
            f"{part.where}: {short(address, 80)!r}: media are data:, https:// or file:// addresses", param=part.where
        )

    def _written(self, fill: Callable[["_Sink"], None], kind: str, part: MediaPart) -> StoredFile:
        """A new file that `fill` writes."""
        path = self._store.folder.path / secrets.token_hex(12)
        sink = None
        try:
            with open(path, "xb") as file:
                sink = _Sink(file, self, self._store, part.where)
                fill(sink)
            if not sink.size:
                raise ApiError(f"{part.where}: the {kind} is empty (0 bytes)", param=part.where)
            check_kind(sink.head, kind, part.where)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if sink is not None:
                self._store.give_back(sink.size, self.owner)
            if isinstance(error, OSError):  # the disk is full, or gone
                log.error("media cannot be written: %s", error)
                raise ApiError(
                    "the server cannot write media at the moment", status=507, code="media_not_written"
                ) from None
            raise
        return self._kept(StoredFile(path, sink.size, sink.digest.digest(), owner=self.owner))

    def _download(self, address: str, sink: "_Sink", where: str) -> None:
        """Write what a web address holds."""
        limits, begun = self._store.limits, time.monotonic()
        bounds = download.Limits(
            bytes=1 << 62,  # the sink counts
            seconds=limits.max_fetch_seconds,
            redirects=_REDIRECTS,
            check=Hops(self._store.hosts, where).check,
        )
        try:
            download.download(address, sink, bounds)  # type: ignore[arg-type]
        except (UserError, OSError, http.client.HTTPException, ValueError) as error:
            if sink.failed is not None:
                raise sink.failed from None
            log.warning("%s: %s", short(address, 120), error)
            late = time.monotonic() - begun >= limits.max_fetch_seconds
            why = (
                f"is not here after {limits.max_fetch_seconds:g} s (--max-fetch-seconds)"
                if late
                else "cannot be fetched"
            )
            raise ApiError(f"{where}: the address {why}", param=where, code="media_unavailable") from None

    def _below_root(self, address: str, part: MediaPart, kind: str) -> tuple[list[StoredFile], bool]:
        root = self._store.root
        if root is None:
            raise ApiError(
                f"{part.where}: this server reads no files of its own (--allowed-media-root)",
                param=part.where,
                status=403,
            )
        with root.opened(address, part.where) as (descriptor, status):
            if stat.S_ISDIR(status.st_mode) and part.kind == "video" and not part.is_frames:
                return list(self._frames_in(descriptor, part)), True
            return [self._linked(descriptor, status, kind, part)], False

    def _linked(self, descriptor: int, status: os.stat_result, kind: str, part: MediaPart) -> StoredFile:
        """A file of the media root under a name of ours that leads to what was opened, whatever becomes of its own."""
        limit = self._store.limits.max_media_mb
        if not stat.S_ISREG(status.st_mode):
            raise ApiError(f"{part.where}: a folder, a pipe or a device, not a media file", param=part.where)
        if status.st_size > limit * MIB:
            raise too_large(f"{part.where}: a file", status.st_size / MIB, limit, "max_media_mb", part.where)
        if not os.path.exists(f"/proc/self/fd/{descriptor}"):  # no Linux
            return self._written(lambda sink: sink.copy(descriptor), kind, part)
        check_kind(os.pread(descriptor, HEAD, 0), kind, part.where)
        path = self._store.folder.path / secrets.token_hex(12)
        own = os.dup(descriptor)
        file = StoredFile(path, 0, b"", own, stamp_of(status))
        try:
            os.symlink(f"/proc/{os.getpid()}/fd/{own}", path)
            file.digest = self._digest(own)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(own)
            raise
        return self._kept(file)

    def _digest(self, descriptor: int) -> bytes:
        told, place = hashlib.sha256(), 0
        while block := os.pread(descriptor, _PIECE, place):
            self.checked()
            told.update(block)
            place += len(block)
        return told.digest()

    def _frames_in(self, folder: int, part: MediaPart) -> Iterator[StoredFile]:
        """The images in a folder of the media root, in the order of their names; they are copied."""
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        most = self._store.limits.max_listed_frames
        if not names:
            raise ApiError(f"{part.where}: a folder without images", param=part.where)
        if len(names) > most:
            raise ApiError(
                f"{part.where}: a folder of {len(names)} frames, limit {most} (--max-listed-frames)",
                param=part.where,
                status=413,
                code="too_large",
            )
        for name in sorted(names, key=animation.natural):
            opened = MediaRoot.open_in(folder, name, part.where)
            try:
                if not stat.S_ISREG(os.fstat(opened).st_mode):
                    raise ApiError(f"{part.where}: a folder with more than images in it", param=part.where)
                yield self._written(lambda sink, opened=opened: sink.copy(opened), "image", part)  # type: ignore[misc]
            finally:
                os.close(opened)


class _Sink:
    """A file that is being written: counted, hashed, and given up with its request."""

    def __init__(self, file: BinaryIO, request: RequestMedia, store: MediaStore, where: str) -> None:
        self._file, self._request, self._store, self._where = file, request, store, where
        self.size, self.head, self.digest = 0, b"", hashlib.sha256()
        self.failed: Exception | None = None

    def write(self, block: bytes) -> None:
        """Raises ApiError where the file becomes too large, Cancelled, OSError."""
        try:
            self._request.checked()
            limit = self._store.limits.max_media_mb
            if self.size + len(block) > limit * MIB:
                size = (self.size + len(block)) / MIB
                raise too_large(f"{self._where}: at least", size, limit, "max_media_mb", self._where)
            self._store.reserve(len(block), self._request.owner, alone=self._request.alone)
            self.size += len(block)
            self._file.write(block)
        except Exception as error:
            self.failed = error
            raise
        if len(self.head) < HEAD:
            self.head += block[: HEAD - len(self.head)]
        self.digest.update(block)

    def copy(self, descriptor: int) -> None:
        """Write what a file holds."""
        place = 0
        while block := os.pread(descriptor, _PIECE, place):
            self.write(block)
            place += len(block)


class Hops:
    """Checks an address and then each that it redirects to."""

    def __init__(self, hosts: frozenset[str], where: str) -> None:
        self._hosts, self._where = hosts, where
        self._scheme = ""

    def check(self, address: str) -> None:
        """Raises ApiError."""
        if not self._hosts:
            raise self._refusal("this server fetches no addresses (--allowed-media-hosts)")
        try:
            parts = urllib.parse.urlsplit(address)
            port = parts.port
        except ValueError:
            raise self._refusal("this is no address") from None
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
        if "@" in parts.netloc:
            raise self._refusal("an address with a name or a password in it is not read")
        if self._scheme == "https" and scheme != "https":
            raise self._refusal("it leads from https to http")
        usual = port in (None, _PORTS.get(scheme))
        if scheme not in WEB or not ((usual and host in self._hosts) or f"{host}:{port}" in self._hosts):
            raise self._refusal("its host is none of those that this server reads from (--allowed-media-hosts)")
        self._scheme = scheme

    def _refusal(self, why: str) -> ApiError:
        return ApiError(f"{self._where}: {why}", param=self._where, status=403, code="address_not_allowed")


def _write_data(address: str, sink: _Sink, kind: str, where: str, limits: Limits) -> None:
    """Write the bytes of a `data:` address, whose length is checked before."""
    match = _DATA_HEAD.match(address[:_LONGEST_HEAD])
    if match is None:
        raise ApiError(f"{where}: a data: address must be data:TYPE;base64,...", param=where)
    begin = match.end()
    size = (len(address) - begin) * 3 / 4 / MIB
    if size > limits.max_media_mb:
        raise too_large(f"{where}: a {kind}", size, limits.max_media_mb, "max_media_mb", where)
    for first in range(begin, len(address), _PIECE):
        piece = address[first : first + _PIECE]
        try:
            if "=" in piece and first + _PIECE < len(address):
                raise ValueError("padding before the end")
            sink.write(binascii.a2b_base64(piece, strict_mode=True))
        except ValueError:  # binascii.Error is one
            raise ApiError(f"{where}: its base64 is damaged or cut short", param=where) from None
    if not sink.size:
        raise ApiError(f"{where}: the {kind} is empty (0 bytes)", param=where)
    declared = (match[1] or "").partition("/")[0].lower()
    there = kind_of(sink.head)
    if (declared == "image" and there in ("video", None)) or (declared == "video" and there == "image"):
        raise ApiError(f"{where}: declared as {match[1]}, but its bytes are {_said(there)}", param=where)


def check_kind(head: bytes, kind: str, where: str) -> None:
    """Raise ApiError where a file's first bytes say that it is a video and no image, or the other way round."""
    there = kind_of(head)
    if kind == "image" and there == "video":
        raise ApiError(f"{where}: this is a video: give it as video_url", param=where)
    if kind == "video" and there == "image":
        raise ApiError(f"{where}: this is a still image: give it as image_url", param=where)


def _said(kind: str | None) -> str:
    return {"image": "a still image", "video": "a video", None: "no image that is known"}.get(kind, "an animation")
