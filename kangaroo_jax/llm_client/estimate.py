"""Estimates the requests and the cost of a run before it starts."""

import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.llm_client.requests import Request
from kangaroo_jax.llm_client.team import backend_config, cost
from kangaroo_jax.llm_client.text import words

ANSWERED = 0.5  # assumed average length of an answer, as a share of the longest
TOKENS_A_WORD = 1.4  # assumed for Llama-like tokenizers, for English words and Chinese characters alike


def tokens_of(text: str) -> float:
    """The approximate number of tokens of a text, in either language."""
    return TOKENS_A_WORD * len(words(text)) + 0.3 * text.count("\n")


class Estimate:
    """Adds up requests by backend."""

    def __init__(self, backends: ConfigDict) -> None:
        """Prices and tokens for an image come from the config."""
        self._backends = backends
        self._sums: dict[str, dict[str, float]] = {}
        self._missing: set[str] = set()

    def add(self, name: str, requests: Sequence[Request], times: float = 1.0, kept: int = 0) -> None:
        """Add requests that a backend is asked `times` each; `kept` of them are in the cache."""
        config = backend_config(self._backends, name)
        sums = self._sums.setdefault(
            name, dict.fromkeys(("requests", "from_cache", "calls", "prompt_tokens", "completion_tokens"), 0.0)
        )
        share = 1 - kept / len(requests) if requests else 0.0
        for request in requests:
            self._missing.update(path for path in request.images if not os.path.isfile(path))
            prompt = tokens_of(request.system + request.text) + config.image_tokens * len(request.images)
            sums["prompt_tokens"] += prompt * times * share
            sums["completion_tokens"] += ANSWERED * request.max_tokens * times * share
        sums["requests"] += len(requests) * times
        sums["from_cache"] += kept * times
        sums["calls"] += (len(requests) - kept) * times

    def result(self) -> dict[str, Any]:
        """Requests, calls, tokens and cost, per backend and in total; and missing images."""
        backends = {}
        for name, sums in self._sums.items():
            money = cost(self._backends[name], sums["prompt_tokens"], sums["completion_tokens"])
            backends[name] = {key: round(value) for key, value in sums.items()} | {"cost": round(money, 4)}
        keys = ("requests", "from_cache", "calls", "prompt_tokens", "completion_tokens", "cost")
        total = {key: round(sum(one[key] for one in backends.values()), 4) for key in keys}
        missing = sorted(self._missing)
        return {"backends": backends, "total": total, "missing_images": len(missing), "first_missing": missing[:5]}


def told(result: dict[str, Any]) -> str:
    """The estimate as a table."""
    lines = [f"{'backend':16}{'requests':>12}{'cached':>10}{'tokens in':>16}{'tokens out':>14}{'cost':>12}"]
    for name, sums in [*result["backends"].items(), ("together", result["total"])]:
        lines.append(
            f"{name:16}{sums['requests']:>12,}{sums['from_cache']:>10,}{sums['prompt_tokens']:>16,}"
            f"{sums['completion_tokens']:>14,}{sums['cost']:>12,.2f}"
        )
    if result["missing_images"]:
        lines.append(f"{result['missing_images']:,} images are missing, such as {result['first_missing'][0]}")
    if not result["total"]["cost"]:
        lines.append("no prices are set: --config.backends.NAME.price_in=... and price_out=..., for a million tokens")
    lines.append(f"assumed: answers take {ANSWERED:.0%} of their longest, {TOKENS_A_WORD} tokens a word")
    return "\n".join(lines)
