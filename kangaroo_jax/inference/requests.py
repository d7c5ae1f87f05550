"""What is asked of the engine, and what it hands back: a `Request` is submitted, its `Ticket` tells as tokens come."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.grammars import Grammar
from kangaroo_jax.inference.sampling import MOST_LOGPROBS, Sampling


class EngineError(RuntimeError):
    """A request was lost to a fault of the engine or the device, not to its input."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    Raises:
        UserError: a value is out of range.
        ValueError: the arrays do not fit, or the prompt's last token is no text.
    """

    tokens: np.ndarray  # int32[T], the prompt, with the placeholder where a vision token stands
    is_vision: np.ndarray  # bool[T]
    media: tuple[MediaRef, ...]  # in the order of their vision tokens
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()  # tokens that end the answer, and are no part of it
    stop: tuple[str, ...] = ()  # strings that do
    namespace: bytes = b""  # who may share what is remembered
    owner: bytes = b""  # in whose turn it is served; owners take turns
    logprobs: int | None = None  # of the chosen tokens, and of so many likeliest ones
    begun: bool = False  # whether the prompt ends with the beginning of the answer
    continuation: np.ndarray | None = None  # int32[M]: score these tokens in place of answering
    grammar: Grammar | None = None  # of the answer

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not count or self.is_vision.shape != (count,) or self.is_vision[-1]:
            raise ValueError(f"a prompt of {count} tokens that ends in text, not {self.is_vision.shape} marks")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: must be at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}: must be between 0 and {MOST_LOGPROBS}")


@dataclasses.dataclass(frozen=True)
class Logprob:
    """How likely a token was by the model alone, before penalties and temperature."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()  # the likeliest tokens there, as many as were asked for


@dataclasses.dataclass(frozen=True)
class Event:
    """What came with one token, or with the end: text that is final now, ids, and log-probabilities where asked for."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()


@dataclasses.dataclass
class Usage:
    """What a request took: tokens, frames, and seconds on the clock since it was submitted or in a part of the work."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, remembered from earlier requests
    completion_tokens: int = 0
    frames_decoded: int = 0
    frames_encoded: int = 0
    frames_reused: int = 0
    queue: float = 0.0  # until it had a slot
    decode_frames: float = 0.0  # from the beginning of the decoding to the last frame
    encode: float = 0.0  # while the device was at its frames
    prefill: float = 0.0  # from its slot to the end of its prompt
    first_token: float = 0.0  # from submission
    total: float = 0.0
    frame_times: tuple[tuple[float, ...], ...] = ()  # seconds of the frames of each medium


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished request. `finish_reason` is stop, length or cancelled; of a continuation, length."""

    text: str
    ids: tuple[int, ...]  # of a continuation, its tokens
    logprobs: tuple[Logprob, ...]
    finish_reason: str
    usage: Usage


Outcome = Event | Answer | Exception


class Made(Protocol):
    """A medium whose vision tokens are made one after another."""

    @property
    def rows(self) -> int:
        """How many there will be."""

    @property
    def ready(self) -> int:
        """How many there are."""


class Ticket:
    """A request under way. Every method may be called from any thread."""

    def __init__(self, request: Request, wake: Callable[[], None] = lambda: None) -> None:
        """`wake`: called when the request is cancelled."""
        self.request = request
        self._wake = wake
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._listeners: list[Callable[[Outcome], None]] = []
        self._done = threading.Event()
        self._cancelled = False
        self.media: Sequence[Made] = ()  # set by the engine

    def __iter__(self) -> Iterator[Event]:
        """Events from the first on, as they come; ends with the answer.

        Raises:
            UserError: the input cannot be used.
            EngineError: the engine failed.
        """
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.add_listener(outcomes.put)
        while True:
            outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, Answer):
                return
            yield outcome

    def result(self, timeout: float | None = None) -> Answer:
        """The answer; waits for it for `timeout` seconds. Raises TimeoutError, and see `__iter__`."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        outcome = self._outcomes[-1]
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Answer)
        return outcome

    def cancel(self) -> None:
        """The answer is no longer wanted; what there is of it comes as an answer, soon. Nothing if it is done."""
        self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def seen(self) -> tuple[float, ...]:
        """How much of each of its media is looked at, from 0 to 1: the share of its vision tokens that are made."""
        return tuple(1.0 if self.done else medium.ready / medium.rows for medium in self.media)

    @property
    def done(self) -> bool:
        """Whether the answer or an error is there."""
        return self._done.is_set()

    def add_listener(self, call: Callable[[Outcome], None]) -> None:
        """Call `call` with what has come already, in order, and then with all to come; the last is no Event.

        It is called in the engine's thread and must not wait; what it raises is lost.
        """
        with self._lock:
            for outcome in self._outcomes:
                call(outcome)
            self._listeners.append(call)

    def tell(self, outcome: Outcome) -> None:
        """Hand on what has come. For the engine alone; after an answer or an error nothing is handed on."""
        with self._lock:
            if self._done.is_set():
                return
            self._outcomes.append(outcome)
            if not isinstance(outcome, Event):
                self._done.set()
            for call in self._listeners:
                try:
                    call(outcome)
                except Exception:  # a listener that has gone must not stop the engine
                    continue
