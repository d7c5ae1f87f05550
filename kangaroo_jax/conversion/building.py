"""A folder under construction: it exists whole or not at all, and is resumable."""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from kangaroo_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
PLAN, DONE = "plan.json", "done.txt"  # files that exist only during construction
_FULL = {errno.ENOSPC: "is full", errno.EDQUOT: "has used up its quota", errno.EFBIG: "takes no file of that size"}


class Building:
    """`with Building(target, plan) as b`: the contents of `b.folder` become `target` at the end.

    Bad input and a full disk leave nothing. An interruption (Ctrl-C, kill) leaves `TARGET.partial`, where the next
    construction with the same plan goes on.
    """

    def __init__(self, target: str | Path, plan: Mapping[str, Any]) -> None:
        """`plan`: JSON that identifies the inputs and the result. Raises UserError if the target exists."""
        self.target = Path(target).absolute()
        self.folder = self.target.with_name(self.target.name + ".partial")
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise UserError(f"{target}: exists already; choose another folder or remove it")
        self._plan = json.dumps(dict(plan), sort_keys=True, default=str)
        self._done: set[str] = set()

    def __enter__(self) -> "Building":
        with self._disk():
            plan = self.folder / PLAN
            if not plan.is_file() or plan.read_text(encoding="utf-8") != self._plan:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                plan.write_text(self._plan, encoding="utf-8")
            done = self.folder / DONE
            self._done = set(done.read_text(encoding="utf-8").split("\n")) if done.is_file() else set()
            self._journal = done.open("a", encoding="utf-8")
        return self

    def is_done(self, name: str) -> bool:
        """Whether an earlier attempt finished this part."""
        return name in self._done

    def done(self, name: str) -> None:
        """Record that this part is finished and need not be made again."""
        self._journal.write(name + "\n")
        self._journal.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._journal.close()
        if error is None:
            with self._disk():
                for name in (PLAN, DONE):
                    (self.folder / name).unlink(missing_ok=True)
                if self.target.is_dir():
                    self.target.rmdir()  # an empty target is replaced
                os.replace(self.folder, self.target)
        elif isinstance(error, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._told(error) from error

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise self._told(error) from error

    def _told(self, error: OSError) -> UserError:
        if error.errno in _FULL:
            return UserError(f"{self.target}: the disk {_FULL[error.errno]}; nothing was kept, make room and try again")
        return UserError(f"{error.filename or self.target}: {error.strerror or error}")

    def need(self, nbytes: int) -> None:
        """Raise UserError if the disk has less room than `nbytes`, less the bytes already written."""
        have = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.folder).free
        if nbytes - have > free:
            raise UserError(
                f"{self.target}: the disk is too full: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB free"
            )


def ahead(read: Callable[[Item], Result], items: Iterable[Item], *, workers: int = 2) -> Iterator[tuple[Item, Result]]:
    """(item, read(item)) in order; `workers` items are read ahead at a time."""
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        source = iter(items)
        try:
            for item in itertools.islice(source, workers):
                waiting.append((item, pool.submit(read, item)))
            while waiting:
                item, future = waiting.popleft()
                result = future.result()
                for following in itertools.islice(source, 1):
                    waiting.append((following, pool.submit(read, following)))
                yield item, result
                del result, future
        finally:
            for _, future in waiting:
                future.cancel()
