"""Asks one backend, with cache, rate limits, retries and counts."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.cache import ReplyCache
from kangaroo_jax.llm_client.requests import Backend, Completion, Failure, Reply, Request, key_of
from kangaroo_jax.llm_client.schemas import json_of, mistake, writable
from kangaroo_jax.llm_client.text import is_refusal

_UNREACHABLE_AFTER = 8  # failed connections before the first answer, after which the server counts as missing
_LETTERS_A_TOKEN = 64  # more than any real answer has on average: a longer one is malformed


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the requests to a backend. Times are in seconds; a rate of 0 is no limit.

    `retries` is the number of further attempts after a call failed (status 429 or 5xx, timeout, connection); each
    waits twice as long as the one before, or as long as `Retry-After` says. `answer_retries` is the number of
    further questions after an answer was truncated, refused or malformed.
    """

    concurrency: int = 64
    requests_per_minute: float = 0
    tokens_per_minute: float = 0
    retries: int = 6
    answer_retries: int = 4
    first_wait: float = 0.5
    longest_wait: float = 60.0
    longest_answer: int = 4096  # tokens; a retry of a truncated answer asks for twice as many, up to this


class Rate:
    """Hands out at most `per_minute` units a minute, evenly, and the first second's share at once."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A rate of 0 is no limit."""
        self._gap = 60 / per_minute if per_minute else 0.0
        self._clock, self._next = clock, clock() - 1

    async def take(self, units: float = 1) -> None:
        """Wait until `units` are available."""
        if not self._gap:
            return
        now = self._clock()
        self._next = max(self._next, now - 1) + units * self._gap
        if self._next > now:
            await asyncio.sleep(self._next - now)


