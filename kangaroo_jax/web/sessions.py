"""Who is on the page: each user's files, conversation and answer under way, apart from all others'."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from kangaroo_jax.data.media.kinds import HEAD, kind_of
from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.limits import MIB, Limits
from kangaroo_jax.serving.store import MediaStore, StoredFile
from kangaroo_jax.web.asking import Answering, Medium, Turn
from kangaroo_jax.web.texts import Texts, texts

log = logging.getLogger(__name__)
_LONGEST_NAME = 60  # characters of a file's name that are shown


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What users may bring. Each bound is a flag of `kangaroo web`."""

    max_upload_mb: int = 512  # one file
    max_folder_mb: int = 4096  # files of all
    max_files: int = 16  # of one conversation
    max_sessions: int = 64  # pages that are open
    max_idle_minutes: float = 60.0  # after which a page that nobody uses is forgotten


@dataclasses.dataclass
class Shown:
    """A medium of a conversation, and what is known of how it was seen."""

    medium: Medium
    stored: StoredFile
    number: int  # in its session
    seconds: tuple[float, ...] = ()  # of the frames
    thumbnails: tuple[str, ...] = ()  # data: addresses of JPEGs, one a frame


class Session:
    """One page. Its methods may be called by several threads."""

    def __init__(self, store: MediaStore, bounds: Bounds) -> None:
        self.token = secrets.token_urlsafe(24)  # opens its files, and nobody else's
        self.salt = secrets.token_hex(16)  # of what the model remembers
        self.language = "en"
        self.turns: list[Turn] = []
        self.shown: list[Shown] = []  # in the order in which they came
        self.waiting: list[Medium] = []  # go with the next question
        self.partial: list[tuple[str, str]] = []  # (role, text) of the round under way
        self.endings: dict[int, str] = {}  # what is told behind a turn, by its place
        self.used = time.monotonic()
        self.lock = threading.RLock()
        self._store, self._bounds = store, bounds
        self._under_way: list[Answering] = []
        self._asking = False
        self._count = 0
        self.closed = False

    @property
    def texts(self) -> Texts:
        """The page's words."""
        return texts(self.language)

    # ------------------------------------------------------------------------------- files

    @contextlib.contextmanager
    def receiving(self, name: str) -> Iterator["Receiver"]:
        """A new file; when the block ends it is part of the conversation, and nothing is left if it fails.

        Raises UserError.
        """
        name = shortened(name)
        self._check_room(name)
        path = self._store.folder.path / secrets.token_hex(12)
        receiver = None
        try:
            with open(path, "xb") as file:
                receiver = Receiver(file, name, self)
                yield receiver
            if not receiver.size:
                raise UserError(self.texts.empty_file.format(name=name))
            self._add(StoredFile(path, receiver.size, receiver.digest.digest()), name, receiver.head)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if receiver is not None:
                self._store.give_back(receiver.size)
            if isinstance(error, OSError):
                log.error("%s: %s", path.parent, error)
                raise UserError(self.texts.not_written.format(name=name)) from None
            raise

    def reserve(self, size: int) -> None:
        """Take room in the folder. Raises UserError where there is none."""
        try:
            self._store.reserve(size)
        except ApiError as error:
            raise UserError(error.message) from None

    @property
    def limit(self) -> int:
        """Bytes of one file."""
        return self._bounds.max_upload_mb * MIB

    def _check_room(self, name: str) -> None:
        if self.closed:
            raise UserError(self.texts.gone)
        if len(self.shown) >= self._bounds.max_files:
            raise UserError(self.texts.too_many_files.format(name=name, limit=self._bounds.max_files))

    def _add(self, written: StoredFile, name: str, head: bytes) -> None:
        with self.lock:
            self._check_room(name)
            stored = self._store.adopt(written)
            kind = "image" if kind_of(head) == "image" else "video"
            medium = Medium(kind, stored.path, name, stored.digest.hex(), stored.size)
            self._count += 1
            self.shown.append(Shown(medium, stored, self._count))
            self.waiting.append(medium)

    def drop(self, medium: Medium) -> None:
        """Take a medium that cannot be used back out."""
        with self.lock:
            gone = [one for one in self.shown if one.medium is medium]
            self.shown = [one for one in self.shown if one.medium is not medium]
            self.waiting = [one for one in self.waiting if one is not medium]
        for one in gone:
            self._store.release(one.stored)

    def held(self, number: int) -> tuple[Shown, Callable[[], None]] | None:
        """The medium of a number, whose file stays until the function is called."""
        with self.lock:
            shown = next((one for one in self.shown if one.number == number), None)
            if shown is None:
                return None
            self._store.adopt(shown.stored)
        return shown, functools.partial(self._store.release, shown.stored)

    # ------------------------------------------------------------------------------- talking

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, a question is being answered. Raises UserError where another is."""
        with self.lock:
            if self.closed:
                raise UserError(self.texts.gone)
            if self._asking:
                raise UserError(self.texts.still_answering)
            self._asking = True
        try:
            yield
        finally:
            with self.lock:
                self._asking = False

    @contextlib.contextmanager
    def under_way(self, answering: Answering) -> Iterator[None]:
        """Inside, `stop` and `close` cancel an answer."""
        with self.lock:
            self._under_way.append(answering)
            if self.closed:
                answering.cancel()
        try:
            yield
        finally:
            with self.lock:
                self._under_way.remove(answering)
            answering.cancel()

    def stop(self) -> None:
        """What is under way is not wanted."""
        with self.lock:
            for answering in self._under_way:
                answering.cancel()

    def forget(self) -> None:
        """Begin anew: no conversation and no files. What the model remembers stays this page's own."""
        with self.lock:
            self.stop()
            shown, self.shown = self.shown, []
            self.turns, self.waiting, self.partial, self.endings = [], [], [], {}
        for one in shown:
            self._store.release(one.stored)

    def close(self) -> None:
        """The page has gone."""
        with self.lock:
            self.closed = True
        self.forget()


