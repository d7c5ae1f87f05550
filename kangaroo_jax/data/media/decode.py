"""Reading many media at a time: in threads, or in processes with a time limit.

Order and result do not depend on how many there are. A file on which a library crashes or hangs costs only its
own sample in processes; in threads it would end or block the program.
"""

import collections
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.storage import MediaCache, use_cache
from kangaroo_jax.data.media.video import Clip, MediaInfo, MediaRef, load_frames, load_media, probe_cached
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.processes import Lost, WorkerPool

TIME_LIMIT = 120.0  # seconds for one file

Outcome = Clip | UserError
Job = Callable[..., Any]  # (path or MediaRef, ...) -> a result, or the UserError that says why there is none


class Decoder(Protocol):
    """Decodes and probes the media of a batch."""

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """The clip to come, or the error that says why there is none."""

    def decode(self, refs: Sequence[MediaRef], image_size: int) -> list[Outcome]:
        """A clip, or the error that says why there is none, for each."""
        return [future.result() for future in [self.submit(ref, image_size) for ref in refs]]

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
            clip = load_frames(ref.frames, ref.times, image_size, ref.moments)
        else:
            clip = load_media(
                ref.path,
                ref.kind,
                image_size=image_size,
                times=ref.times,
                start=ref.start,
                seconds=seconds,
                moments=ref.moments,
            )
    except UserError as error:
        return error
    except Exception as error:  # a file that breaks a library must not stop training
        return UserError(f"{name}: cannot be decoded ({type(error).__name__}: {one_line(error)})")
    if len(clip.pixels) != ref.wanted:
        return UserError(f"{name}: {len(clip.pixels)} frames decoded, {ref.wanted} promised")
    return clip


def probe_one(path: str, kind: str, seconds: float | None = None) -> MediaInfo | UserError:
    """Probe one medium, for at most `seconds`. Errors are returned, not raised, those of libraries included."""
    try:
        return probe_cached(path, kind, seconds)
    except UserError as error:
        return error
    except Exception as error:
        return UserError(f"{short(path)}: cannot be read ({type(error).__name__}: {one_line(error)})")


class ThreadDecoder(Decoder):
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

    def probe(self, path: str, kind: str) -> MediaInfo:
        """See `Decoder`."""
        info: MediaInfo = _raised(probe_one(path, kind, self._time_limit))
        return info

    def close(self) -> None:
        """See `Decoder`."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class CachedDecoder(Decoder):
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
            self._bytes += ref.wanted * image_size * image_size * 3
        future = self._clips[key] = self._decoder.submit(ref, image_size)
        while self._bytes > self._limit and len(self._clips) > 1:
            (old, side), _ = self._clips.popitem(last=False)
            self._bytes -= old.wanted * side * side * 3
        return future

    def probe(self, path: str, kind: str) -> MediaInfo:
        """See `Decoder`."""
        return self._decoder.probe(path, kind)

    def close(self) -> None:
        """See `Decoder`."""
        self._clips.clear()
        self._bytes = 0
        self._decoder.close()


class ProcessDecoder(Decoder):
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
        self._decoders = media_pool(job, num_workers, time_limit, prepare)
        self._probers = media_pool(probe_one, max(1, num_workers // 4), time_limit, prepare)
        self._probed: dict[tuple[str, str, int, int], MediaInfo] = {}

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """See `Decoder`."""
        return self._decoders.submit(ref, image_size)

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


def media_pool(job: Job, count: int, time_limit: float, prepare: Callable[[], None] | None) -> WorkerPool:
    """Processes for a job on media; one on which a process is lost has a UserError that names it for an outcome."""

    def lost(how: Lost, medium: str | MediaRef, *_: Any) -> UserError:
        name = short(medium.path if isinstance(medium, MediaRef) else medium)
        if how.exit_code is None:
            return UserError(f"{name}: not decoded within {time_limit:g} s")
        return UserError(f"{name}: the decoder crashed on this file (exit code {how.exit_code})")

    return WorkerPool(job, count, time_limit, prepare=prepare, lost=lost)


def _done(outcome: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(outcome)
    return future


def _raised(outcome: Any) -> Any:
    if isinstance(outcome, UserError):
        raise outcome
    return outcome
