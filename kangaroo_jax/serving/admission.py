"""Who is let in: bounds on what all requests together hold, each with a word on when to come again."""

import contextlib
import math
import time
from collections.abc import Iterator

from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.limits import MIB, Limits
from kangaroo_jax.serving.shares import Shares

_LONGEST_WAIT = 60  # seconds that a client is told to wait


class Admission:
    """Counts; for the event loop alone."""

    def __init__(self, limits: Limits, *, several: bool = False) -> None:
        """Nobody is there. `several`: whether there are several API keys, which leave something to each other."""
        self._limits = limits
        self._requests = Shares(limits.max_requests, several=several)
        self._bodies = Shares(limits.max_bodies_mb * MIB, several=several)
        self._frames = Shares(limits.max_frames_in_flight, several=several)
        self.draining = False
        self._usual_seconds = 1.0  # of a request, a running mean

    @property
    def requests(self) -> int:
        """That are under way."""
        return self._requests.total

    @property
    def body_bytes(self) -> int:
        """The bytes of requests that are being read, or whose media are."""
        return self._bodies.total

    @property
    def frames(self) -> int:
        """That are being decoded or wait for the model."""
        return self._frames.total

    def alone(self, key: bytes) -> bool:
        """Whether a key has no more than one request under way."""
        return self._requests.held(key) <= 1

    @property
    def retry_after(self) -> int:
        """Seconds after which a place should be free, by how long requests take."""
        return max(1, min(_LONGEST_WAIT, math.ceil(self._usual_seconds)))

    @contextlib.contextmanager
    def request(self, key: bytes) -> Iterator[None]:
        """Inside, a request of this key is under way. Raises ApiError where there is no place for it."""
        if self.draining:
            raise ApiError("the server is going down", status=503, code="draining", retry_after=self.retry_after)
        if self._requests.held(key) >= self._limits.max_key_requests:
            raise self._full(f"{self._requests.held(key)} requests of this key are under way", "max_key_requests")
        self._check(self._requests, key, 1, f"{self.requests} requests are under way", "max_requests")
        self._requests.take(key, 1)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._requests.give_back(key, 1)
            self._usual_seconds += 0.1 * (time.monotonic() - begun - self._usual_seconds)

    def grow(self, key: bytes, size: int) -> None:
        """So many more bytes of a body are here. Raises ApiError where all together are too many."""
        what = f"{self.body_bytes // MIB} MB of requests are being read"
        self._check(self._bodies, key, size, what, "max_bodies_mb")
        self._bodies.take(key, size)

    def shrink(self, key: bytes, size: int) -> None:
        """They are no longer needed."""
        self._bodies.give_back(key, size)

    @contextlib.contextmanager
    def decoding(self, key: bytes, frames: int) -> Iterator[None]:
        """Inside, so many frames are being decoded or wait for the model. Raises ApiError."""
        if self.frames:
            what = f"{self.frames} frames are being decoded"
            self._check(self._frames, key, frames, what, "max_frames_in_flight")
        self._frames.take(key, frames)
        try:
            yield
        finally:
            self._frames.give_back(key, frames)

    def _check(self, shares: Shares, key: bytes, amount: int, what: str, flag: str) -> None:
        """Raise ApiError where a key does not get so much."""
        why = shares.refuses(key, amount, alone=self.alone(key))
        if why is not None:
            raise self._full(f"{what}{why}", flag)

    def _full(self, what: str, flag: str) -> ApiError:
        limit = getattr(self._limits, flag)
        return ApiError(
            f"{what}, limit {limit} (--{flag.replace('_', '-')}); try again later",
            status=429,
            code="busy",
            retry_after=self.retry_after,
        )