class Client:
    """One backend for many coroutines of one event loop.

    A request in flight is not sent a second time: all that ask it wait for the one answer.
    """

    def __init__(self, backend: Backend, limits: Limits, cache: ReplyCache | None = None) -> None:
        """Without a cache no answer is stored."""
        self.backend, self.limits = backend, limits
        self._cache = cache if backend.cached else None
        self._turns = asyncio.Semaphore(limits.concurrency)
        self._requests, self._tokens = Rate(limits.requests_per_minute), Rate(limits.tokens_per_minute)
        self._under_way: dict[str, asyncio.Future[Reply]] = {}
        self._unreachable = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.latencies: collections.deque[float] = collections.deque(maxlen=100_000)  # seconds

    async def ask(self, request: Request) -> Reply:
        """The reply to a request. Raises UserError if no request can succeed (a wrong key, no server)."""
        self.counts["asked"] += 1
        try:
            images = tuple(_read(path) for path in request.images)
        except Failure as failure:
            return self._counted(Reply("error", reason=str(failure)))
        key = key_of(self.backend, request, images)
        kept = self._cache.get(key) if self._cache is not None else None
        if kept is not None:
            self.counts["from_cache"] += 1
            return self._counted(_with_data(kept, request, self._varies))
        if key in self._under_way:
            self.counts["joined"] += 1
            return self._counted(await asyncio.shield(self._under_way[key]))
        future = self._under_way[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._answer(request, images)
            if self._cache is not None and reply.outcome != "error":
                self._cache.put(key, self.backend.model, request.prompt, reply)
            future.set_result(reply)
        except BaseException:
            future.cancel()  # whatever stops this request stops the whole run
            raise
        finally:
            del self._under_way[key]
        return self._counted(reply)

    @property
    def _varies(self) -> bool:
        """Whether the same question may get another answer: at temperature 0 it gets the same each time."""
        return bool(self.backend.settings.get("temperature", 0.0))

    def _counted(self, reply: Reply) -> Reply:
        self.counts[reply.outcome] += 1
        return reply

    async def _answer(self, request: Request, images: tuple[bytes, ...]) -> Reply:
        """Attempt the request until a reply is ok or no attempt is left."""
        start, spent, calls, failures, max_tokens = time.monotonic(), [0, 0], 0, 0, request.max_tokens
        reply = Reply("error", reason="never asked")
        for attempt in range(self.limits.answer_retries + 1):
            while True:
                calls += 1
                try:
                    completion = await self._call(request, images, max_tokens, attempt)
                    break
                except Failure as failure:
                    self.faults[failure.kind] += 1
                    failures += 1
                    self._give_up_without_server(failure)
                    if not failure.transient or failures > self.limits.retries:
                        return Reply("error", reason=str(failure), transient=failure.transient, attempts=calls)
                    await asyncio.sleep(self._wait(failure, failures))
            spent[0] += completion.prompt_tokens
            spent[1] += completion.completion_tokens
            reply = _judged(completion, request, max_tokens, self._varies)
            if reply.outcome == "ok":
                break
            self.faults[reply.outcome if reply.outcome != "error" else "malformed"] += 1
            if reply.outcome == "truncated":
                max_tokens = min(2 * max_tokens, max(self.limits.longest_answer, request.max_tokens))
        return dataclasses.replace(
            reply,
            attempts=calls,
            spent_prompt_tokens=spent[0],
            spent_completion_tokens=spent[1],
            seconds=round(time.monotonic() - start, 4),
        )

    async def _call(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """One attempt, after waiting for the limits. Raises Failure."""
        async with self._turns:
            await self._requests.take()
            await self._tokens.take(len(request.text) / 4 + max_tokens)
            start = time.monotonic()
            self.counts["calls"] += 1
            completion = await self.backend.complete(request, images, max_tokens, attempt)
        self._unreachable = -1
        self.latencies.append(time.monotonic() - start)
        self.counts["prompt_tokens"] += completion.prompt_tokens
        self.counts["completion_tokens"] += completion.completion_tokens
        return completion

    def _wait(self, failure: Failure, failures: int) -> float:
        """Seconds before the next attempt, spread by an eighth, so that calls that failed together retry apart."""
        if failure.retry_after is not None:
            return min(failure.retry_after, self.limits.longest_wait)
        spread = 1 + (self.counts["calls"] % 8) / 64
        return min(self.limits.first_wait * 2.0 ** (failures - 1) * spread, self.limits.longest_wait)

    def _give_up_without_server(self, failure: Failure) -> None:
        if failure.kind != "connection" or self._unreachable < 0:
            return
        self._unreachable += 1
        if self._unreachable >= _UNREACHABLE_AFTER:
            raise UserError(f"backend {self.backend.name}: no server answers there ({failure})")

    def summary(self) -> dict[str, Any]:
        """Counts, faults by kind and latency percentiles in seconds."""
        ordered = sorted(self.latencies)
        at = {f"p{p}": round(ordered[len(ordered) * p // 100], 3) for p in (50, 95, 99)} if ordered else {}
        return {"model": self.backend.model, **self.counts, "faults": dict(self.faults), "latency_seconds": at}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Failure("image", f"{path}: {error.strerror or error}", transient=False) from None


def _judged(completion: Completion, request: Request, max_tokens: int, varies: bool) -> Reply:
    """The outcome of an answer; `varies` says whether another attempt may avoid an error."""
    text = completion.text.strip()
    tokens: dict[str, Any] = {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }
    if len(text) > _LETTERS_A_TOKEN * max_tokens:
        reason = f"malformed: {len(text):,} characters, too many for {max_tokens:,} tokens"
        return Reply("error", reason=reason, transient=varies, **tokens)
    if completion.finish == "refused":
        return Reply("refused", text, reason="the model's filter", **tokens)
    if completion.finish == "length":
        return Reply("truncated", text, reason="longer than max_tokens", **tokens)
    if request.schema is None:
        if not text:
            return Reply("error", reason="malformed: empty answer", transient=varies, **tokens)
        if is_refusal(text[:120]):
            return Reply("refused", text, reason="the answer declines", **tokens)
    return _with_data(Reply("ok", text, **tokens), request, varies)


def _with_data(reply: Reply, request: Request, varies: bool) -> Reply:
    """The reply with its answer parsed by the request's schema, or an error if the answer violates it."""
    if request.schema is None or reply.outcome != "ok":
        return reply
    try:
        data = json_of(reply.text)
    except ValueError as error:
        if is_refusal(reply.text[:120]):
            return dataclasses.replace(reply, outcome="refused", reason="the answer declines")
        problem = str(error)
    else:
        problem = mistake(data, request.schema)
        if not problem:
            return dataclasses.replace(reply, data=writable(data))
    return dataclasses.replace(reply, outcome="error", transient=varies, reason=f"malformed: {problem}")
