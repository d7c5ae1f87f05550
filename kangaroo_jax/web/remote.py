"""A model behind a server's address (`kangaroo serve`, OpenAI's protocol)."""

import base64
import contextlib
import functools
import re
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import openai

from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.web.asking import MOST_TOKENS, Medium, Settings, Told, Turn

MOST_FRAMES = 512  # the slider's end; the server has the last word
TOP_P = 0.9
_TYPES = {"image": "image/png", "video": "video/mp4"}  # the server looks at the bytes
_LONGEST = 400  # characters of a server's message
_PLACE = re.compile(r"messages\[(\d{1,4})\]\.content\[(\d{1,4})\](?:\.\w+)*", re.ASCII)


class RemoteModel:
    """Answers through a server."""

    def __init__(self, address: str, key: str = "", name: str = "") -> None:
        """`key`: the server's API key; `name`: of the model, by default the server's first. Raises UserError."""
        self._address = address.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(base_url=f"{self._address}/v1", api_key=key or "none", max_retries=0, timeout=900)
        self.most_frames = MOST_FRAMES
        with self._errors():
            self.name = name or next((model.id for model in self._client.models.list()), "")
        if not self.name:
            raise UserError(f"--server={address}: it has no model")
        self._sent: set[tuple[str, str]] = set()  # (salt, digest) of what the server should still have

    def ask(self, turns: Sequence[Turn], settings: Settings, salt: str, *, silent: bool = False) -> "RemoteAnswer":
        """See `Model`."""
        media = [medium for turn in turns for medium in turn.media]
        video = {"num_frames": settings.frames} if settings.frames else {}
        options: dict[str, Any] = dict(
            model=self.name,
            temperature=settings.temperature,
            top_p=TOP_P,
            seed=settings.seed,
            max_tokens=0 if silent else MOST_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache_salt": salt, "media_io_kwargs": {"video": video}},
        )
        known = {medium.digest for medium in media if (salt, medium.digest) in self._sent}
        with self._errors(turns):
            try:
                stream = self._client.chat.completions.create(messages=_messages(turns, known), **options)
            except openai.BadRequestError:
                if not known:  # else it has forgotten what was sent
                    raise
                stream = self._client.chat.completions.create(messages=_messages(turns, set()), **options)
        self._sent |= {(salt, medium.digest) for medium in media}
        return RemoteAnswer(stream, functools.partial(self._errors, turns))

    def close(self) -> None:
        """See `Model`."""
        self._client.close()

    @contextlib.contextmanager
    def _errors(self, turns: Sequence[Turn] = ()) -> Iterator[None]:
        """Errors of the client inside are UserErrors of one line, in which media of `turns` have their names."""
        try:
            yield
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, Mapping) else {}
            text = _with_names(one_line(body.get("message") or error.message)[:_LONGEST], turns)
            raise UserError(f"the server says: {text} ({error.status_code})") from None
        except openai.APITimeoutError:
            raise UserError(f"the server at {self._address} does not answer in time") from None
        except openai.APIConnectionError:
            raise UserError(f"the server at {self._address} cannot be reached") from None
        except openai.OpenAIError as error:
            raise UserError(f"the server at {self._address}: {one_line(error)[:_LONGEST]}") from None


class RemoteAnswer:
    """See `Answering`."""

    planned: tuple[tuple[float, ...], ...] = ()

    def __init__(self, stream: Any, errors: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._stream, self._errors = stream, errors
        self._begun, self._first = time.monotonic(), 0.0
        self._cancelled = threading.Event()
        self._kangaroo: Mapping[str, Any] = types.MappingProxyType({})
        self._usage: Any = None
        self._reason = "stop"

    def seen(self) -> tuple[float, ...] | None:
        """See `Answering`."""
        return None

    def pieces(self) -> Iterator[str]:
        """See `Answering`."""
        try:
            with self._errors():
                for chunk in self._stream:
                    if self._cancelled.is_set():
                        return
                    self._usage = chunk.usage or self._usage
                    self._kangaroo = getattr(chunk, "kangaroo", None) or self._kangaroo
                    for choice in chunk.choices:
                        self._reason = choice.finish_reason or self._reason
                        if choice.delta.content:
                            self._first = self._first or time.monotonic() - self._begun
                            yield choice.delta.content
        except Exception:  # of a connection that `cancel` has closed
            if not self._cancelled.is_set():
                raise
        finally:
            self._stream.close()

    def told(self) -> Told:
        """See `Answering`."""
        usage, work = self._usage, self._kangaroo
        details = getattr(usage, "prompt_tokens_details", None)
        return Told(
            finish_reason="cancelled" if self._cancelled.is_set() else self._reason,
            prompt_tokens=getattr(usage, "prompt_tokens", 0),
            cached_tokens=getattr(details, "cached_tokens", 0) or 0,
            new_tokens=getattr(usage, "completion_tokens", 0),
            frames_encoded=work.get("frames_encoded", 0),
            frames_reused=work.get("frames_reused", 0),
            first_token=work.get("seconds", {}).get("first_token", self._first),
            total=time.monotonic() - self._begun,
            seconds=tuple(tuple(medium.get("seconds", ())) for medium in work.get("media", ())),
        )

    def cancel(self) -> None:
        """See `Answering`."""
        self._cancelled.set()
        with contextlib.suppress(Exception):
            self._stream.close()


def _messages(turns: Sequence[Turn], known: set[str]) -> list[Any]:
    """Messages of the protocol; media of which the server knows the digest are named alone."""
    return [{"role": turn.role, "content": [_part(part, known) for part in turn.parts]} for turn in turns]


def _part(part: str | Medium, known: set[str]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    address = None
    if part.digest not in known:
        address = f"data:{_TYPES[part.kind]};base64,{base64.b64encode(part.path.read_bytes()).decode()}"
    kind = f"{part.kind}_url"
    return {"type": kind, kind: {"url": address}, "uuid": part.digest}


def _with_names(text: str, turns: Sequence[Turn]) -> str:
    """A server's message, with the names of files for the places in the request where they stood."""

    def name(match: re.Match[str]) -> str:
        turn, part = int(match[1]), int(match[2])
        there = turns[turn].parts[part] if turn < len(turns) and part < len(turns[turn].parts) else None
        return there.name if isinstance(there, Medium) else match[0]

    return _PLACE.sub(name, text)
