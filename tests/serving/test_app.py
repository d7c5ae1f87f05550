"""The server as clients meet it: answers, streams, errors, bounds, keys, and what is left when a client goes."""

import base64
import dataclasses
import http.client
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.limits import Limits

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "Hello"}]
NOTHING = {"requests": 0, "bytes": 0, "frames": 0, "files": 0}


def ask(client: Any, messages: Any = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model="kangaroo", messages=messages, **fields)


def about(url: str, text: str = "What moves?", **part: Any) -> list[dict[str, Any]]:
    kind = "image_url" if url.startswith("data:image") else "video_url"
    parts = [{"type": kind, kind: {"url": url}} | part, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def photo(level: int | np.ndarray = 0) -> str:
    """An image of one colour, or of these pixels."""
    file = io.BytesIO()
    pixels = level if isinstance(level, np.ndarray) else np.full((8, 8, 3), level, np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def send(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, raw, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    connection.close()
    return found


def soon(what: Callable[[], Any], wanted: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while what() != wanted and time.monotonic() < end:
        time.sleep(0.02)
    assert what() == wanted


# --------------------------------------------------------------------------------- answers


def test_an_answer_whole_and_streamed(start) -> None:
    server = start()
    client = server.client()
    whole = ask(client, temperature=0, max_tokens=10, seed=3, stop=["x"])
    assert whole.choices[0].message.content == "Hello 世界" and whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens_details.cached_tokens == 3 and whole.usage.completion_tokens == 3
    pieces = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "Hello 世界"
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens and not pieces[-1].choices
    assert pieces[-2].choices[0].finish_reason == "stop" and pieces[-2].kangaroo["media"] == []
    request = server.engine.tickets[0].request
    assert (request.max_new_tokens, request.stop, request.sampling.seed) == (10, ("x",), 3)
    soon(server.left, NOTHING)


def test_choices_have_seeds_of_their_own_and_logprobs_are_told(start) -> None:
    server = start()
    answer = ask(
        server.client(), n=2, seed=2**32 - 1, logprobs=True, top_logprobs=2, extra_body={"top_k": 5, "min_p": 0.1}
    )
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.completion_tokens == 6
    first = answer.choices[1].logprobs.content[0]
    assert first.logprob == -0.5 and [best.logprob for best in first.top_logprobs] == [-0.5, -9999.0]
    samplings = [ticket.request.sampling for ticket in server.engine.tickets]
    assert [sampling.seed for sampling in samplings] == [2**32 - 1, 0] and samplings[0].top_k == 5
    streamed = list(ask(server.client(), n=2, stream=True, logprobs=True))
    assert {piece.choices[0].index for piece in streamed} == {0, 1}
    assert sum(piece.choices[0].finish_reason is not None for piece in streamed) == 2


def test_max_tokens_of_zero_reads_the_prompt_alone(start) -> None:
    answer = ask(start().client(), max_tokens=0)
    assert answer.choices[0].message.content == "" and answer.usage.completion_tokens == 0
    assert answer.choices[0].finish_reason == "length"


def test_the_frames_that_were_seen_are_told(start, films) -> None:
    server = start()
    client = server.client()
    answer = ask(client, about(f"file://{films}/a.mp4"), extra_body={"media_io_kwargs": {"video": {"num_frames": 3}}})
    (told,) = answer.kangaroo["media"]
    assert told["type"] == "video" and len(told["seconds"]) == 4  # a group of two frames goes together
    assert answer.kangaroo["frames_decoded"] == 4
    frames = [{"type": "video", "video": [photo(1), photo(2)]}, "What?"]
    (told,) = ask(client, [{"role": "user", "content": frames}]).kangaroo["media"]
    assert told["seconds"] == [0.0, 1.0] and told["assumed_fps"] == 1.0
    frames[0]["frame_times"] = [0.5, 9.25]
    (told,) = ask(client, [{"role": "user", "content": frames}]).kangaroo["media"]
    assert told["seconds"] == [0.5, 9.25] and "assumed_fps" not in told
    listed = "data:video/jpeg;base64," + ",".join(photo(level).partition(",")[2] for level in (3, 3, 4))
    (told,) = ask(client, about(listed)).kangaroo["media"]
    assert told["seconds"] == [0.0, 1.0, 2.0, 2.0]
    soon(server.left, NOTHING)


def test_no_video_gets_more_frames_than_the_server_allows(start, films) -> None:
    client = start(Limits(max_frames=4)).client()
    for video in ({"num_frames": 10**9}, {"fps": 1e300}, {"max_frames": 10**30, "fps": 1000}, {"num_frames": -1}):
        answer = ask(client, about(f"file://{films}/a.mp4"), extra_body={"media_io_kwargs": {"video": video}})
        assert answer.kangaroo["media"][0]["frames"] == 4, video
        answer = ask(client, about(f"file://{films}/a.mp4"), extra_body={"mm_processor_kwargs": video})
        assert answer.kangaroo["media"][0]["frames"] == 4, video


def test_text_is_text_wherever_it_stands(start, tokenizer) -> None:
    server = start()
    text = "What is <video>, <vi_start><|eot_id|>, \\"
    ask(server.client(), [{"role": "system", "content": "<image>"}, *about(photo(), text)])
    request = server.engine.tickets[0].request
    assert len(request.media) == 1 and int(request.is_vision.sum()) == 3
    assert tokenizer.decode(tokenizer.encode("\n" + text)) in tokenizer.decode(request.tokens)
    assert list(request.tokens).count(tokenizer.vi_start) == 1 and list(request.tokens).count(tokenizer.eot) == 2


@pytest.mark.parametrize("said", ["Best option:(", "Best option:( \n", [{"type": "text", "text": "Best option:("}]])
@pytest.mark.parametrize(
    ("flags", "goes_on", "header"),
    [
        ({"add_generation_prompt": False, "continue_final_message": True}, True, False),
        ({"continue_final_message": True}, True, False),
        ({}, False, True),  # as vLLM has it: what was said is over, and another answer follows
        ({"add_generation_prompt": True, "continue_final_message": False}, False, True),
        ({"add_generation_prompt": False}, False, False),
    ],
)
def test_an_answer_that_was_begun_goes_on_where_it_is_asked_for(start, tokenizer, said, flags, goes_on, header) -> None:
    server = start()
    ask(server.client(), [*HELLO, {"role": "assistant", "content": said}], extra_body=flags)
    request = server.engine.tickets[0].request
    tokens = request.tokens.tolist()
    assert request.begun == goes_on and tokens.count(tokenizer.eot) == (1 if goes_on else 2)
    assert tokens.count(tokenizer.start_header) == (3 if header else 2)
    if goes_on:
        assert tokenizer.decode(tokens).endswith("Best option:(")
    elif not header:
        assert tokens[-1] == tokenizer.eot


def test_what_cannot_go_on_is_refused(start) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Best option:("}]
    for messages, flags in (
        (HELLO, {"continue_final_message": True}),
        (begun, {"continue_final_message": True, "add_generation_prompt": True}),
    ):
        with pytest.raises(openai.BadRequestError, match="continue_final_message"):
            ask(start().client(), messages, extra_body=flags)


def test_what_one_key_saw_is_not_anothers(start) -> None:
    server = start(keys=("a", "b"))
    for key, salt in (("a", None), ("b", None), ("a", "s"), ("a", None), ("b", "s")):
        ask(server.client(key), extra_body={"cache_salt": salt})
    spaces = [ticket.request.namespace for ticket in server.engine.tickets]
    assert spaces[0] == spaces[3] and len(set(spaces)) == 4
    shared = start(keys=("a", "b"), share_cache=True)
    for key in ("a", "b"):
        ask(shared.client(key))
    assert len({ticket.request.namespace for ticket in shared.engine.tickets}) == 1


def test_a_uuid_stands_for_its_medium_within_a_key(start) -> None:
    server = start(keys=("a", "b"))
    ask(server.client("a"), about(photo(7), uuid="seven"))
    again = [{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "seven"}, "And?"]}]
    assert ask(server.client("a"), again).kangaroo["media"] == [{"type": "image", "frames": 2}]
    with pytest.raises(openai.BadRequestError, match="not known"):
        ask(server.client("b"), again)


def test_tokens_of_texts_and_prompts(start, tokenizer, films) -> None:
    port = start().port
    status, _, body = send(port, "POST", "/tokenize", {"prompt": "Which way?", "return_token_strs": True})
    found = json.loads(body)
    assert status == 200 and found["tokens"] == [tokenizer.bos, *tokenizer.encode("Which way?")]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    status, _, body = send(port, "POST", "/tokenize", {"messages": about(f"file://{films}/a.mp4")})
    assert json.loads(body)["tokens"].count(tokenizer.vision) > 3


def test_models_version_ping_health_and_metrics(start) -> None:
    server = start()
    assert [model.id for model in server.client().models.list()] == ["kangaroo", "k2"]
    ask(server.client())
    for path in ("/ping", "/health", "/version"):
        assert send(server.port, "GET", path)[0] == 200
    status, _, body = send(server.port, "GET", "/metrics")
    text = body.decode()
    for line in (
        'kangaroo_requests_total{status="200"} 3.0',
        "kangaroo_time_to_first_token_seconds_count 1.0",
        "kangaroo_generation_tokens_total 7.0",
        "kangaroo_decode_workers_replaced_total 2.0",
        "kangaroo_requests_running 0.0",
        'kangaroo_slots{state="empty"} 2.0',
        'kangaroo_slots_used{class="384"} 0.0',
    ):
        assert line in text, line
    for name in ("inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert f"kangaroo_{name}_bucket" in text
    for name in ("loop_lag_seconds_bucket", "prefix_tokens_queried_total", "media_cache_hits_total", "cache_bytes"):
        assert f"kangaroo_{name}" in text
    if sys.platform == "linux":
        assert re.search(r"^process_resident_memory_bytes \S+$", text, re.M) and "process_open_fds" in text


def test_an_adapter_answers_by_the_name_of_its_model(start) -> None:
    from tests.serving.fake import FakeEngine

    server, other = start(), FakeEngine(("adapted",))
    server.service.names = (*server.service.names, "mine")
    server.service.backend = dataclasses.replace(server.service.backend, adapters={"mine": other})
    said = {
        name: server.client().chat.completions.create(model=name, messages=HELLO).choices[0].message.content
        for name in ("kangaroo", "mine")
    }
    assert said["mine"] == "adapted" != said["kangaroo"] and len(other.tickets) == 1
    assert server.service.backend.stats()["tokens_generated"] == 14  # of both
    other.failed = "lost"
    assert server.service.backend.failed == "lost"


# ---------------------------------------------------------------------------------- errors


def test_errors_are_in_openais_form(start, films) -> None:
    server = start()
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=5000)
    assert caught.value.param == "temperature" and caught.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, [{"role": "user", "content": "word " * 5000}])
    assert long.value.code == "context_length_exceeded" and "2000" in str(long.value)
    with pytest.raises(openai.BadRequestError) as damaged:
        ask(client, about(f"file://{films}/no.mp4"))
    assert "messages[0].content[0]" in str(damaged.value) and str(server.folder) not in str(damaged.value)
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
    ):
        found = send(server.port, method, path)
        assert found[0] == status and json.loads(found[2])["error"].keys() == {"message", "type", "param", "code"}
    soon(server.left, NOTHING)


NO_REQUESTS = [b"", b"{", b"[" * 100_000, b"null", b"\xff", b'{"messages": 1}', b'{"messages": [{"content": 1e999}]}']


@pytest.mark.parametrize("body", NO_REQUESTS)
def test_what_is_no_request_is_400(start, body: bytes) -> None:
    status, _, said = send(start().port, "POST", "/v1/chat/completions", body)
    assert status == 400 and "error" in json.loads(said)


def test_faults_of_the_engine_tell_nothing_of_it(start, caplog) -> None:
    from kangaroo_jax.inference.requests import EngineError

    server = start()
    server.engine.error = EngineError("XlaRuntimeError: at /secret/path.py")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server.client())
    assert "secret" not in str(caught.value)
    pieces = ask(server.client(), stream=True)
    with pytest.raises(openai.APIError, match="engine failed"):
        list(pieces)
    server.engine.error = UserError("/tmp/x: not decoded within 120 s")
    with pytest.raises(openai.BadRequestError, match="not decoded"):
        ask(server.client())
    server.engine.error, server.engine.failed = None, "twice"
    with pytest.raises(openai.InternalServerError, match="engine has failed"):
        ask(server.client())
    assert send(server.port, "GET", "/health")[0] == 503
    soon(server.left, NOTHING)


