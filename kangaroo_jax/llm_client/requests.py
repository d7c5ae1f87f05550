"""Requests to models and their replies: the types that every backend shares."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

OUTCOMES = ("ok", "truncated", "refused", "error")


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a model.

    `prompt` is the version of the prompt that the text was made from (`prompts.Prompt.version`), `images` are
    paths of JPEG or PNG files that stand before the text, `schema` is a JSON schema that the answer must obey
    (None: plain text). `task` has the contents of the text for a rule-based backend; it is not in the cache key.

    For endpoints alone: `frames` are JPEG files before the text, first those of a video, whose seconds are
    `frame_times`, then images; `prefill` is how the answer begins.
    """

    prompt: str
    text: str
    system: str = ""
    images: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    max_tokens: int = 256
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frames: tuple[bytes, ...] = ()
    frame_times: tuple[float, ...] = ()
    prefill: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A backend's unprocessed answer. `finish` is "stop", "length" or "refused"."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Failure(Exception):
    """A call without an answer.

    `kind` is the name under which it is counted (timeout, status 429, ...), `transient` says whether another attempt
    may succeed, `retry_after` is the number of seconds that the server asked to wait.
    """

    def __init__(self, kind: str, detail: str = "", *, transient: bool = True, retry_after: float | None = None):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.transient, self.retry_after = kind, transient, retry_after


@dataclasses.dataclass(frozen=True)
class Reply:
    """The result of a request, after retries. `data` is the parsed answer if the request has a schema.

    `outcome` is one of `OUTCOMES`; `reason` explains one that is not ok. `transient` marks an error that another
    run may not have. `attempts` is 0 for a cached reply. Token counts are those of the final answer; `spent_*` are
    those of all attempts.
    """

    outcome: str
    text: str = ""
    data: Any = None
    reason: str = ""
    transient: bool = False
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spent_prompt_tokens: int = 0
    spent_completion_tokens: int = 0
    seconds: float = 0.0


class Backend(Protocol):
    """Something that answers requests."""

    @property
    def name(self) -> str:
        """Its name in the config."""

    @property
    def model(self) -> str:
        """The model that answers."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings that affect an answer besides the request: temperature, seed, ..."""

    @property
    def cached(self) -> bool:
        """Whether its answers go into the cache."""

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """One attempt, counted from 0. Raises Failure; UserError if no request can succeed."""

    async def close(self) -> None:
        """Release connections and memory."""


def key_of(backend: Backend, request: Request, images: tuple[bytes, ...]) -> str:
    """SHA-256 of all that the answer depends on: model, parameters, prompt and its version, bytes of the images."""
    parts: dict[str, Any] = {
        "model": backend.model,
        "settings": dict(backend.settings),
        "prompt": request.prompt,
        "system": request.system,
        "text": request.text,
        "schema": request.schema,
        "max_tokens": request.max_tokens,
        "images": [hashlib.sha256(image).hexdigest() for image in images],
    }
    if request.frames or request.prefill:
        parts |= {"frames": [hashlib.sha256(frame).hexdigest() for frame in request.frames]}
        parts |= {"frame_times": request.frame_times, "prefill": request.prefill}
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def canonical(value: Any) -> str:
    """Canonical JSON: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")
