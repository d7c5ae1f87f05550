"""Who is let in: bounds on what all requests together hold, each with a word on when to come again."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator

from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.limits import MIB, Limits

_LONGEST_WAIT = 60  # seconds that a client is told to wait


class Admission:
    """Counts; for the event loop alone."""

    def __init__(self, limits: Limits) -> None:
        """Nobody is there."""
        self._limits = limits
        self.requests = 0
        self.body_bytes = 0
        self.frames = 0
        self.draining = False
        self._by_key: collections.Counter[bytes] = collections.Counter()
        self._usual_seconds = 1.0  # of a request, a running mean

    @property
    def retry_after(self) -> int:
        """Seconds after which a place should be free, by how long requests take."""
        return max(1, min(_LONGEST_WAIT, math.ceil(self._usual_seconds)))

    @contextlib.contextmanager
    def request(self, key: bytes) -> Iterator[None]:
        """Inside, a request of this key is under way. Raises ApiError where there is no place for it."""
        if self.draining:
            raise ApiError("the server is going down", status=503, code="draining", retry_after=self.retry_after)
        if self.requests >= self._limits.max_requests:
            raise self._full(f"{self.requests} requests are under way", "max_requests")
        if self._by_key[key] >= self._limits.max_key_requests:
            raise self._full(f"{self._by_key[key]} requests of this key are under way", "max_key_requests")
        self.requests += 1
        self._by_key[key] += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self.requests -= 1
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]
            self._usual_seconds += 0.1 * (time.monotonic() - begun - self._usual_seconds)

    def grow(self, size: int) -> None:
        """So many more bytes of a body are here. Raises ApiError where all together are too many."""
        if self.body_bytes + size > self._limits.max_bodies_mb * MIB:
            raise self._full(f"{self.body_bytes // MIB} MB of requests are being read", "max_bodies_mb")
        self.body_bytes += size

    def shrink(self, size: int) -> None:
        """They are no longer needed."""
        self.body_bytes -= size

    @contextlib.contextmanager
    def decoding(self, frames: int) -> Iterator[None]:
        """Inside, so many frames are being decoded or wait for the model. Raises ApiError."""
        if self.frames and self.frames + frames > self._limits.max_frames_in_flight:
            raise self._full(f"{self.frames} frames are being decoded", "max_frames_in_flight")
        self.frames += frames
        try:
            yield
        finally:
            self.frames -= frames

    def _full(self, what: str, flag: str) -> ApiError:
        limit = getattr(self._limits, flag)
        return ApiError(
            f"{what}, limit {limit} (--{flag.replace('_', '-')}); try again later",
            status=429,
            code="busy",
            retry_after=self.retry_after,
        )
