"""The HTTP side: routes, bodies, streams. What is done on the event loop is short; the rest is done in threads."""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse

import kangaroo_jax
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.requests import Answer
from kangaroo_jax.serving import schema
from kangaroo_jax.serving.answers import DONE, Writer, encoded, event
from kangaroo_jax.serving.failures import ApiError, too_large
from kangaroo_jax.serving.gate import Gate
from kangaroo_jax.serving.limits import MIB
from kangaroo_jax.serving.prompts import exceeds
from kangaroo_jax.serving.protocol import ChatRequest, chat_request, tokenize_request
from kangaroo_jax.serving.reading import parsed
from kangaroo_jax.serving.service import Call, ClientLeft, Running, Service

log = logging.getLogger(__name__)
Handler = Callable[[HttpRequest, Call, contextlib.AsyncExitStack], Awaitable[Response]]
_TEXTS = 4  # conversations' worth of tokens that a text may have which is only counted
CLIENT_LEFT = 499  # the status of the access line; nobody receives it


def make_app(
    service: Service, *, keys: tuple[str, ...] = (), origins: tuple[str, ...] = (), root_path: str = ""
) -> Any:
    """The application.

    Args:
        service: what answers.
        keys: API keys, any of which opens all routes but /health and /ping; (): everybody may ask.
        origins: of pages of other hosts that may ask from a browser.
        root_path: before all routes, where a proxy has it.
    """
    app = FastAPI(
        title="kangaroo_jax", version=kangaroo_jax.__version__, docs_url=None, redoc_url=None, root_path=root_path
    )
    routes = Routes(service)
    for path, handler, method in (
        ("/health", routes.health, "GET"),
        ("/ping", routes.ping, "GET"),
        ("/ping", routes.ping, "POST"),
        ("/version", routes.version, "GET"),
        ("/v1/models", routes.models, "GET"),
    ):
        app.add_api_route(path, handler, methods=[method])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], response_class=PlainTextResponse)
    for path, asked, told in (
        ("/v1/chat/completions", routes.chat, schema.chat(service.limits)),
        ("/tokenize", routes.tokenize, schema.tokenize(service.limits)),
    ):
        app.add_api_route(
            path, routes.asked(asked), methods=["POST"], openapi_extra=told, summary=inspect.getdoc(asked)
        )
    app.add_exception_handler(HTTPException, _http_error)
    gate: Any = Gate(app, service, keys)
    if origins:
        gate = CORSMiddleware(
            gate, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"], expose_headers=["X-Request-Id"]
        )
    return gate


