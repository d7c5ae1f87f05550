"""Reading many media at a time: in threads, or in processes with a time limit.

Order and result do not depend on how many there are. A file on which a library crashes or hangs costs only its
own sample in processes; in threads it would end or block the program.
"""

import collections
import contextlib
import functools
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np

from kangaroo_jax.data.media.storage import MediaCache, short, use_cache
from kangaroo_jax.data.media.video import Clip, MediaInfo, MediaRef, load_frames, load_media, probe_cached
from kangaroo_jax.errors import UserError
from kangaroo_jax.system import children

TIME_LIMIT = 120.0  # seconds for one file

Outcome = Clip | UserError
Job = Callable[..., Any]  # (path or MediaRef, ...) -> a result, or the UserError that says why there is none


class Decoder(Protocol):
    """Decodes and probes the media of a batch."""

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """The clip to come, or the error that says why there is none."""

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """A clip, or the error that says why there is none, for each."""

    def probe(self, path: str, kind: str) -> MediaInfo:
        """A file's size, length and kind. Raises UserError."""

    def close(self) -> None:
        """Free threads and processes."""


def make_decoder(
    *,
    num_workers: int,
    num_threads: int,
    cache_mib: int,
    time_limit: float = TIME_LIMIT,
    media_cache: MediaCache | None = None,
) -> Decoder:
    """Processes if `num_workers`, else threads (0: in the caller), behind a cache if `cache_mib`."""
    if num_workers:
        decoder: Decoder = ProcessDecoder(num_workers, time_limit, media_cache=media_cache)
    else:
        if media_cache is not None:
            use_cache(media_cache)
        decoder = ThreadDecoder(num_threads, time_limit)
    return CachedDecoder(decoder, cache_mib << 20) if cache_mib else decoder


def decode_one(ref: MediaRef, image_size: int, seconds: float | None = None) -> Outcome:
    """Decode one medium, for at most `seconds`. Errors are returned, not raised, those of libraries included."""
    name = short(ref.path)
    try:
        if ref.frames:
            clip = load_frames(ref.frames, ref.times, image_size)
        else:
            clip = load_media(
                ref.path, ref.kind, image_size=image_size, times=ref.times, start=ref.start, seconds=seconds
            )
    except UserError as error:
        return error
    except Exception as error:  # a file that breaks a library must not stop training
        return UserError(f"{name}: cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})")
    if len(clip.pixels) != len(ref.times):
        return UserError(f"{name}: {len(clip.pixels)} frames decoded, {len(ref.times)} promised")
    return clip


def probe_one(path: str, kind: str, seconds: float | None = None) -> MediaInfo | UserError:
    """Probe one medium, for at most `seconds`. Errors are returned, not raised, those of libraries included."""
    try:
        return probe_cached(path, kind, seconds)
    except UserError as error:
        return error
    except Exception as error:
        return UserError(f"{short(path)}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})")


class ThreadDecoder:
    """Threads of this process; libav frees the interpreter's lock while it decodes."""

    def __init__(self, num_threads: int, time_limit: float | None = None) -> None:
        """0 threads decode in the caller."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode") if num_threads else None
        self._time_limit = time_limit

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """See `Decoder`."""
        if self._pool is not None:
            return self._pool.submit(decode_one, ref, image_size, self._time_limit)
        return _done(decode_one(ref, image_size, self._time_limit))

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """See `Decoder`."""
        return [future.result() for future in [self.submit(ref, image_size) for ref in refs]]

    def probe(self, path: str, kind: str) -> MediaInfo:
        """See `Decoder`."""
        return _raised(probe_one(path, kind, self._time_limit))

    def close(self) -> None:
        """See `Decoder`."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class CachedDecoder:
    """Keeps the clips used last, up to a number of bytes: useful where a corpus fits in memory."""

    def __init__(self, decoder: Decoder, limit: int) -> None:
        """`limit` in bytes."""
        self._decoder, self._limit = decoder, limit
        self._clips: collections.OrderedDict[tuple[MediaRef, int], Future[Outcome]] = collections.OrderedDict()
        self._bytes = 0

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """See `Decoder`."""
        key = (ref, image_size)
        future = self._clips.get(key)
        if future is not None and not (future.done() and isinstance(future.result(), UserError)):
            self._clips.move_to_end(key)
            return future
        if future is None:
            self._bytes += len(ref.times) * image_size * image_size * 3
        future = self._clips[key] = self._decoder.submit(ref, image_size)
        while self._bytes > self._limit and len(self._clips) > 1:
            (old, side), _ = self._clips.popitem(last=False)
            self._bytes -= len(old.times) * side * side * 3
        return future

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """See `Decoder`."""
        return [future.result() for future in [self.submit(ref, image_size) for ref in refs]]

    def probe(self, path: str, kind: str) -> MediaInfo:
        """See `Decoder`."""
        return self._decoder.probe(path, kind)

    def close(self) -> None:
        """See `Decoder`."""
        self._clips.clear()
        self._bytes = 0
        self._decoder.close()