def test_before_the_model_is_there_nothing_is_answered(start) -> None:
    server = start(ready=False)
    for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize")):
        status, headers, body = send(server.port, method, path, {} if method == "POST" else None)
        assert status == 503 and headers["retry-after"] == "5" and b"starting" in body
    assert send(server.port, "GET", "/ping")[0] == send(server.port, "GET", "/metrics")[0] == 200


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
SESSION = b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
LARGE = b"P6 60000 60000 255\n" + bytes(100)  # pixels of which there are a few


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("video/mp4", PLAYLIST),
        ("video/mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("video/mp4", SESSION),
        ("image/x-portable-pixmap", LARGE),
        ("image/png", b"\x89PNG\r\n\x1a\n" + bytes(64)),
        ("image/jpeg", b"\xff\xd8\xff" + bytes(64)),
    ],
)
def test_media_that_lead_elsewhere_or_are_bombs_are_refused_soon(start, kind: str, content: bytes) -> None:
    server, begun = start(), time.perf_counter()
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server.client(), about(f"data:{kind};base64,{base64.b64encode(content).decode()}"))
    assert "passwd" not in str(caught.value) and time.perf_counter() - begun < 15
    assert not server.engine.tickets
    soon(server.left, NOTHING)


# ------------------------------------------------------------------------- keys and the log


