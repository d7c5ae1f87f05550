"""`kangaroo bench annotate`: requests a second through the real client, against a server that fails on purpose.

The server (`faulty_server.py`) is another process behind a socket. The same requests are asked twice; the second time
every answer must come from the cache.
"""

import asyncio
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.llm_client.cache import ReplyCache
from kangaroo_jax.llm_client.client import Client, Limits
from kangaroo_jax.llm_client.endpoint import Endpoint
from kangaroo_jax.llm_client.requests import Reply, Request
from kangaroo_jax.system.children import uninterrupted


@contextlib.contextmanager
def faulty_server(*arguments: str) -> Iterator[str]:
    """The address of a running `faulty_server.py`, which ends with the block."""
    command = [sys.executable, "-m", "kangaroo_jax.bench.faulty_server", f"--parent={os.getpid()}", *arguments]
    folder = Path(__file__).resolve().parents[2]
    with uninterrupted():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    with process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def statistics_of(url: str) -> dict[str, Any]:
    """The faulty server's counts of faults and answers so far."""
    with urllib.request.urlopen(f"{url}/stats", timeout=30) as response:
        return json.load(response)


def bench_annotate(
    requests: int, in_flight: int, faults: float, timeout: float = 5.0, image_bytes: int = 40_000
) -> dict[str, Any]:
    """Ask `requests` different questions with an image each, `in_flight` at a time, then all of them again.

    A call without an answer fails after `timeout` seconds; the server's longest answer takes 0.3.

    Returns rates of both passes, outcomes, faults, CPU milliseconds of this process for a request, and the numbers of
    answers that were lost, doubled, or different the second time: these three should be 0.
    """
    with tempfile.TemporaryDirectory() as name, faulty_server(f"--faults={faults}") as url:
        image = Path(name) / "image.jpg"
        image.write_bytes(b"\xff\xd8" + random.Random(0).randbytes(image_bytes))
        asked = [Request("bench@1", f"Describe picture {i}.", images=(str(image),)) for i in range(requests)]
        limits = Limits(concurrency=in_flight, first_wait=0.1)
        cache = ReplyCache(Path(name) / "cache.sqlite")
        first: list[Reply] = []
        second: list[Reply] = []
        for replies in (first, second):
            client, seconds, cpu = asyncio.run(_ask_all(url, asked, limits, cache, replies, timeout))
            if replies is first:
                result = _first_pass(client, replies, seconds, cpu)
        served = statistics_of(url)
        result |= {
            "answered": served["answered"],
            "doubled": served["doubled"],
            "again_per_second": round(requests / seconds),
            "again_from_cache": client.counts["from_cache"],
            "again_different": sum(a.text != b.text for a, b in zip(first, second, strict=True)),
        }
        cache.close()
    return result


async def _ask_all(
    url: str, asked: Sequence[Request], limits: Limits, cache: ReplyCache, replies: list[Reply], timeout: float
) -> tuple[Client, float, float]:
    """Ask everything; returns the client, and the wall and CPU seconds of the requests alone."""
    client = Client(Endpoint("bench", url, "stub", timeout=timeout), limits, cache)
    start, cpu = time.perf_counter(), _cpu_seconds()
    replies += await asyncio.gather(*(client.ask(request) for request in asked))
    seconds, used = time.perf_counter() - start, _cpu_seconds() - cpu
    await client.backend.close()
    return client, seconds, used


def _first_pass(client: Client, replies: Sequence[Reply], seconds: float, cpu: float) -> dict[str, Any]:
    outcomes = Counter(reply.outcome for reply in replies)
    return {
        "requests": len(replies),
        "lost": len(replies) - outcomes["ok"],
        "requests_per_second": round(len(replies) / seconds, 1),
        "calls": client.counts["calls"],
        "cpu_ms_per_request": round(1000 * cpu / len(replies), 2),
        "faults": dict(client.faults),
        "outcomes": dict(outcomes),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