class ProcessDecoder:
    """Worker processes, each replaced when it crashes or spends more than the time limit on a file.

    Probes have processes of their own, so that none waits behind a long video.
    """

    def __init__(
        self,
        num_workers: int,
        time_limit: float = TIME_LIMIT,
        job: Job = decode_one,
        media_cache: MediaCache | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Processes start at the first use; `time_limit` in seconds for one file; `job` is what they do.

        `prepare` is called as each begins.
        """
        if media_cache is not None:
            prepare = functools.partial(use_cache, media_cache)
        self._decoders = WorkerPool(job, num_workers, time_limit, prepare)
        self._probers = WorkerPool(probe_one, max(1, num_workers // 4), time_limit, prepare)
        self._probed: dict[tuple[str, str, int, int], MediaInfo] = {}

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """See `Decoder`."""
        return self._decoders.submit(ref, image_size)

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """See `Decoder`."""
        return [future.result() for future in [self.submit(ref, image_size) for ref in refs]]

    def probe(self, path: str, kind: str) -> MediaInfo:
        """See `Decoder`."""
        try:
            status = os.stat(path)
            key = (path, kind, status.st_mtime_ns, status.st_size)
        except OSError:
            key = (path, kind, 0, 0)
        if key not in self._probed:
            if len(self._probed) >= 65_536:
                self._probed.clear()
            self._probed[key] = _raised(self._probers.submit(path, kind).result())
        return self._probed[key]

    @property
    def replaced(self) -> int:
        """Processes that crashed or took too long, and had another take their place."""
        return self._decoders.replaced + self._probers.replaced

    def close(self) -> None:
        """See `Decoder`."""
        self._decoders.close()
        self._probers.close()


def _done(outcome: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(outcome)
    return future


def _raised(outcome: Any) -> Any:
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


# ------------------------------------------------------------------------- worker processes


class WorkerPool:
    """Processes that do one kind of job; a thread hands the jobs out and watches the clock.

    A job on which a process dies, or that takes longer than the limit, ends with a UserError that names its
    first argument, and a new process takes the place of the old one.
    """

    def __init__(self, job: Job, count: int, time_limit: float, prepare: Callable[[], None] | None = None) -> None:
        """`count` processes, which start at the first job and call `prepare` before it."""
        self._job, self._count, self._time_limit, self._prepare = job, count, time_limit, prepare
        self._queue: collections.deque[tuple[Future[Any], tuple]] = collections.deque()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._thread: threading.Thread | None = None
        self._bell, self._ring = multiprocessing.Pipe(duplex=False)
        self._closed = False
        self.replaced = 0  # processes that crashed or took too long

    def submit(self, *arguments: Any) -> "Future[Any]":
        """The outcome to come of `job(*arguments)`. Raises UserError if processes cannot start here."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            if self._thread is None:
                self._workers = [_Worker(self._job, self._prepare) for _ in range(self._count)]
                if not all([worker.started() for worker in self._workers]):
                    raise UserError(_NO_START)
                self._thread = threading.Thread(target=self._run, daemon=True, name="kangaroo-workers")
                self._thread.start()
            self._queue.append((future, arguments))
        self._ring.send_bytes(b"!")
        return future

    def _run(self) -> None:
        while not self._closed:
            self._hand_out()
            watched = [worker for worker in self._workers if worker.job is not None or not worker.ready]
            deadlines = [worker.deadline for worker in watched if worker.job is not None]
            patience = min(deadlines, default=time.monotonic() + 3600) - time.monotonic()
            ready = wait([self._bell, *(worker.connection for worker in watched)], timeout=max(0.0, patience))
            if self._bell in ready:
                self._bell.recv_bytes()
            for worker in watched:
                if worker.ready:
                    self._collect(worker)
                elif worker.connection in ready and not worker.started():
                    self._fail(UserError(_NO_START))
                    return
        self._fail(None)

    def _fail(self, error: UserError | None) -> None:
        """End everything; jobs that are not done get the error, or are cancelled."""
        for worker in self._workers:
            worker.stop()
        with self._lock:
            self._closed = True
            left = [*self._queue, *(worker.job for worker in self._workers if worker.job is not None)]
        for future, _ in left:
            if error is None:
                future.cancel()
            else:
                with contextlib.suppress(InvalidStateError):  # of one that was cancelled
                    future.set_exception(error)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.job is None and worker.ready:
                job = self._next_job()
                if job is None:
                    return
                worker.begin(job, time.monotonic() + self._time_limit)

    def _next_job(self) -> "tuple[Future[Any], tuple] | None":
        """The first job in the queue that was not cancelled meanwhile."""
        with self._lock:
            while self._queue:
                job = self._queue.popleft()
                if not job[0].cancelled():
                    return job
        return None

    def _collect(self, worker: "_Worker") -> None:
        """Take the outcome of a worker that is done, crashed or too late; a new one takes a lost one's place."""
        ready = worker.connection.poll()
        if worker.job is None or not (ready or time.monotonic() >= worker.deadline):
            return
        future, arguments = worker.job
        outcome = worker.finish() if ready else None
        if outcome is None:
            worker.stop()
            self.replaced += 1
            reason = (
                f"the decoder crashed on this file (exit code {worker.exit_code})"
                if ready
                else f"not decoded within {self._time_limit:g} s"
            )
            outcome = UserError(f"{short(getattr(arguments[0], 'path', arguments[0]))}: {reason}")
            self._workers[self._workers.index(worker)] = _Worker(self._job, self._prepare)
        with contextlib.suppress(InvalidStateError):  # it was cancelled while a worker was at it
            future.set_result(outcome)

    def close(self) -> None:
        """End the processes; jobs that are not done are cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ring.send_bytes(b"!")
        if self._thread is not None:
            self._thread.join(timeout=10)


class _Worker:
    """A process and its current job, None while idle."""

    def __init__(self, job: Job, prepare: Callable[[], None] | None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job, prepare), daemon=True, name="kangaroo-decode")
        children.start(self._process)
        theirs.close()
        self.job: tuple[Future[Any], tuple] | None = None
        self.ready = False
        self.deadline = 0.0
        self.exit_code: int | None = None

    def started(self) -> bool:
        """Wait until the process says that it is ready (seconds that are not the first file's fault), or has died."""
        try:
            self.connection.recv()
        except (EOFError, OSError):
            return False
        self.ready = True
        return True

    def begin(self, job: tuple[Future[Any], tuple], deadline: float) -> None:
        self.job, self.deadline = job, deadline
        with contextlib.suppress(OSError):  # the process died while idle: `finish` finds the pipe closed
            self.connection.send(job[1])

    def finish(self) -> Any:
        """The outcome of its job; None if the process died at it."""
        try:
            outcome = _receive(self.connection)
            self.job = None
            return outcome
        except (EOFError, OSError, RuntimeError):  # RuntimeError: an expected file descriptor did not arrive
            self._process.join(timeout=5)
            self.exit_code = self._process.exitcode
            return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, job: Job, prepare: Callable[[], None] | None) -> None:
    """The loop of a worker; it ends with the process that started it."""
    if prepare is not None:
        prepare()
    with contextlib.suppress(EOFError, OSError):  # the parent was killed
        connection.send(None)
        while True:
            arguments = connection.recv()
            _send(connection, job(*arguments))


def _send(connection: Connection, outcome: Any) -> None:
    """Send an outcome. Pixels are sent raw, to save pickling's copy; large ones go through shared memory.

    While pixels go through a pipe, neither process does anything else.
    """
    if not isinstance(outcome, Clip):
        connection.send(outcome)
        return
    pixels = np.ascontiguousarray(outcome.pixels).data.cast("B")
    shared = len(pixels) >= _SHARED and hasattr(os, "memfd_create")
    header = (outcome.pixels.shape, outcome.times, outcome.zero, outcome.missed, outcome.damaged, shared)
    if shared:
        with open(os.memfd_create("kangaroo-pixels"), "wb") as file:
            file.write(pixels)
            file.flush()
            connection.send(header)
            reduction.send_handle(connection, file.fileno(), os.getppid())
    else:
        connection.send(header)
        for first in range(0, len(pixels), _PIECE):
            connection.send_bytes(pixels[first : first + _PIECE])


def _receive(connection: Connection) -> Any:
    outcome = connection.recv()
    if not isinstance(outcome, tuple) or len(outcome) != 6:
        return outcome
    shape, times, zero, missed, damaged, shared = outcome
    if shared:
        with open(reduction.recv_handle(connection), "r+b") as file:  # the memory is freed with the array
            pixels = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8).reshape(shape)
    else:
        pixels = np.empty(shape, np.uint8)
        view = pixels.data.cast("B")
        for first in range(0, len(view), _PIECE):
            connection.recv_bytes_into(view[first : first + _PIECE])
    return Clip(pixels, times, zero, missed, damaged)


_SHARED = 1 << 22  # bytes from which pixels go through shared memory; a process may have 65,530 mappings
_PIECE = 1 << 24  # bytes sent at a time
_NO_START = (
    "a decoding process ended as it started; a script of your own that sets num_workers must keep "
    'what it does under `if __name__ == "__main__":`, or set config.data.num_workers=0'
)
