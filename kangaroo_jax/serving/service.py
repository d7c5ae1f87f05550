"""From a request's body to tickets of the engine: every step may be given up, and leaves nothing behind."""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.inference.grammars import Grammar
from kangaroo_jax.inference.requests import Answer, EngineError, Event, Request, Ticket
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.serving.admission import Admission
from kangaroo_jax.serving.answers import work_of
from kangaroo_jax.serving.backend import Backend
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.forms import Form
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.media import RequestMedia
from kangaroo_jax.serving.metrics import Metrics
from kangaroo_jax.serving.prompts import Rendered, exceeds, seen, without_paths
from kangaroo_jax.serving.protocol import SEEDS, ChatRequest, Prompt
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.serving.turnstile import Turnstile
from kangaroo_jax.system.json_text import utf8

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_POLL = 0.2  # seconds between two looks at whether a client is still there
_MOST_NAMED = 8  # unknown fields that a line of the log names
_PROBED = 2  # requests of one key whose files are looked into at a time

Outcome = tuple[int, Event | Answer | Exception]  # of which choice, and what came


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@dataclasses.dataclass
class Call:
    """A request of a client, and what the access line says of it."""

    number: str
    key: bytes = b""  # digest of the API key
    begun: float = dataclasses.field(default_factory=time.monotonic)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Service:
    """The server without HTTP."""

    def __init__(
        self,
        names: tuple[str, ...],
        limits: Limits,
        store: MediaStore,
        *,
        share_cache: bool = False,
        several_keys: bool = False,
    ) -> None:
        """What serves requests.

        Args:
            names: of the model.
            limits: bounds.
            store: files of requests.
            share_cache: what one API key's requests left may serve another's.
            several_keys: no API key takes more of what there is than it leaves to others.
        """
        self.names, self.limits, self.store = names, limits, store
        self.admission = Admission(limits, several=several_keys)
        self._probing = Turnstile(_PROBED)
        self.metrics = Metrics(self._now)
        self.backend: Backend | None = None
        self.state = "starting"
        self._share = share_cache
        self._running: set[Running] = set()
        self._given_up = False
        # One a request, so that nobody waits behind media that come slowly.
        self._threads = ThreadPoolExecutor(limits.max_requests, thread_name_prefix="media")

    def ready(self) -> Backend:
        """What answers. Raises ApiError while it is not there."""
        if self.backend is None:
            raise ApiError(f"the model is not ready: {self.state}", status=503, code="not_ready", retry_after=5)
        if self.backend.failed is not None:
            raise ApiError("the engine has failed", status=503, code="engine_failed")
        return self.backend

    def model(self, name: str | None) -> str:
        """The name under which the model answers. Raises ApiError where it is another's."""
        if name is not None and name not in self.names:
            raise ApiError(
                f"there is no model {printable(name)!r} here; there is {', '.join(self.names)}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return name or self.names[0]

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, done beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def while_there(self, is_gone: Callable[[], Awaitable[bool]], work: Awaitable[Result]) -> Result:
        """What `work` comes to; it is given up when the client goes. Raises ClientLeft."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL)
                if self._given_up:
                    raise _going_down()
                if not task.done() and await is_gone():
                    raise ClientLeft
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(Exception, asyncio.CancelledError):
                    await task
            del task  # with its error it would keep this frame, and that a whole body, until garbage is collected

    # ------------------------------------------------------------------------------ a prompt

    async def rendered(
        self, prompt: Prompt, namespace: bytes, call: Call, stack: contextlib.AsyncExitStack
    ) -> Rendered:
        """The prompt, its media local files until `stack` is closed. Raises ApiError."""
        backend = self.ready()
        media = RequestMedia(self.store, namespace, call.key, alone=self.admission.alone(call.key))
        stack.callback(media.close)

        def make() -> Rendered:
            texts = [part for message in prompt.messages for part in message.parts if isinstance(part, str)]
            if exceeds(backend.tokenizer, texts, backend.context):
                raise _too_long(f"more than {backend.context} tokens", backend.context)
            found = [media.fetch(part) for part in prompt.media]
            try:
                with self._probing.passed(call.key, media.checked) if found else contextlib.nullcontext():
                    return backend.prompts.render(prompt, found, media.names)
            except UserError as error:
                raise without_paths(error, media.names) from None

        rendered = await self.in_thread(make)
        length = len(rendered.recipe.tokens)
        if length + 1 > backend.context:
            raise _too_long(f"{length} tokens, and with one of an answer {length + 1}", backend.context)
        return rendered

    def namespace(self, call: Call, salt: str) -> bytes:
        """Who may share what is remembered: a digest of the key and the salt, neither of which passes for the other."""
        key = b"" if self._share else call.key
        told = hashlib.sha256(b"kangaroo namespace 1\0")
        for part in (key, utf8(salt)):
            told.update(len(part).to_bytes(8, "little") + part)
        return told.digest()

    # ------------------------------------------------------------------------------ an answer

    async def begin(self, request: ChatRequest, call: Call, stack: contextlib.AsyncExitStack) -> "Running":
        """The request on its way through the engine until `stack` is closed. Raises ApiError."""
        backend, prompt = self.ready(), request.prompt
        engine = backend.engine_of(self.model(prompt.model))
        if prompt.unknown:
            log.info(
                "%s: unknown fields: %s",
                call.number,
                printable(", ".join(n[:40] for n in prompt.unknown[:_MOST_NAMED])),
            )
        namespace = self.namespace(call, prompt.cache_salt)
        rendered = await self.rendered(prompt, namespace, call, stack)
        recipe = rendered.recipe
        call.notes |= {"prompt": len(recipe.tokens), "frames": recipe.frames}
        frames = stack.enter_context(contextlib.ExitStack())
        frames.enter_context(self.admission.decoding(call.key, recipe.frames))
        room = backend.context - len(recipe.tokens)
        asked = Request(
            tokens=recipe.tokens,
            is_vision=recipe.is_vision,
            media=recipe.media,
            max_new_tokens=max(1, min(room, room if request.max_tokens is None else request.max_tokens)),
            stop_ids=(*(() if request.ignore_eos else backend.tokenizer.stop_ids), *request.stop_ids),
            stop=request.stop,
            namespace=namespace,
            owner=call.key,
            begun=prompt.continue_final_message,
            logprobs=request.logprobs,
            grammar=None if request.form is None else await self._grammar(backend, request.form),
        )
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        running = Running(rendered, frames)
        self._running.add(running)
        stack.callback(self._running.discard, running)
        stack.callback(running.cancel)
        try:
            for index in range(request.n):
                sampling = _sampling(request, (seed + index) % SEEDS)
                running.add(engine.submit(dataclasses.replace(asked, sampling=sampling)), index)
        except EngineError as error:
            log.error("%s: %s", call.number, error)
            raise ApiError("the engine takes no requests", status=503, code="engine_failed") from None
        return running

    async def _grammar(self, backend: Backend, form: Form) -> Grammar:
        try:
            return await self.in_thread(lambda: backend.grammars.of(form.kind, form.text))
        except UserError as error:
            raise ApiError(f"{form.field}: {error}", param=form.field) from None

    def answered(self, answers: list[Answer], rendered: Rendered, call: Call) -> dict[str, Any]:
        """Count finished answers; what their `kangaroo` field says."""
        usages = [answer.usage for answer in answers]
        for usage in usages:
            self.metrics.answered(usage)
        call.notes |= {"cached": usages[0].cached_tokens, "new": sum(usage.completion_tokens for usage in usages)}
        return seen(rendered, usages[0].frame_times) | work_of(usages)

    def give_up(self) -> None:
        """Tell everybody who still waits that there will be no answer."""
        self._given_up = True
        for running in self._running:
            running.cancel()

    def close(self) -> None:
        """End what answers, and threads."""
        if self.backend is not None:
            self.backend.close()
        self._threads.shutdown(cancel_futures=True)
        self.store.close()

    def _now(self) -> dict[str, float]:
        stats = self.backend.stats() if self.backend is not None else {}
        return {**stats, "media_bytes": self.store.written, "requests": self.admission.requests}


class Running:
    """Tickets of one request, one a choice, and what comes of them, for the event loop."""

    def __init__(self, rendered: Rendered, frames: contextlib.ExitStack) -> None:
        """`frames`: closed when all frames have been decoded and looked at."""
        self.rendered = rendered
        self._frames = frames
        self._tickets: list[Ticket] = []
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

    def add(self, ticket: Ticket, index: int) -> None:
        """Listen to another choice."""
        loop = asyncio.get_running_loop()
        self._tickets.append(ticket)

        def tell(outcome: Event | Answer | Exception) -> None:
            loop.call_soon_threadsafe(self._outcomes.put_nowait, (index, outcome))

        ticket.add_listener(tell)

    async def outcomes(self) -> AsyncIterator[tuple[int, Event | Answer]]:
        """What comes, until every choice has its answer. Raises ApiError."""
        left = len(self._tickets)
        while left:
            index, outcome = await self._outcomes.get()
            self._frames.close()
            if isinstance(outcome, Exception):
                raise failure(outcome, self.rendered)
            if isinstance(outcome, Answer) and outcome.finish_reason == "cancelled":
                raise _going_down()
            left -= isinstance(outcome, Answer)
            yield index, outcome

    async def answers(self) -> list[Answer]:
        """All answers. Raises ApiError."""
        found: dict[int, Answer] = {}
        async for index, outcome in self.outcomes():
            if isinstance(outcome, Answer):
                found[index] = outcome
        return [found[index] for index in sorted(found)]

    def cancel(self) -> None:
        """Nobody waits for what is not done."""
        for ticket in self._tickets:
            if not ticket.done:
                ticket.cancel()


def _too_long(tokens: str, context: int) -> ApiError:
    return ApiError(
        f"the prompt has {tokens}, but a conversation may have {context} (--context); "
        "shorten it or ask for fewer frames",
        param="messages",
        code="context_length_exceeded",
    )


def _going_down() -> ApiError:
    return ApiError("the server is going down, and gave this answer up", status=503, code="draining")


def failure(error: Exception, rendered: Rendered) -> ApiError:
    """What a client is told of an error of the engine: no path of this machine, no line of its code."""
    if isinstance(error, UserError):
        return without_paths(error, rendered.names)
    log.error("the engine failed: %s", error)
    return ApiError("the engine failed on this request", status=500, code="engine_error")


def _sampling(request: ChatRequest, seed: int) -> Sampling:
    try:
        return Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=seed,
            top_k=request.top_k,
            min_p=request.min_p,
            presence=request.presence_penalty,
            frequency=request.frequency_penalty,
            repetition=request.repetition_penalty,
            bias=request.logit_bias,
        )
    except UserError as error:
        raise ApiError(str(error)) from None
