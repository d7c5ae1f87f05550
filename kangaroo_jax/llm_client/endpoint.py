"""A backend over HTTP: any server that speaks OpenAI's chat completions (vLLM, SGLang, `kangaroo serve`, ...).

A server may send anything. Whatever is not a valid answer becomes a `Failure`. Bodies are read up to limits of size and
time, redirects are not followed, and the API key is removed from every text that comes back.
"""

import asyncio
import base64
import contextlib
import email.utils
import functools
import importlib.util
import json
import math
import os
import ssl
import time
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.requests import Completion, Failure, Request
from kangaroo_jax.system.installing import install_line

_FATAL = {401: "the key is wrong", 403: "the key may not use this model", 404: "no such model or address"}
_POOLS = 8  # pools of connections
_LONGEST_BODY = 8 << 20  # bytes of a response; a long answer has about 40,000
_MOST_TOKENS = 1 << 40  # the largest token count that is accepted from a server
_SHORTEST_KEY = 8  # characters; a shorter key is no secret, and may be a word in an answer
_SIGNATURES = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


class Endpoint:
    """A model behind an address.

    It uses the `openai` client without its retries; the caller counts and bounds retries (`client.Client`).
    """

    cached = True

    def __init__(
        self,
        name: str,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "",
        timeout: float = 120.0,
        structured: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`api_key_env` names the environment variable that holds the key. `timeout` is in seconds, for a whole call.

        `settings` go into every request (temperature, top_p, seed, ...). `structured` asks for schemas by
        `response_format`; without it they are only checked.

        Raises UserError if `openai` is not installed, or the key's variable is not set.
        """
        if importlib.util.find_spec("openai") is None:
            raise UserError(f"the package openai is missing: {install_line('curation')}")
        self.name, self.model, self.settings = name, model, dict(settings or {})
        self._structured, self._url, self._timeout = structured, base_url, timeout
        self._key, self._busy = _key(name, api_key_env), [0] * _POOLS

    @functools.cached_property
    def _clients(self) -> list[Any]:
        """The clients, made at the first call: that takes a second, and a fully cached run needs none.

        Each has its own pool of connections. A pool looks at all its connections for every request, so one pool for 64
        requests at a time takes twice the CPU time of eight.
        """
        import openai

        options: dict[str, Any] = {"base_url": self._url, "api_key": self._key, "max_retries": 0}
        options["default_headers"] = {"Accept-Encoding": "gzip, deflate"}
        context = ssl.create_default_context()  # certificates of the system, and of the package that the clients use
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
        http: dict[str, Any] = {"verify": context, "follow_redirects": False, "event_hooks": {"response": [_read_body]}}
        return [
            openai.AsyncOpenAI(**options, timeout=self._timeout, http_client=openai.DefaultAsyncHttpxClient(**http))
            for _ in range(_POOLS)
        ]

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """See `Backend`. Another attempt has another seed."""
        body = self._body(request, images, max_tokens, attempt)
        import openai

        try:
            # The client's `chat.completions.create` validates the body and the answer against its types, which takes
            # more than half of its CPU time.
            async with asyncio.timeout(self._timeout):  # the client's own restarts with each part of an answer
                content = await self._post(body)
        except (openai.APITimeoutError, TimeoutError):
            raise Failure("timeout") from None
        except openai.APIStatusError as error:
            raise self._failure(error) from None
        except (openai.OpenAIError, _TooLong) as error:
            cause = error.__cause__ or error
            kind = "malformed" if isinstance(cause, _TooLong) else "connection"
            raise Failure(kind, self._without_key(str(cause))[:200]) from None
        return self._completion(content)

    async def _post(self, body: dict[str, Any]) -> str:
        """The body of the response, by the least busy client."""
        number = min(range(_POOLS), key=self._busy.__getitem__)
        self._busy[number] += 1
        try:
            answer: str = await self._clients[number].post("/chat/completions", cast_to=str, body=body)
            return answer
        finally:
            self._busy[number] -= 1

    def _body(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> dict[str, Any]:
        content: Any = request.text
        if images or request.frames:
            content = [*map(_image_part, images), *([_video_part(request)] if request.frame_times else [])]
            content += map(_image_part, request.frames[len(request.frame_times) :])
            content.append({"type": "text", "text": request.text})
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        if request.prefill:  # as vLLM and `kangaroo serve` know it
            body["messages"].append({"role": "assistant", "content": request.prefill})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        body |= self.settings
        body["max_tokens"] = max_tokens
        if attempt:
            body["seed"] = body.get("seed", 0) + attempt
        if request.schema is not None and self._structured:
            name = request.prompt.split(".")[0]
            form = {"name": name, "schema": dict(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def _failure(self, error: Any) -> Failure:
        """The failure for an HTTP status. Raises UserError for a status that every request would get."""
        status, headers = error.status_code, error.response.headers
        if 300 <= status < 400:
            where = self._without_key(headers.get("location", "nowhere"))[:200]
            detail = f"leads to {where}, which is not followed; set base_url to the address that answers"
            return Failure(f"status {status}", detail, transient=False)
        detail = self._without_key(" ".join(str(error.message).split()))[:200]
        if status in _FATAL:
            raise UserError(f"backend {self.name} ({self._url}): status {status}, {_FATAL[status]}: {detail}") from None
        transient = status in (408, 409, 429) or status >= 500
        return Failure(f"status {status}", detail, transient=transient, retry_after=_seconds(headers))

    def _completion(self, content: str) -> Completion:
        """The answer in a response's body. Raises Failure if the body violates the protocol."""
        try:
            body = json.loads(content)
            choice, usage = body["choices"][0], body.get("usage") or {}
            message, finish = choice["message"], choice.get("finish_reason")
            refusal, text = (message.get(key) or "" for key in ("refusal", "content"))
            tokens = [usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Failure("malformed", f"no chat completion ({type(error).__name__})") from None
        if not isinstance(refusal, str) or not isinstance(text, str):
            raise Failure("malformed", "no chat completion (its content is no text)")
        if not all(isinstance(count, int | float) and 0 <= count < _MOST_TOKENS for count in tokens):
            raise Failure("malformed", "no chat completion (its counts of tokens are none)")
        prompt, completion = map(int, tokens)
        if refusal or finish == "content_filter":
            return Completion(self._text(refusal or text), "refused", prompt, completion)
        return Completion(self._text(text), "length" if finish == "length" else "stop", prompt, completion)

    def _text(self, text: str) -> str:
        """A text of an answer, made valid UTF-8 and without the key."""
        return self._without_key(text.encode("utf-8", "replace").decode())

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _SHORTEST_KEY else text

    async def close(self) -> None:
        """See `Backend`."""
        if "_clients" in self.__dict__:
            for client in self._clients:
                await client.close()


class _TooLong(Exception):
    """A response is longer than any answer, or may be."""


async def _read_body(response: Any) -> None:
    """Read a response, as httpx would do next, but only up to the limit. Raises _TooLong.

    A compressed part is decompressed whole. With one of the offered encodings it grows at most a thousand times.
    """
    packed = response.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity", "gzip", "deflate"):
        await response.aclose()
        raise _TooLong(f"a body that is packed in a way that was not offered ({packed[:40]})")
    parts, size = [], 0
    async for part in response.aiter_bytes(1 << 16):
        size += len(part)
        if size > _LONGEST_BODY:
            await response.aclose()
            raise _TooLong(f"a body of more than {_LONGEST_BODY >> 20} MiB")
        parts.append(part)
    response._content = b"".join(parts)


def _image_part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def _video_part(request: Request) -> dict[str, Any]:
    """The frames of a video in the form of vLLM, and their seconds, which `kangaroo serve` reads."""
    frames = request.frames[: len(request.frame_times)]
    encoded = ",".join(base64.b64encode(frame).decode() for frame in frames)
    address = {"url": f"data:video/jpeg;base64,{encoded}"}
    return {"type": "video_url", "video_url": address, "frame_times": list(request.frame_times)}


def data_uri(image: bytes) -> str:
    """An image as a data: address. Raises Failure for bytes that are no JPEG, PNG, WebP or GIF."""
    for signature, kind in _SIGNATURES:
        if image.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    raise Failure("image", "no JPEG, PNG, WebP or GIF", transient=False)


def _key(name: str, variable: str) -> str:
    if not variable:
        return "none"  # for a server without keys, as the client requires one
    if not os.environ.get(variable):
        raise UserError(f"backend {name}: the environment variable {variable} (its API key) is not set")
    return os.environ[variable]


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `retry-after-ms` or `Retry-After` (a number or a date)."""
    for key, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(key)
        if value is None:
            continue
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = float(value) * unit
            if not math.isnan(seconds):
                return max(seconds, 0.0)
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
