"""Decoding many media at a time: in threads, or in processes with a time limit.

Order and result do not depend on how many there are. A file on which the decoder crashes or hangs costs
its own sample in processes; in threads it would take the program with it.
"""

import collections
import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Protocol

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data.sample import MediaRef
from kangaroo_jax.data.video import Clip, load_media

TIME_LIMIT = 120.0  # seconds for one file, in a process

Outcome = Clip | UserError
Job = Callable[[MediaRef, int], Outcome]


class Decoder(Protocol):
    """What decodes the media of a batch."""

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """A clip, or the error that says why there is none, for each."""

    def close(self) -> None:
        """Free threads and processes."""


def make_decoder(*, num_workers: int, num_threads: int, cache_mib: int) -> Decoder:
    """Processes if `num_workers`, else threads (0: in the caller), behind a cache if `cache_mib`."""
    decoder: Decoder = ProcessDecoder(num_workers) if num_workers else ThreadDecoder(num_threads)
    return CachedDecoder(decoder, cache_mib << 20) if cache_mib else decoder


def decode_one(ref: MediaRef, image_size: int) -> Outcome:
    """Decode one medium. Errors are returned, not raised, those of libraries included."""
    try:
        clip = load_media(ref.path, ref.kind, image_size=image_size, times=ref.times, start=ref.start)
    except UserError as error:
        return error
    except Exception as error:  # a file that breaks a library must not stop training
        return UserError(f"{ref.path}: cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})")
    if len(clip.pixels) != len(ref.times):
        return UserError(f"{ref.path}: {len(clip.pixels)} frames decoded, {len(ref.times)} promised")
    return clip


class ThreadDecoder:
    """Threads of this process; libav frees the interpreter's lock while it decodes."""

    def __init__(self, num_threads: int) -> None:
        """0 threads decode in the caller."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode") if num_threads else None

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """See `Decoder`."""
        if self._pool is None or len(refs) < 2:
            return [decode_one(ref, image_size) for ref in refs]
        return list(self._pool.map(decode_one, refs, [image_size] * len(refs)))

    def close(self) -> None:
        """See `Decoder`."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class CachedDecoder:
    """Keeps the clips used last, up to a number of bytes. For corpora small enough to be read again."""

    def __init__(self, decoder: Decoder, limit: int) -> None:
        """`limit` in bytes."""
        self._decoder, self._limit = decoder, limit
        self._clips: collections.OrderedDict[tuple[MediaRef, int], Clip] = collections.OrderedDict()
        self._bytes = 0

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """See `Decoder`."""
        missing = [ref for ref in dict.fromkeys(refs) if (ref, image_size) not in self._clips]
        fresh = dict(zip(missing, self._decoder.decode(missing, image_size), strict=True))
        outcomes: list[Outcome] = []
        for ref in refs:
            if ref in fresh:
                outcomes.append(fresh[ref])
            else:
                self._clips.move_to_end((ref, image_size))
                outcomes.append(self._clips[ref, image_size])
        for ref, outcome in fresh.items():
            if isinstance(outcome, Clip):
                self._clips[ref, image_size] = outcome
                self._bytes += outcome.pixels.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._clips.popitem(last=False)[1].pixels.nbytes
        return outcomes

    def close(self) -> None:
        """See `Decoder`."""
        self._clips.clear()
        self._bytes = 0
        self._decoder.close()


class ProcessDecoder:
    """Worker processes, each replaced when it crashes or spends more than the time limit on a file."""

    def __init__(self, num_workers: int, time_limit: float = TIME_LIMIT, job: Job = decode_one) -> None:
        """Processes start at the first use; `time_limit` in seconds for one file; `job` is what they do."""
        self._count, self._time_limit, self._job = num_workers, time_limit, job
        self._workers: list[_Worker] = []

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """See `Decoder`."""
        fresh = [_Worker(self._job) for _ in range(self._count - len(self._workers))]
        for worker in fresh:
            worker.wait_until_ready()
        self._workers += fresh
        outcomes: dict[int, Outcome] = {}
        queue = collections.deque(range(len(refs)))
        while len(outcomes) < len(refs):
            for worker in self._workers:
                if worker.job is None and queue:
                    worker.begin(queue.popleft(), refs, image_size, time.monotonic() + self._time_limit)
            busy = [worker for worker in self._workers if worker.job is not None]
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.connection for worker in busy], timeout=max(0.0, patience))
            for worker in busy:
                self._collect(worker, refs, outcomes)
        return [outcomes[i] for i in range(len(refs))]

    def _collect(self, worker: "_Worker", refs: Sequence[MediaRef], outcomes: dict[int, Outcome]) -> None:
        """Take the outcome of a worker that is done, crashed or too late; a new one takes a lost one's place."""
        job, ready = worker.job, worker.connection.poll()
        if job is None or not (ready or time.monotonic() >= worker.deadline):
            return
        outcome = worker.finish() if ready else None
        if outcome is None:
            worker.stop()
            fresh = self._workers[self._workers.index(worker)] = _Worker(self._job)
            fresh.wait_until_ready()
            reason = (
                f"the decoder crashed on this file (exit code {worker.exit_code})"
                if ready
                else f"not decoded within {self._time_limit:g} s"
            )
            outcome = UserError(f"{refs[job].path}: {reason}")
        outcomes[job] = outcome

    def close(self) -> None:
        """See `Decoder`."""
        for worker in self._workers:
            worker.stop()
        self._workers = []


class _Worker:
    """A process and the job that it is at, None while idle."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True, name="kangaroo-decode")
        self._process.start()
        theirs.close()
        self.job: int | None = None
        self.deadline = 0.0
        self.exit_code: int | None = None

    def wait_until_ready(self) -> None:
        """Starting takes seconds, which are not the first file's fault."""
        try:
            self.connection.recv()
        except EOFError:
            raise UserError(
                "a decoding process ended as it started; a script of your own that sets num_workers must keep "
                'what it does under `if __name__ == "__main__":`, or set config.data.num_workers=0'
            ) from None

    def begin(self, job: int, refs: Sequence[MediaRef], image_size: int, deadline: float) -> None:
        self.job, self.deadline = job, deadline
        with contextlib.suppress(OSError):  # it died while idle: `finish` finds its end of the pipe closed
            self.connection.send((refs[job], image_size))

    def finish(self) -> Outcome | None:
        """The outcome of its job; None if the process died at it."""
        self.job = None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            self.exit_code = self._process.exitcode
            return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, job: Job) -> None:
    """The loop of a worker; it ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection.send(None)
    while True:
        try:
            ref, image_size = connection.recv()
        except EOFError:
            return
        connection.send(job(ref, image_size))