class Routes:
    """What each address does."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self) -> Response:
        """200 where requests are answered; 503 while the model is loaded or compiled, or when it has failed."""
        if self._service.admission.draining:
            return failed(ApiError("the server is going down", status=503, code="draining"))
        try:
            self._service.ready()
        except ApiError as error:
            return failed(error)
        return answer({"status": "ok"})

    async def ping(self) -> Response:
        """200 where the process runs."""
        return answer({})

    async def version(self) -> Response:
        """The version of this package."""
        return answer({"version": kangaroo_jax.__version__})

    async def metrics(self) -> Response:
        """Prometheus' text."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """The names of the model."""
        length = self._service.backend.context if self._service.backend is not None else None
        cards = [
            {"id": name, "object": "model", "created": _STARTED, "owned_by": "kangaroo_jax", "max_model_len": length}
            for name in self._service.names
        ]
        return answer({"object": "list", "data": cards})

    def asked(self, handler: Handler) -> Callable[[HttpRequest], Awaitable[Response]]:
        """A route whose handler gets a place among the requests, which it keeps until its answer is sent."""

        async def route(http: HttpRequest) -> Response:
            call: Call = http.scope["kangaroo.call"]
            async with contextlib.AsyncExitStack() as stack:
                try:
                    self._service.ready()
                    stack.enter_context(self._service.admission.request(call.key))
                    async with asyncio.timeout(self._service.limits.max_request_seconds):
                        response = await handler(http, call, stack)
                except (ClientLeft, ClientDisconnect):
                    call.notes["left"] = "yes"
                    return Response(status_code=CLIENT_LEFT)
                except Exception as error:
                    return failed(told(error, call))
                if isinstance(response, Stream):
                    response.keep(stack.pop_all())
                return response

        return route

    async def chat(self, http: HttpRequest, call: Call, stack: contextlib.AsyncExitStack) -> Response:
        """The answers to a conversation, whole or streamed."""
        service = self._service
        request, running = await service.while_there(http.is_disconnected, self._begun(http, call, stack))
        writer = Writer(
            f"chatcmpl-{call.number}",
            service.model(request.prompt.model),
            int(time.time()),
            service.ready().tokenizer,
            silent=request.max_tokens == 0,
        )
        if request.stream:
            return Stream(self._pieces(request, running, writer, call))
        answers = await service.while_there(http.is_disconnected, running.answers())
        told = service.answered(answers, running.rendered, call)
        return answer(await service.in_thread(lambda: encoded(writer.whole(answers, told))))

    async def tokenize(self, http: HttpRequest, call: Call, stack: contextlib.AsyncExitStack) -> Response:
        """The ids of a text, or of a prompt with its media."""
        service, backend = self._service, self._service.ready()
        tokenizer, most = backend.tokenizer, _TEXTS * backend.context

        def counted(text: str) -> list[int]:
            if exceeds(tokenizer, [text], most):
                raise ApiError(f"the text has more than {most} tokens", param="prompt", status=413, code="too_large")
            return tokenizer.encode(text)

        async def ids() -> tuple[list[int], bool]:
            async with self._body(http, call) as body:
                limits = service.limits
                request = await service.in_thread(lambda: tokenize_request(parsed(body), limits))
                if request.prompt is None:
                    text = request.text or ""
                    head = [*tokenizer.prefix] if request.add_special_tokens else []
                    return head + await service.in_thread(lambda: counted(text)), request.token_strings
                service.model(request.prompt.model)
                namespace = service.namespace(call, request.prompt.cache_salt)
                rendered = await service.rendered(request.prompt, namespace, call, stack)
                return rendered.recipe.tokens.tolist(), request.token_strings

        tokens, strings = await service.while_there(http.is_disconnected, ids())

        def said() -> bytes:
            names = [tokenizer.decode([token]) for token in tokens] if strings else None
            counts = {"count": len(tokens), "max_model_len": backend.context}
            return encoded(counts | {"tokens": tokens, "token_strs": names})

        return answer(await service.in_thread(said))

    async def _begun(
        self, http: HttpRequest, call: Call, stack: contextlib.AsyncExitStack
    ) -> tuple[ChatRequest, Running]:
        service, limits = self._service, self._service.limits
        async with self._body(http, call) as body:
            request = await service.in_thread(lambda: chat_request(parsed(body), limits))
            return request, await service.begin(request, call, stack)

    @contextlib.asynccontextmanager
    async def _body(self, http: HttpRequest, call: Call) -> Any:
        """The bytes of a request, counted as they come. Raises ApiError."""
        limits, admission = self._service.limits, self._service.admission
        if http.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("a body with a Content-Encoding is not read", status=415, code="unsupported_encoding")
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(limits.max_body_seconds):
                    async for piece in http.stream():
                        self._take(http, call, body, piece)
            except TimeoutError:
                seconds = f"{limits.max_body_seconds:g} s (--max-body-seconds)"
                raise ApiError(f"the body is not here after {seconds}", status=408) from None
            yield body
        finally:
            admission.shrink(call.key, len(body))

    def _take(self, http: HttpRequest, call: Call, body: bytearray, piece: bytes) -> None:
        """Another piece of a body. Raises ApiError where it is one too many."""
        limit, size = self._service.limits.max_body_mb, len(body) + len(piece)
        if size > limit * MIB:
            stated = http.headers.get("content-length", "")
            whole = int(stated) if stated.isascii() and stated.isdigit() and len(stated) < 16 else 0
            raise too_large("a body", max(whole, size) / MIB, limit, "max_body_mb")
        self._service.admission.grow(call.key, len(piece))
        body += piece

    async def _pieces(self, request: ChatRequest, running: Running, writer: Writer, call: Call) -> Any:
        """The events of a streamed answer."""
        service, answers = self._service, {}
        left = service.limits.max_request_seconds - (time.monotonic() - call.begun)
        try:
            async with asyncio.timeout(left):
                for index in range(request.n):
                    yield writer.piece(index, {"role": "assistant", "content": ""})
                async for index, outcome in running.outcomes():
                    if isinstance(outcome, Answer):
                        answers[index] = outcome
                        is_last = len(answers) == request.n
                        found = [answers[place] for place in sorted(answers)]
                        seen = service.answered(found, running.rendered, call) if is_last else None
                        yield writer.piece(index, {}, reason=writer.reason(outcome), told=seen)
                    elif request.max_tokens != 0 and (outcome.text or outcome.logprobs):
                        yield writer.piece(index, {"content": outcome.text}, outcome.logprobs)
                if request.include_usage:
                    yield writer.usage([answers[place].usage for place in sorted(answers)])
        except (asyncio.CancelledError, GeneratorExit):
            call.notes["left"] = "yes"
            raise
        except Exception as error:
            yield event(told(error, call).body())
        yield DONE


class Stream(StreamingResponse):
    """Events as they come; what the request holds is let go when the last is sent or the client has gone."""

    def __init__(self, pieces: Any) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._held = contextlib.AsyncExitStack()

    def keep(self, held: contextlib.AsyncExitStack) -> None:
        """What is let go at the end."""
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See `Response`."""
        async with self._held:
            await super().__call__(scope, receive, send)


def answer(value: Any) -> Response:
    """200 with JSON, given as its bytes where it is long."""
    body = value if isinstance(value, bytes) else encoded(value)
    return Response(body, media_type="application/json")


def failed(error: ApiError) -> Response:
    """An error in OpenAI's form."""
    return Response(
        encoded(error.body()), status_code=error.status, media_type="application/json", headers=dict(error.headers())
    )


def told(error: Exception, call: Call) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, ApiError):
        call.notes["error"] = error.code or error.status
        return error
    if isinstance(error, UserError):
        return ApiError(str(error))
    if isinstance(error, TimeoutError):
        return ApiError("the request took too long (--max-request-seconds)", status=504, code="timeout")
    log.exception("%s: an error of the server", call.number)
    return ApiError(f"an error of the server; its log has it under {call.number}", status=500)


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    """Addresses and methods that are not there."""
    assert isinstance(error, HTTPException)
    return failed(ApiError(str(error.detail), status=error.status_code))


_STARTED = int(time.time())
