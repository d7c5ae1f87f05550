"""`kangaroo serve` with a small checkpoint and the `openai` client: what it answers, remembers and counts."""

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jax.numpy as jnp
import pytest

from kangaroo_jax.bench.serve import children
from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState
from tests.data.media import write_video
from tests.serving.test_app import about, photo, soon

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytestmark = [pytest.mark.slow, pytest.mark.alone]
ROOT = Path(__file__).parents[2]
COUNTED = {
    *("prefill_tokens_total", "generation_tokens_total", "frames_decoded_total", "frames_encoded_total"),
    *('slots{state="busy"}', 'slots{state="remembering"}', 'cache_bytes{level="vision"}'),
}
RUNNING = ("requests_running", "requests_waiting", 'slots{state="busy"}')


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    make_micro_config: Callable,
    make_random_model: Callable,
    tokenizer_file: Path,
) -> Path:
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    params = abstract_model(ModelConfig.from_config(config.model)).flatten(make_random_model(config.model))
    folder = tmp_path_factory.mktemp("stage5")
    state = TrainState(jnp.int32(7), params, {}, {})
    checkpoints = Checkpoints(folder, state)
    checkpoints.save(state, b"{}", config.to_dict())
    checkpoints.close()
    reading.keep_tokenizer(tokenizer_file, folder)
    return folder


@dataclass
class Server:
    process: subprocess.Popen
    port: int
    log: Path
    media: Path

    def client(self, **options: Any) -> Any:
        at = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=at, api_key="word", max_retries=0, timeout=120, **options)

    def ask(self, messages: Any, **fields: Any) -> Any:
        asked = {"model": "kangaroo", "max_tokens": 8, "temperature": 0} | fields
        return self.client().chat.completions.create(messages=messages, **asked)

    def numbers(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers={"Authorization": "Bearer word"})
            text = connection.getresponse().read().decode()
        return {name: float(value) for name, value in re.findall(r"^kangaroo_(\S+) (\S+)$", text, re.M)}

    def health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status


@contextlib.contextmanager
def started(folder: Path, checkpoint: Path, films: Path) -> Iterator[Server]:
    """A server that is ready; it is killed at the end where it still runs."""
    words = [
        f"--checkpoint={checkpoint}",
        "--port=0",
        f"--port_file={folder}/port",
        "--api-key=word",
        "--api-key=other",
        "--max-key-requests=32",
        f"--allowed-media-root={films}",
        f"--media_folder={folder}/media",
        "--context=512",
        "--slots=4",
        "--max-decode-seconds=20",
    ]
    (folder / "port").unlink(missing_ok=True)
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, "-m", "kangaroo_jax", "serve", *words], cwd=ROOT, stderr=log)
    try:
        end = time.monotonic() + 400
        while not (folder / "port").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        running = Server(process, int((folder / "port").read_text()), folder / "log", folder / "media")
        while running.health() != 200 and time.monotonic() < end:
            time.sleep(0.2)
        assert running.health() == 200, (folder / "log").read_text()
        assert "rehearsing" in (folder / "log").read_text() and "rehearsal:" not in (folder / "log").read_text()
        fresh = running.numbers()
        assert not {name for name, value in fresh.items() if name in COUNTED and value}  # by the rehearsal
        assert COUNTED <= set(fresh)
        yield running
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, films: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    write_video(films / "b.mp4", 32)
    with started(folder, checkpoint, films) as running:
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0 and list((folder / "media").iterdir()) == []
        assert "Traceback" not in (folder / "log").read_text()


def nothing_is_left(server: Server) -> None:
    """No request is under way any more, and none has left a slot or a file."""
    soon(lambda: {name for name, value in server.numbers().items() if name in RUNNING and value}, set(), 20)
    assert [name for name in os.listdir(next(server.media.iterdir())) if name != "lock"] == []


def text_of(stream: Any) -> str:
    return "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices)


def test_streamed_and_whole_answers_are_the_same(server: Server) -> None:
    for question in ("What moves in the video?", "视频里有什么?"):
        messages = [{"role": "user", "content": question}]
        whole = server.ask(messages)
        assert whole.choices[0].message.content == text_of(server.ask(messages, stream=True))
        assert whole.usage.completion_tokens <= 8