class Receiver:
    """A file on its way."""

    def __init__(self, file: BinaryIO, name: str, session: Session) -> None:
        self._file, self.name, self._session = file, name, session
        self.size, self.head, self.digest = 0, b"", hashlib.sha256()

    def write(self, block: bytes) -> None:
        """Raises UserError where the file becomes too large or the page has gone, OSError."""
        session = self._session
        if session.closed:
            raise UserError(session.texts.gone)
        if self.size + len(block) > session.limit:
            self.refuse_size()
        session.reserve(len(block))
        self.size += len(block)
        self._file.write(block)
        self.head += block[: HEAD - len(self.head)]
        self.digest.update(block)

    def refuse_size(self) -> NoReturn:
        """Raise the UserError of a file that is too large."""
        session = self._session
        raise UserError(session.texts.too_large.format(name=self.name, limit=session.limit // MIB))


class Sessions:
    """All pages that are open, by what their browsers call themselves; the longest unused is forgotten."""

    def __init__(self, make_store: Callable[[Limits], MediaStore], bounds: Bounds) -> None:
        """`make_store` makes the place for files within bounds."""
        self.bounds = bounds
        self._store = make_store(Limits(max_media_mb=bounds.max_upload_mb, max_folder_mb=bounds.max_folder_mb))
        self.folder = self._store.folder.path
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self._by_token: dict[str, Session] = {}
        self.closed = False

    def of(self, page: str | None) -> Session:
        """The session of a page, a new one where there is none. Raises UserError."""
        if not page or len(page) > 200:
            raise UserError(texts("en").gone)
        key, now = hashlib.sha256(page.encode("utf-8", "replace")).digest(), time.monotonic()
        gone: list[Session] = []
        with self._lock:
            if self.closed:
                raise UserError(texts("en").gone)
            session = self._sessions.get(key)
            if session is None:
                gone = self._overdue(now - self.bounds.max_idle_minutes * 60, self.bounds.max_sessions - 1)
                session = self._sessions[key] = Session(self._store, self.bounds)
                self._by_token[session.token] = session
            session.used = now
        for old in gone:
            old.close()
        return session

    def opened(self, token: str) -> Session | None:
        """The session of a token."""
        with self._lock:
            session = self._by_token.get(token)
            if session is not None:
                session.used = time.monotonic()
            return session

    def leave(self, page: str | None) -> None:
        """A page was closed."""
        key = hashlib.sha256((page or "").encode("utf-8", "replace")).digest()
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is not None:
                self._by_token.pop(session.token, None)
        if session is not None:
            session.close()

    def sweep(self) -> int:
        """Forget pages that nobody has used for long; how many they were."""
        with self._lock:
            gone = self._overdue(time.monotonic() - self.bounds.max_idle_minutes * 60, self.bounds.max_sessions)
        for session in gone:
            session.close()
        return len(gone)

    def _overdue(self, before: float, most: int) -> list[Session]:
        """Take out the sessions last used before a time, and the longest unused of more than `most`."""
        by_use = sorted(self._sessions.items(), key=lambda item: item[1].used)
        gone = [item for place, item in enumerate(by_use) if item[1].used < before or place < len(by_use) - most]
        for key, session in gone:
            del self._sessions[key]
            del self._by_token[session.token]
        return [session for _, session in gone]

    def close(self) -> None:
        """Everybody goes."""
        with self._lock:
            self.closed = True
            sessions = list(self._sessions.values())
            self._sessions.clear()
            self._by_token.clear()
        for session in sessions:
            session.close()
        self._store.close()


def shortened(name: str) -> str:
    """A file's name for eyes: its last part, on one line, in its middle shortened."""
    last = printable(Path(name.replace("\\", "/")).name).strip() or "file"
    if len(last) <= _LONGEST_NAME:
        return last
    half = _LONGEST_NAME // 2
    return f"{last[: half - 1]}…{last[-half:]}"
