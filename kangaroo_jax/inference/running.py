"""One request on its way through the engine: how far its prompt is read, what was chosen, what is told."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.given import GivenMedium
from kangaroo_jax.inference.grammars import Guide
from kangaroo_jax.inference.requests import Answer, EngineError, Event, Logprob, Request, Ticket, Usage
from kangaroo_jax.inference.sampling import Chosen
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.inference.slots import Slot
from kangaroo_jax.inference.vision import Watched


class Detokenizer(Protocol):
    """What turns an answer's tokens into text; see `text.Detokenizer`."""

    stopped: bool

    def follow(self, ids: Sequence[int]) -> None:
        """What stands before the first token."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that is final with these tokens."""

    def finish(self) -> str:
        """The rest."""


@dataclasses.dataclass(eq=False)
class Run:
    """A request and what has become of it so far. For the engine's thread."""

    ticket: Ticket
    request: Request
    detokenizer: Detokenizer | None
    room: int  # tokens of the largest slot
    watched: Sequence[Watched | GivenMedium] = dataclasses.field(default_factory=list)
    ids: np.ndarray | None = None  # uint64[T] of the prompt, once its media are known
    slot: Slot | None = None
    dispatched: int = 0  # steps
    row: int = 0  # in the last step
    seen: Any = None
    guide: Guide | None = None
    following: Future[np.ndarray | None] | None = None  # what its grammar allows at its next step, once it is known
    allowed: np.ndarray | None = None  # that, uint32[W]
    chosen: list[int] = dataclasses.field(default_factory=list)  # tokens, the one that ended the answer included
    answered: list[int] = dataclasses.field(default_factory=list)  # those that are part of the answer
    text: str = ""
    logprobs: list[Logprob] = dataclasses.field(default_factory=list)
    at_end: bool = False  # nothing can follow by its grammar
    ended: bool = False
    usage: Usage = dataclasses.field(default_factory=Usage)
    begun: float = dataclasses.field(default_factory=time.perf_counter)
    placed: float = 0.0

    def __post_init__(self) -> None:
        self.usage.prompt_tokens = len(self.request.tokens)
        if self.request.grammar is not None:
            self.guide = self.request.grammar.begin()

    @property
    def limit(self) -> int:
        """Tokens that the answer may have: as many as are asked for, or as there is room for."""
        return min(self.request.max_new_tokens, self.room - len(self.request.tokens) + 1)

    @property
    def need(self) -> int:
        """Tokens that its slot must hold."""
        continuation = self.request.continuation
        new = self.limit if continuation is None else len(continuation)
        return len(self.request.tokens) + new - 1

    def place(self, slot: Slot, cached: int) -> None:
        """It has a slot now, which remembers the first `cached` tokens of its prompt."""
        self.slot, self.placed = slot, time.perf_counter()
        self.usage.cached_tokens, self.usage.queue = cached, self.placed - self.begun

    # ------------------------------------------------------------------------------------ the prompt

    def left(self) -> int:
        """Tokens of the prompt that are not read; the last one is left to the first step."""
        assert self.slot is not None
        return max(0, len(self.request.tokens) - 1 - self.slot.filled)

    def piece_ready(self, sizes: Sizes) -> bool:
        """Whether the vision tokens of the next piece are there."""
        first, last = self._next(sizes)
        wanted, ready = np.count_nonzero(self.request.is_vision[:last]), 0
        if wanted == np.count_nonzero(self.request.is_vision[:first]):
            return True
        for watched in self.watched:
            ready += watched.ready
            if watched.ready < watched.rows:
                break
        return bool(ready >= wanted)

    def medium_error(self) -> Exception | None:
        """Why one of its media cannot be read."""
        return next((watched.error for watched in self.watched if watched.error is not None), None)

    def piece(self, sizes: Sizes, width: int, dtype: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The next tokens int32[n], -1 for a vision token, and these [n, D], None where there are none."""
        first, last = self._next(sizes)
        is_vision = self.request.is_vision[first:last]
        tokens = np.where(is_vision, -1, self.request.tokens[first:last]).astype(np.int32)
        if not is_vision.any():
            return tokens, None
        begin = int(np.count_nonzero(self.request.is_vision[:first]))
        end = begin + int(np.count_nonzero(is_vision))
        parts, offset = [], 0
        for watched in self.watched:
            low, high = max(begin, offset), min(end, offset + watched.rows)
            if low < high:
                parts.append(watched.take(low - offset, high - offset))
            offset += watched.rows
        vision = np.zeros((last - first, width), dtype)
        vision[is_vision] = np.concatenate(parts)
        return tokens, vision

    def _next(self, sizes: Sizes) -> tuple[int, int]:
        assert self.slot is not None
        first, left = self.slot.filled, self.left()
        return first, first + min(left, sizes.chunk(left, first, self.slot.capacity))

    def prompt_read(self, when: float) -> None:
        """The prompt was read at a time of `time.perf_counter`."""
        self.usage.prefill = when - self.placed

    # ------------------------------------------------------------------------------------ the answer

    def may_step(self) -> bool:
        """Whether it can choose another token now: one with a grammar must know what may follow the one before."""
        return self.dispatched < self.limit and (self.guide is None or self.allowed is not None)

    def follow(self, wake: Callable[[], None]) -> Exception | None:
        """Find out what may follow by its grammar; the error if that cannot be. `wake` is called when it is found."""
        if self.guide is None or self.allowed is not None or self.dispatched > len(self.chosen):
            return None
        if self.following is None:
            self.following = self.guide.after(self.chosen[-1] if self.chosen else None)
            self.following.add_done_callback(lambda _: wake())
        if not self.following.done():
            return None
        following, self.following = self.following, None
        error = following.exception()
        if error is None:
            self.allowed = following.result()
            self.at_end = self.allowed is None
        if error is None or isinstance(error, UserError):
            return error
        return EngineError(f"{type(error).__name__}: {error}")

    def fed(self) -> tuple[int, int]:
        """(the row of the last step that chose the token it reads next, or -1; else that token)."""
        if self.guide is not None and self.chosen:
            return -1, self.chosen[-1]
        return -1 if not self.dispatched else self.row, int(self.request.tokens[-1])

    def token(self, token: int, logprobs: Sequence[np.ndarray] | None) -> str | None:
        """Take in the next token; why the answer is over with it, None where it goes on.

        logprobs: its own float32[], the likeliest tokens and theirs.
        """
        if not self.chosen:
            self.usage.first_token = time.perf_counter() - self.begun
        self.chosen.append(token)
        if token in self.request.stop_ids:
            return "stop"
        self.answered.append(token)
        told: tuple[Logprob, ...] = ()
        if self.request.logprobs is not None and logprobs is not None:
            own, best, best_logprobs = logprobs
            count = self.request.logprobs
            pairs = zip(best[:count].tolist(), best_logprobs[:count].tolist(), strict=True)
            told = (Logprob(token, float(own), tuple(pairs)),)
            self.logprobs += told
        text = self.detokenizer.add([token]) if self.detokenizer is not None else ""
        self.text += text
        self.ticket.tell(Event(text, (token,), told))
        if self.detokenizer is not None and self.detokenizer.stopped:
            return "stop"
        return "length" if len(self.answered) >= self.limit else None

    def scored(self, tokens: np.ndarray, found: Sequence[np.ndarray]) -> None:
        """Take in how likely the next tokens of a continuation are: log-probabilities, the likeliest, and theirs."""
        if not self.chosen:
            self.usage.first_token = time.perf_counter() - self.begun
        own, best, best_logprobs = (array[: len(tokens)].tolist() for array in found)
        told = tuple(
            Logprob(token, logprob, ((likeliest, most),))
            for token, logprob, likeliest, most in zip(tokens.tolist(), own, best, best_logprobs, strict=True)
        )
        self.logprobs += told
        self.chosen += tokens.tolist()
        self.answered += tokens.tolist()

    def remembered(self) -> np.ndarray:
        """Ids of all tokens that its slot may hold."""
        assert self.ids is not None
        return np.concatenate([self.ids, np.asarray(self.chosen, np.uint64)])

    def answer(self, reason: str) -> Answer:
        """The answer; its last piece of text is told before."""
        rest = self.detokenizer.finish() if self.detokenizer is not None else ""
        self.text += rest
        if rest:
            self.ticket.tell(Event(rest, ()))
        usage = self.usage
        usage.completion_tokens = len(self.answered)
        usage.total = time.perf_counter() - self.begun
        for watched in self.watched:
            for name, value in watched.usage.items():
                setattr(usage, name, getattr(usage, name) + value)
        usage.frame_times = tuple(watched.times for watched in self.watched)
        return Answer(self.text, tuple(self.answered), tuple(self.logprobs), reason, usage)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step under way: whose tokens, in the order of its rows, some of which are nobody's."""

    rows: tuple[Run | None, ...]
    chosen: Chosen
