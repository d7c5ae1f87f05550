"""Retries, limits and the cache, against a real server that is told what to answer, and a backend that counts."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.cache import ReplyCache
from kangaroo_jax.llm_client.client import Client, Limits, Rate
from kangaroo_jax.llm_client.endpoint import Endpoint, data_uri
from kangaroo_jax.llm_client.requests import Completion, Failure, Reply, Request
from kangaroo_jax.llm_client.schemas import object_schema

pytestmark = pytest.mark.alone

QUICK = Limits(first_wait=0.01, longest_wait=2.0, retries=2, answer_retries=2)
SCHEMA = object_schema(answer={"type": "string", "minLength": 1})


class Script:
    """A server that answers the n-th request with the n-th of what it was given, and keeps the requests."""

    def __init__(self, answers: Sequence[tuple[int, dict[str, str], Any]]) -> None:
        self.answers, self.seen, self.heads = list(answers), list[dict](), list[str]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = int(head.lower().split("content-length:")[1].split()[0])
                self.heads.append(head)
                self.seen.append(json.loads(await reader.readexactly(size)))
                status, headers, body = self.answers[min(len(self.seen), len(self.answers)) - 1]
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                lines = [f"HTTP/1.1 {status} x", "content-type: application/json", f"content-length: {len(data)}"]
                lines += [f"{key}: {value}" for key, value in headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def said(text: str, finish: str = "stop", **message: Any) -> tuple[int, dict[str, str], Any]:
    choice = {"message": {"content": text} | message, "finish_reason": finish}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def ask(script: Script, request: Request, limits: Limits = QUICK, **endpoint: Any) -> tuple[Reply, Client]:
    """The reply to a request, over a socket."""

    async def run() -> tuple[Reply, Client]:
        server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        client = Client(Endpoint("e", url, "m", settings={"temperature": 0.0, "seed": 5}, **endpoint), limits)
        try:
            return await client.ask(request), client
        finally:
            await client.backend.close()
            server.close()

    return asyncio.run(run())


PLAIN = Request("p@1", "Say it.", "You say things.")
FORMED = Request("p.en@1", "Say it.", schema=SCHEMA, max_tokens=10)


def test_what_is_sent(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", "sesame")
    image = tmp_path / "a.jpg"
    image.write_bytes(b"\xff\xd8picture")
    request = Request("p.en@1", "Say it.", "You say things.", (str(image),), SCHEMA, 10)
    script = Script([said('{"answer": "x"}')])
    reply, _ = ask(script, request, api_key_env="SOME_KEY")
    assert (reply.outcome, reply.data, reply.prompt_tokens, reply.completion_tokens) == ("ok", {"answer": "x"}, 7, 3)
    (body,) = script.seen
    assert "authorization: bearer sesame" in script.heads[0].lower() and script.heads[0].startswith("POST /v1/chat/")
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.0, 5, 10)
    assert body["messages"][0] == {"role": "system", "content": "You say things."}
    picture, text = body["messages"][1]["content"]
    assert picture["image_url"]["url"] == data_uri(b"\xff\xd8picture") and text["text"] == "Say it."
    form = body["response_format"]["json_schema"]
    assert form["strict"] and form["schema"] == SCHEMA and form["name"] == "p"
    assert ask(Script([said('```json\n{"answer": "x"}\n```')]), FORMED, structured=False)[0].data == {"answer": "x"}


@pytest.mark.parametrize(
    ("answers", "outcome", "calls", "faults"),
    [
        ([(503, {}, {}), (429, {}, {}), said("it")], "ok", 3, {"status 503": 1, "status 429": 1}),
        ([(500, {}, {})], "error", 3, {"status 500": 3}),
        ([(400, {}, {"error": {"message": "too long"}})], "error", 1, {"status 400": 1}),
        ([(200, {}, b"{half"), said("it")], "ok", 2, {"malformed": 1}),
        ([(200, {}, {"choices": []}), said("it")], "ok", 2, {"malformed": 1}),
        ([said("it is cut", "length"), said("it is whole")], "ok", 2, {"truncated": 1}),
        ([said("it is cut", "length")], "truncated", 3, {"truncated": 3}),
        ([said("", "content_filter")], "refused", 3, {"refused": 3}),
        ([said("", refusal="I will not")], "refused", 3, {"refused": 3}),
        ([said("I'm sorry, I can't describe people.")], "refused", 3, {"refused": 3}),
        ([said(""), said("it")], "ok", 2, {"malformed": 1}),
    ],
)
def test_outcomes_of_plain_text(answers, outcome, calls, faults):
    reply, client = ask(Script(answers), PLAIN)
    assert (reply.outcome, reply.attempts, dict(client.faults)) == (outcome, calls, faults)
    assert bool(reply.reason) == (outcome != "ok")
    assert reply.transient == (outcome == "error" and "400" not in reply.reason)


@pytest.mark.parametrize("bad", ["{", '{"answer": 3}', '{"other": "x"}', "[]", '{"answer": "x", "more": 1}'])
def test_an_answer_that_does_not_obey_its_schema_is_asked_for_again(bad):
    script = Script([said(bad), said('{"answer": "x"}')])
    reply, client = ask(script, FORMED)
    assert reply.data == {"answer": "x"} and client.faults == {"malformed": 1}
    assert [body["seed"] for body in script.seen] == [5, 6]
    reply, _ = ask(Script([said(bad)]), FORMED)
    assert (reply.outcome, reply.data, reply.attempts) == ("error", None, 3) and "malformed" in reply.reason
    assert (reply.spent_prompt_tokens, reply.prompt_tokens) == (21, 7)


def test_a_truncated_answer_may_be_twice_as_long_next_time():
    script = Script([said("{", "length"), said("{", "length"), said('{"answer": "x"}')])
    assert ask(script, FORMED, Limits(longest_answer=30))[0].outcome == "ok"
    assert [body["max_tokens"] for body in script.seen] == [10, 20, 30]


@pytest.mark.parametrize("header", [{"retry-after": "0.3"}, {"retry-after-ms": "300"}])
def test_retry_after_is_obeyed(header):
    start = time.monotonic()
    assert ask(Script([(429, header, {}), said("it")]), PLAIN)[0].outcome == "ok"
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_retry_can_mend_is_one_line(status):
    with pytest.raises(UserError, match=f"backend e .*status {status}"):
        ask(Script([(status, {}, {"error": {"message": "no"}})]), PLAIN)


def test_no_server_and_no_key_are_one_line():
    async def run() -> None:
        client = Client(Endpoint("e", "http://127.0.0.1:9/v1", "m"), Limits(first_wait=0.01, retries=20))
        await client.ask(PLAIN)

    with pytest.raises(UserError, match="backend e: no server answers"):
        asyncio.run(run())
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        Endpoint("e", "http://127.0.0.1:9/v1", "m", api_key_env="NO_SUCH_KEY")


class Counting:
    """A backend that answers what `answer` returns, and counts how many calls are under way."""

    name, model, settings, cached = "counting", "model", {"seed": 1}, True

    def __init__(self, answer: Callable[[Request], str] = lambda request: request.text) -> None:
        self.calls = self.under_way = self.most = 0
        self._answer = answer

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        self.calls += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        return Completion(self._answer(request))

    async def close(self) -> None:
        pass


async def _all(client: Client, requests: Sequence[Request]) -> list[Reply]:
    return list(await asyncio.gather(*(client.ask(request) for request in requests)))


def test_concurrency_joining_and_the_cache(tmp_path):
    requests = [Request("p@1", f"{i % 10}") for i in range(30)]
    cache, backend = ReplyCache(tmp_path / "c.sqlite"), Counting()
    replies = asyncio.run(_all(Client(backend, Limits(concurrency=4), cache), requests))
    assert [reply.text for reply in replies] == [request.text for request in requests]
    assert (backend.calls, backend.most, len(cache)) == (10, 4, 10)
    cache.close()
    again = Client(backend, Limits(), ReplyCache(tmp_path / "c.sqlite"))
    assert [reply.text for reply in asyncio.run(_all(again, requests))] == [request.text for request in requests]
    assert backend.calls == 10 and again.counts["from_cache"] == 30


def test_the_cache_knows_model_settings_prompt_and_bytes_of_images(tmp_path):
    image, cache = tmp_path / "a.jpg", ReplyCache(tmp_path / "c.sqlite")
    image.write_bytes(b"\xff\xd81")
    backend = Counting(lambda request: '{"answer": "x"}')
    request = Request("p@1", "Q", images=(str(image),), schema=SCHEMA)

    def calls(changed: Request) -> int:
        before = backend.calls
        (reply,) = asyncio.run(_all(Client(backend, Limits(), cache), [changed]))
        assert reply.data == {"answer": "x"}  # parsed anew where it comes from the cache
        return backend.calls - before

    assert (calls(request), calls(request)) == (1, 0)
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd81")
    assert calls(Request("p@1", "Q", images=(str(tmp_path / "b.jpg"),), schema=SCHEMA)) == 0
    assert calls(Request("p@2", "Q", images=(str(image),), schema=SCHEMA)) == 1
    image.write_bytes(b"\xff\xd82")
    assert calls(request) == 1
    backend.settings = {"seed": 2}
    assert calls(request) == 1
    backend.model = "another"
    assert (calls(request), calls(request)) == (1, 0)


def test_errors_are_not_kept_and_missing_images_are_errors(tmp_path):
    class Failing(Counting):
        async def complete(self, *arguments: Any) -> Completion:
            self.calls += 1
            raise Failure("broken", transient=False)

    cache, backend = ReplyCache(tmp_path / "c.sqlite"), Failing()
    request, missing = Request("p@1", "Q"), Request("p@1", "Q", images=(str(tmp_path / "none.jpg"),))
    replies = asyncio.run(_all(Client(backend, QUICK, cache), [request, missing]))
    assert [reply.outcome for reply in replies] == ["error", "error"] and "none.jpg" in replies[1].reason
    assert (len(cache), backend.calls) == (0, 1)


def test_the_rate_is_kept():
    async def run() -> float:
        rate, start = Rate(per_minute=1200), time.monotonic()  # 20 a second, the first second's at once
        for _ in range(26):
            await rate.take()
        return time.monotonic() - start

    assert 0.2 < asyncio.run(run()) < 5


def test_a_cache_that_is_none_is_one_line(tmp_path):
    (tmp_path / "c.sqlite").write_text("something else " * 100)
    with pytest.raises(UserError, match="cannot be used as cache"):
        ReplyCache(tmp_path / "c.sqlite")
