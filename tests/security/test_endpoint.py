"""A server of models decides neither how long a run waits nor who sees the key."""

import asyncio
import time

import pytest

from kangaroo_jax.llm_client.client import Limits
from tests.llm_client.test_client import PLAIN, Script, ask, said

pytestmark = pytest.mark.alone
HEADERS = [
    {"retry-after": "inf"},
    {"retry-after": "1e308"},
    {"retry-after": "nan"},
    {"retry-after": "-5"},
    {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"},
    {"retry-after": "Fri, 99 Dec 99999 99:99:99 GMT"},
    {"retry-after-ms": "1e400"},
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: next(iter(header.values())))
def test_no_retry_after_keeps_a_run_waiting_beyond_its_limit(header):
    start = time.monotonic()
    limits = Limits(first_wait=0.01, longest_wait=0.2, retries=2)
    assert ask(Script([(429, header, {}), said("it")]), PLAIN, limits)[0].outcome == "ok"
    assert time.monotonic() - start < 30  # also where the machine is busy


def test_the_key_is_not_sent_where_a_server_redirects_to(monkeypatch):
    """Nor is what was asked: a redirect to another port of the same machine is not followed."""
    monkeypatch.setenv("A_KEY", "sk-SECRET")
    second = Script([said("it")])

    async def start() -> tuple[asyncio.Server, int]:
        server = await asyncio.start_server(second.serve, "127.0.0.1", 0)
        return server, server.sockets[0].getsockname()[1]

    class Redirecting(Script):
        async def serve(self, reader, writer):
            other, port = await start()
            self.answers = [(307, {"location": f"http://127.0.0.1:{port}/v1/chat/completions"}, {})]
            try:
                await super().serve(reader, writer)
            finally:
                other.close()

    first = Redirecting([said("it")])
    ask(first, PLAIN, Limits(first_wait=0.01, longest_wait=0.1, retries=1), api_key_env="A_KEY")
    assert any("sk-SECRET" in head for head in first.heads)
    assert not second.heads