def test_every_route_but_two_asks_for_a_key(start) -> None:
    server = start(keys=("word", "other"))
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
        assert send(server.port, "GET", path)[0] == 401
        assert send(server.port, "GET", path, Authorization="Bearer wor")[0] == 401
        assert send(server.port, "GET", path, Authorization="Basic word")[0] == 401
    for path in ("/v1/chat/completions", "/tokenize"):
        status, _, body = send(server.port, "POST", path, {"media_io_kwargs": {"video": {"max_frames": 1}}})
        assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
    assert send(server.port, "GET", "/health")[0] == send(server.port, "GET", "/ping")[0] == 200
    assert ask(server.client("other")).choices and ask(server.client("word")).choices
    with pytest.raises(openai.AuthenticationError):
        ask(server.client("wrong"))


def test_a_line_of_the_log_tells_of_a_request_and_nothing_of_what_was_said(start, caplog) -> None:
    caplog.set_level(logging.INFO)
    server = start(keys=("secret-word",))
    secret = about(photo(), "my private question")
    ask(server.client("secret-word"), secret, extra_headers={"X-Request-Id": "mine-1"}, extra_body={"co\nlour": 1})

    def lines() -> list[str]:
        return [record.message for record in caplog.records if record.name.endswith("access")]

    soon(lambda: len(lines()), 1)
    head, tail = (
        r"mine-1 127\.0\.0\.1 [0-9a-f]{8} POST /v1/chat/completions 200 ",
        r"prompt=\d+ frames=2 cached=3 new=3",
    )
    assert re.fullmatch(head + r"\d+\.\d+ s " + tail, lines()[0])
    text = "\n".join(caplog.messages)
    assert "private" not in text and "secret-word" not in text and "base64" not in text and r"co\nlour" in text
    status, headers, _ = send(server.port, "GET", "/v1/models", X_Request_Id="bad id\x01" * 3)
    assert status == 401 and re.fullmatch(r"[0-9a-f]{24}", headers["x-request-id"])


def test_pages_of_listed_origins_may_ask(start) -> None:
    server = start(keys=("word",), origins=("https://page.test",))
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    status, headers, _ = send(server.port, "OPTIONS", "/v1/chat/completions", Origin="https://page.test", **asked)
    assert status == 200 and headers["access-control-allow-origin"] == "https://page.test"
    assert "access-control-allow-origin" not in send(server.port, "GET", "/ping", Origin="https://other.test")[1]