def test_a_video_by_any_address_is_watched_once(server: Server, films: Path) -> None:
    path = films / "a.mp4"
    data = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    before = server.numbers()
    first = server.ask(about(f"file://{path}"))
    second = server.ask(about(data, "Which way?"))
    after = server.numbers()
    frames = first.kangaroo["media"][0]["frames"]
    assert first.kangaroo["frames_decoded"] == frames > 0 and len(first.kangaroo["media"][0]["seconds"]) == frames
    assert second.kangaroo["frames_decoded"] == second.kangaroo["frames_encoded"] == 0
    assert after["frames_decoded_total"] - before["frames_decoded_total"] == frames
    assert second.kangaroo["media"] == first.kangaroo["media"]


def test_the_second_round_is_remembered(server: Server, films: Path) -> None:
    asked = about(f"file://{films}/b.mp4", "What comes first?")
    before = server.numbers()
    first = server.ask(asked)
    said = first.choices[0].message.content
    middle = server.numbers()
    second = server.ask([*asked, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}])
    after = server.numbers()
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 1
    assert after["frames_encoded_total"] == middle["frames_encoded_total"] > before["frames_encoded_total"]
    assert after["compilations_total"] == before["compilations_total"]
    assert after["prefill_tokens_total"] - middle["prefill_tokens_total"] <= second.usage.prompt_tokens - cached + 127


def test_images_and_frames(server: Server) -> None:
    image = server.ask(about(photo(90)))
    assert image.kangaroo["media"] == [{"type": "image", "frames": 2}]
    frames = {"type": "video", "video": [photo(level) for level in (0, 90, 180, 250)], "frame_times": [0, 1, 3, 9]}
    told = server.ask([{"role": "user", "content": [frames, "What?"]}]).kangaroo["media"]
    assert told[0]["seconds"] == [0.0, 1.0, 3.0, 9.0]


