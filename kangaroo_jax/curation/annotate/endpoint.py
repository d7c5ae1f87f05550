"""A backend over HTTP: any server that speaks OpenAI's chat completions (vLLM, SGLang, `kangaroo serve`, ...)."""

import base64
import contextlib
import email.utils
import functools
import importlib.util
import json
import os
import ssl
import time
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.curation.annotate.requests import Completion, Failure, Request
from kangaroo_jax.errors import UserError
from kangaroo_jax.installing import install_line

_FATAL = {401: "the key is wrong", 403: "the key may not use this model", 404: "no such model or address"}
_POOLS = 8  # of connections
_SIGNATURES = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


class Endpoint:
    """A model behind an address.

    The `openai` client does the talking; retries are the caller's, who counts and bounds them (`client.Client`).
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
        """`api_key_env` names the environment variable that holds the key. `timeout` is in seconds.

        `settings` go into every request (temperature, top_p, seed, ...). `structured` asks for schemas by
        `response_format`; without it they are only checked.

        Raises UserError where `openai` is not installed, or the key's variable is not set.
        """
        if importlib.util.find_spec("openai") is None:
            raise UserError(f"the package openai is missing: {install_line('curation')}")
        self.name, self.model, self.settings = name, model, dict(settings or {})
        self._structured, self._url, self._timeout = structured, base_url, timeout
        self._key, self._busy = _key(name, api_key_env), [0] * _POOLS

    @functools.cached_property
    def _clients(self) -> list[Any]:
        """Made for the first call: a second is spent on them, and a run that finds all answers needs none.

        Each has its own pool of connections, all of which it looks at for every request: one pool for 64 requests at a
        time takes twice the CPU time of eight.
        """
        import openai

        options: dict[str, Any] = {"base_url": self._url, "api_key": self._key, "max_retries": 0}
        context = ssl.create_default_context()  # the system's certificates, and those of the package that clients use
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
        return [
            openai.AsyncOpenAI(
                **options, timeout=self._timeout, http_client=openai.DefaultAsyncHttpxClient(verify=context)
            )
            for _ in range(_POOLS)
        ]

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """See `Backend`. Another attempt has another seed."""
        body = self._body(request, images, max_tokens, attempt)
        import openai

        try:
            # The client's own `chat.completions.create` checks every key of the body against its types, and the
            # answer too: more than half of its CPU time.
            content = await self._post(body)
        except openai.APITimeoutError:
            raise Failure("timeout") from None
        except openai.APIConnectionError as error:
            raise Failure("connection", str(error.__cause__ or error)) from None
        except openai.APIStatusError as error:
            raise _failure(error, self._url, self.name) from None
        return _completion(content)

    async def _post(self, body: dict[str, Any]) -> str:
        """The body of the response, by the client that has least to do."""
        number = min(range(_POOLS), key=self._busy.__getitem__)
        self._busy[number] += 1
        try:
            return await self._clients[number].post("/chat/completions", cast_to=str, body=body)
        finally:
            self._busy[number] -= 1

    def _body(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> dict[str, Any]:
        content: Any = request.text
        if images:
            content = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
            content.append({"type": "text", "text": request.text})
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        body |= self.settings
        body["max_tokens"] = max_tokens
        if attempt:
            body["seed"] = body.get("seed", 0) + attempt
        if request.schema is not None and self._structured:
            name = request.prompt.split(".")[0]
            form = {"name": name, "schema": dict(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    async def close(self) -> None:
        """See `Backend`."""
        if "_clients" in self.__dict__:
            for client in self._clients:
                await client.close()


def data_uri(image: bytes) -> str:
    """An image inside an address. Raises Failure for bytes that are no JPEG, PNG, WebP or GIF."""
    for signature, kind in _SIGNATURES:
        if image.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    raise Failure("image", "no JPEG, PNG, WebP or GIF", transient=False)


def _key(name: str, variable: str) -> str:
    if not variable:
        return "none"  # of a server that wants no key; the client insists on one
    if not os.environ.get(variable):
        raise UserError(f"backend {name}: the environment variable {variable} (its API key) is not set")
    return os.environ[variable]


def _failure(error: Any, url: str, name: str) -> Failure:
    """What a status means. Raises UserError for one that every request will get."""
    status, detail = error.status_code, " ".join(str(error.message).split())[:200]
    if status in _FATAL:
        raise UserError(f"backend {name} ({url}): status {status}, {_FATAL[status]}: {detail}") from None
    transient = status in (408, 409, 429) or status >= 500
    wait = _seconds(error.response.headers)
    return Failure(f"status {status}", detail, transient=transient, retry_after=wait)


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, of `retry-after-ms` or `Retry-After` (a number or a date)."""
    for key, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(key)
        if value is None:
            continue
        try:
            return max(float(value) * unit, 0.0)
        except ValueError:
            pass
        try:
            return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
        except ValueError:
            pass
    return None


def _completion(content: str) -> Completion:
    """The answer in a response's body. Raises Failure where the body is not what the protocol says."""
    try:
        body = json.loads(content)
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal"), message.get("content") or ""
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Failure("malformed", f"no chat completion ({type(error).__name__})") from None
    if refusal or finish == "content_filter":
        return Completion(refusal or text, "refused", *tokens)
    return Completion(text, "length" if finish == "length" else "stop", *tokens)
