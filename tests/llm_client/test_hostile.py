"""What a broken or hostile server may send: it costs the request, never the run, and the key goes nowhere."""

import asyncio
import json
from pathlib import Path

import pytest

from kangaroo_jax.bench.annotate import faulty_server
from kangaroo_jax.bench.faulty_server import HOSTILE, Server
from kangaroo_jax.curation.annotate.run import annotate_clips
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.client import Client, Limits
from kangaroo_jax.llm_client.endpoint import Endpoint
from kangaroo_jax.llm_client.requests import Reply, Request
from kangaroo_jax.llm_client.schemas import object_schema, text_schema

KEY = "sk-very-secret-0123456789"
LIMITS = Limits(first_wait=0.0, longest_wait=0.01, retries=0, answer_retries=0)


@pytest.fixture(scope="module")
def replies() -> dict[str, Reply]:
    """What comes of requests that are answered with the entries of the table, and of two that hold the key."""

    async def run() -> dict[str, Reply]:
        server = Server(0.0, 0.0, 20.0, 0, hostile=tuple(HOSTILE))
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        endpoint = Endpoint("e", url, "m", api_key_env="SOME_KEY", timeout=1.0)
        client, schema = Client(endpoint, LIMITS), object_schema(short=text_schema())
        requests = [Request("p@1", f"Say {name}.", schema=schema, max_tokens=100) for name in HOSTILE]
        try:
            return {name: await client.ask(request) for name, request in zip(HOSTILE, requests, strict=True)}
        finally:
            await endpoint.close()
            listening.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_KEY", KEY)
        return asyncio.run(run())


@pytest.mark.parametrize("name", HOSTILE)
def test_no_answer_is_an_error_of_its_request(name, replies):
    reply = replies[name]
    assert reply.outcome == "error" and reply.reason and reply.spent_prompt_tokens < 1e6
    assert KEY not in str(reply) and str(reply).encode()  # it can be written
    said = {"redirect": "not followed", "echo of the key": "Bearer ***", "drip": "timeout", "body long": "8 MiB"}
    said["body packed twice"] = "a way that was not offered (gzip, gzip)"
    assert said.get(name, "") in reply.reason


def test_a_whole_run_counts_them_as_failures(tmp_path, make_clips, make_config, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    lines: list[str] = []
    with faulty_server("--hostile", "--hang=20") as url:
        config = make_config(url, part_clips=5)
        for backend in config.backends.values():
            backend.update(api_key_env="SOME_KEY", retries=0, answer_retries=0, timeout=0.5, concurrency=4)
        with pytest.raises(UserError, match="none of the 24 captions is ok"):
            annotate_clips(make_clips(tmp_path / "in", 12, frames=2), tmp_path / "out", config, tell=lines.append)
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and {row["outcome"] for row in rows} == {"error"}
    written = "".join(file.read_text() for file in Path(tmp_path / "out").glob("*.json*"))
    assert KEY not in written + "".join(lines) and KEY.encode() not in (tmp_path / "out/cache.sqlite").read_bytes()