def test_stop_strings_choices_and_logprobs(server: Server) -> None:
    messages = [{"role": "user", "content": "Which way?"}]
    whole = server.ask(messages, max_tokens=24, extra_body={"ignore_eos": True}).choices[0].message.content
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stopped = server.ask(messages, max_tokens=24, stop=[middle], extra_body={"ignore_eos": True}).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content == whole[: whole.index(middle)]
    two = server.ask(messages, n=2, temperature=2.0, seed=5, logprobs=True, top_logprobs=3)
    again = server.ask(messages, n=2, temperature=2.0, seed=5)
    assert [c.message.content for c in two.choices] == [c.message.content for c in again.choices]
    tokens = two.choices[0].logprobs.content
    assert tokens and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_answers_of_a_given_form(server: Server, films: Path) -> None:
    schema = {"type": "object", "properties": {"moves": {"enum": ["left", "right"]}}, "required": ["moves"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    seen = about(f"file://{films}/a.mp4", "Which way?")
    asked: dict[str, Any] = dict(max_tokens=60, response_format=form, temperature=1.0, seed=3)
    whole = server.ask(seen, **asked)
    assert json.loads(whole.choices[0].message.content)["moves"] in ("left", "right")
    assert whole.choices[0].finish_reason == "stop"
    assert text_of(server.ask(seen, stream=True, **asked)) == whole.choices[0].message.content
    one = server.ask(seen, n=3, extra_body={"structured_outputs": {"choice": ["A", "B"]}})
    assert {choice.message.content for choice in one.choices} <= {"A", "B"}
    with pytest.raises(openai.BadRequestError) as error:
        server.ask(seen, extra_body={"structured_outputs": {"regex": "(a"}})
    assert error.value.param == "structured_outputs.regex" and "unclosed" in str(error.value)


def test_a_mistake_in_a_medium_is_told_and_changes_nothing(server: Server, films: Path) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(about(f"file://{films}/no.mp4"))
    assert str(server.media) not in str(caught.value) and "messages[0].content[0]" in str(caught.value)
    assert server.ask([{"role": "user", "content": "Hello"}]).choices


def test_many_at_a_time_get_their_own_answers(server: Server, films: Path) -> None:
    asked = [about(f"file://{films}/{name}.mp4", text) for name in "ab" for text in ("What?", "Which way?", "先?")]
    alone = [server.ask(messages).choices[0].message.content for messages in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda messages: server.ask(messages).choices[0].message.content, asked * 4))
    assert together == alone * 4


def test_a_key_that_asks_much_does_not_starve_another(server: Server, films: Path) -> None:
    film, pictures = about(f"file://{films}/a.mp4", "Mine?"), [about(photo(level), "Theirs?") for level in range(30)]
    clients = {key: server.client().with_options(api_key=key) for key in ("word", "other")}
    done: list[str] = []

    def ask(key: str, messages: Any, tokens: int) -> None:
        clients[key].chat.completions.create(
            model="kangaroo", messages=messages, max_tokens=tokens, extra_body={"ignore_eos": True}
        )
        done.append(key)

    with ThreadPoolExecutor(31) as pool:
        asked = [pool.submit(ask, "word", messages, 300) for messages in pictures]
        soon(lambda: server.numbers()["requests_running"] > 0, True, 20)
        asked.append(pool.submit(ask, "other", film, 8))
        for one in asked:
            one.result()
    assert len(done) == 31 and done.index("other") <= 12
    nothing_is_left(server)


def test_clients_that_leave_free_their_places(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    for _ in range(6):
        stream = server.ask(messages, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client = server.client().with_options(timeout=0.05)
        client.chat.completions.create(
            model="kangaroo", messages=messages, max_tokens=400, extra_body={"ignore_eos": True}
        )
    nothing_is_left(server)


def test_nothing_of_a_question_is_in_the_log(server: Server) -> None:
    server.ask([{"role": "user", "content": "my private question"}])
    assert "private" not in server.log.read_text()
    line = [line for line in server.log.read_text().splitlines() if "POST /v1/chat/completions 200" in line][-1]
    assert re.search(r"prompt=\d+ frames=0 cached=\d+ new=\d+", line)
    assert json.dumps("word") not in line


def test_decoding_processes_that_are_killed_are_replaced(server: Server, films: Path) -> None:
    workers = children(server.process.pid)
    before = server.numbers()["decode_workers_replaced_total"]
    path = write_video(films / "long.mp4", 2400)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: server.ask(about(f"file://{path}")))
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        with contextlib.suppress(openai.BadRequestError):  # of a file that somebody was at
            asked.result()
    answer = server.ask(about(f"file://{path}", "Again?"))
    assert answer.kangaroo["media"][0]["frames"] > 0
    assert server.numbers()["decode_workers_replaced_total"] > before and server.health() == 200
    assert not set(workers) & set(children(server.process.pid))
    nothing_is_left(server)


def test_a_client_that_is_killed_frees_its_place(server: Server) -> None:
    code = f"""
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:{server.port}/v1", api_key="word")
asked = dict(model="kangaroo", messages=[{{"role": "user", "content": "Hello"}}], extra_body={{"ignore_eos": True}})
for piece in client.chat.completions.create(**asked, stream=True):
    print(piece.choices[0].delta.content, flush=True)
    input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as client:
        assert client.stdout is not None and client.stdout.readline()
        client.kill()
    nothing_is_left(server)


def test_a_server_that_is_killed_leaves_nothing_to_the_next(
    tmp_path: Path, checkpoint: Path, films: Path, server: Server
) -> None:
    right = server.ask(about(f"file://{films}/a.mp4")).choices[0].message.content
    with started(tmp_path, checkpoint, films) as first:
        stream = iter(first.ask(about(f"file://{films}/a.mp4"), stream=True, extra_body={"ignore_eos": True}))
        next(stream)
        workers, left = children(first.process.pid), os.listdir(tmp_path / "media")
        first.process.kill()
        with contextlib.suppress(openai.APIError, httpx.HTTPError):  # what had been sent may be all of it
            list(stream)
        first.process.wait()
        soon(lambda: [worker for worker in workers if os.path.exists(f"/proc/{worker}")], [], 20)
    assert os.listdir(tmp_path / "media") == left
    with started(tmp_path, checkpoint, films) as second:
        assert second.ask(about(f"file://{films}/a.mp4")).choices[0].message.content == right
        assert len(os.listdir(tmp_path / "media")) == 1 and os.listdir(tmp_path / "media") != left
