"""What clients get: answers of OpenAI's chat completions, whole or in pieces, with the frames that were seen."""

import json
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.inference.requests import Answer, Logprob, Usage
from kangaroo_jax.system.json_text import utf8

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


def encoded(value: Any) -> bytes:
    """JSON in UTF-8 on one line."""
    return utf8(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def usage_of(usages: Sequence[Usage], *, silent: bool = False) -> dict[str, Any]:
    """The `usage` of answers to one prompt; `silent`: the token that was chosen is not part of the answer."""
    prompt = usages[0].prompt_tokens
    new = 0 if silent else sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
    }


def work_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """What the answers took: frames decoded, encoded and remembered, and seconds by part of the first of them."""
    first = usages[0]
    parts = ("queue", "decode_frames", "encode", "prefill", "first_token", "total")
    return {
        "frames_decoded": sum(usage.frames_decoded for usage in usages),
        "frames_encoded": sum(usage.frames_encoded for usage in usages),
        "frames_reused": sum(usage.frames_reused for usage in usages),
        "seconds": {part: round(getattr(first, part), 4) for part in parts},
    }


class Writer:
    """Writes the answers of one request."""

    def __init__(self, number: str, model: str, created: int, tokenizer: Tokenizer, *, silent: bool = False) -> None:
        """`number`: the request's id; `silent`: nothing is to be said, the prompt is read alone."""
        self._head = {"id": number, "created": created, "model": model}
        self._tokenizer, self._silent = tokenizer, silent

    def whole(self, answers: Sequence[Answer], told: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `told` is its `kangaroo` field."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "" if self._silent else answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": self.reason(answer),
            }
            for index, answer in enumerate(answers)
        ]
        usages = [answer.usage for answer in answers]
        return self._head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(usages, silent=self._silent),
            "kangaroo": told,
        }

    def piece(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[Logprob] = (),
        reason: str | None = None,
        told: dict[str, Any] | None = None,
    ) -> bytes:
        """A chunk of a stream; the last of a choice has a `reason`, and the last of all what the frames were."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": reason,
        }
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return event(chunk if told is None else chunk | {"kangaroo": told})

    def usage(self, usages: Sequence[Usage]) -> bytes:
        """The chunk that `stream_options.include_usage` asks for."""
        counts = usage_of(usages, silent=self._silent)
        return event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": counts})

    def reason(self, answer: Answer) -> str:
        """The `finish_reason` of an answer."""
        return "length" if self._silent else answer.finish_reason

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not logprobs or self._silent:
            return None
        return {
            "content": [
                self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*best) for best in one.best]}
                for one in logprobs
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": max(float(logprob), _LEAST_LOGPROB), "bytes": list(utf8(text))}
