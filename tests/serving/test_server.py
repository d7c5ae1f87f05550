"""The server as a process: its port, its start, how it goes, and what is left of it."""

import contextlib
import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.test_app import about, photo

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "Hello"}]
pytestmark = pytest.mark.alone


class Process:
    """A server in a process of its own."""

    def __init__(
        self, folder: Path, tokenizer: Path, options: dict, engine: dict, before: Callable[[], None] | None = None
    ) -> None:
        self.media, self.port_file = folder / "media", folder / "port"
        told = {"pieces": ["word "] * 40, "pause": 0.05, "tokenizer": str(tokenizer)} | engine
        asked = {"port": 0, "port_file": str(self.port_file), "media_folder": str(self.media)} | options
        words = [json.dumps(asked), "{}", json.dumps(told)]
        command = [sys.executable, "-m", "tests.serving.process", *words]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=before)

    def started(self) -> "Process":
        end = time.monotonic() + 60
        while not self.port_file.exists() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        self.port = int(self.port_file.read_text())
        return self

    def get(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def ready(self) -> "Process":
        self.started()
        end = time.monotonic() + 30
        while self.get("/health") != 200 and time.monotonic() < end:
            time.sleep(0.02)
        return self

    def ask(self, messages: Any = HELLO, **fields: Any) -> Any:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="x", max_retries=0, timeout=30)
        return client.chat.completions.create(model="kangaroo", messages=messages, **fields)

    def stream(self) -> Any:
        return self.ask(stream=True)

    def ended(self, seconds: float = 30) -> tuple[int, str]:
        said = self.process.communicate(timeout=seconds)[1]
        return self.process.returncode, said

    def folders(self) -> list[str]:
        return os.listdir(self.media) if self.media.exists() else []


Launch = Callable[..., Process]


@pytest.fixture
def launch(tmp_path: Path, tokenizer_file: Path) -> Iterator[Launch]:
    """Starts a process: `launch(engine's words, **options)`."""
    processes: list[Process] = []

    def start(engine: dict | None = None, before: Callable[[], None] | None = None, **options: Any) -> Process:
        processes.append(Process(tmp_path, tokenizer_file, options, engine or {}, before))
        return processes[-1]

    yield start
    for one in processes:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_sigterm_lets_what_was_begun_end_and_takes_nothing_more(launch: Launch) -> None:
    server = launch().ready()
    stream = iter(server.stream())
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 5
    while server.get("/health") == 200 and time.monotonic() < end:
        time.sleep(0.02)
    assert server.get("/health") == 503 and server.get("/ping") == 200
    with pytest.raises(openai.InternalServerError) as late:
        server.stream()
    assert late.value.status_code == 503 and int(late.value.response.headers["retry-after"]) >= 1
    pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason == "stop" and len(pieces) >= 40
    code, said = server.ended()
    assert code == 0 and "1 requests are under way" in said and "Traceback" not in said
    assert server.folders() == []


@pytest.mark.slow
def test_what_does_not_end_in_time_is_cut_off(launch: Launch) -> None:
    server = launch({"pieces": ["word "] * 4000}, drain_seconds=0.5).ready()
    stream = iter(server.stream())
    next(stream)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="going down"):
        list(stream)
    code, said = server.ended()
    assert code == 0 and time.monotonic() - begun < 10 and "Traceback" not in said
    assert server.folders() == []


@pytest.mark.slow
def test_it_listens_before_the_model_is_there_and_may_be_stopped_then(launch: Launch) -> None:
    server = launch({"loads": 60}).started()
    assert server.get("/health") == 503 and server.get("/ping") == 200
    server.process.send_signal(signal.SIGTERM)
    code, said = server.ended(10)
    assert code == 0 and "Traceback" not in said and server.folders() == []
    assert sys.platform != "linux" or "loading, 5 nicer than the event loop" in said


@pytest.mark.slow
def test_ctrl_c_ends_it(launch: Launch) -> None:
    server = launch().ready()
    server.process.send_signal(signal.SIGINT)
    code, said = server.ended(10)
    assert code == 130 and "Traceback" not in said and server.folders() == []


@pytest.mark.slow
def test_what_cannot_be_loaded_is_one_line(launch: Launch) -> None:
    code, said = launch({"fault": "/nowhere: no checkpoint"}).ended()
    assert code == 2 and said.splitlines()[-1] == "kangaroo: /nowhere: no checkpoint" and "Traceback" not in said


@pytest.mark.slow
def test_an_engine_that_has_failed_ends_the_process(launch: Launch) -> None:
    code, said = launch({"fails": 0.3}).ended()
    assert code == 1 and "it has failed twice" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(launch: Launch) -> None:
    server = launch().started()
    code, said = launch(port=server.port, port_file="").ended()
    assert code == 2 and f"--port={server.port}" in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.slow
def test_what_a_killed_server_left_is_removed_by_the_next(launch: Launch) -> None:
    first = launch().started()
    first.process.kill()
    first.process.wait()
    assert len(first.folders()) == 1
    left = first.folders()[0]
    first.port_file.unlink()
    second = launch().started()
    assert len(second.folders()) == 1 and second.folders()[0] != left


@pytest.mark.slow
def test_a_disk_that_takes_no_more_costs_the_requests_that_write(launch: Launch) -> None:
    most = 1 << 16  # bytes of a file, as with a quota
    server = launch({"pause": 0.0}, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))).ready()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    for _ in range(3):
        with pytest.raises(openai.InternalServerError) as full:
            server.ask(about(photo(noise)))
        assert (full.value.status_code, full.value.code) == (507, "media_not_written")
        assert server.ask(about(photo())).choices[0].message.content.startswith("word")
    (folder,) = server.folders()
    assert os.listdir(server.media / folder) == ["lock"] and server.get("/health") == 200
