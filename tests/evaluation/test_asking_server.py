"""Benchmarks against a server of OpenAI's protocol: what it is sent, what fails, and what is not asked again."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from kangaroo_jax.cli.main import main
from kangaroo_jax.evaluation.asking_server import Server, ask_server
from kangaroo_jax.evaluation.benchmarks.table import BENCHMARKS
from kangaroo_jax.evaluation.checking import questions_of
from kangaroo_jax.evaluation.prompting import tasks_of
from kangaroo_jax.evaluation.samples import Samples
from tests.evaluation.layouts import LAYOUTS

pytestmark = pytest.mark.alone


class Fake(ThreadingHTTPServer):
    """Says what `told` has for the n-th request, (status, text), and keeps the requests."""

    def __init__(self) -> None:
        self.seen, self.told = list[dict](), dict[int, tuple[int, str]]()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append(body)
        status, text = self.server.told.get(len(self.server.seen), (200, "B. blue"))
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        data = json.dumps({"choices": [choice], "usage": {}} if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Fake]:
    fake = Fake()
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    yield fake
    fake.shutdown()
    fake.server_close()


def run(server, folder, workdir, name, *flags, code=0):
    words = [
        f"--server={server.address}",
        f"--benchmark={name}",
        f"--data={folder}",
        f"--workdir={workdir}",
        "--side=32",
    ]
    assert main(["eval", *words, *flags]) == code
    return json.loads((workdir / "results.json").read_text())["results"][0]["protocols"]["strict"] if not code else None


def test_a_server_is_sent_frames_with_their_times_and_nothing_twice(server, data, tmp_path):
    folder, before = data("longvideobench"), "--prompt=before"
    score = run(server, folder, tmp_path, "longvideobench", "--model=m", "--frames=4", before)
    assert score["score"] == 1.0 and len(server.seen) == 2
    body = min(server.seen, key=lambda body: len(str(body)))
    video, text = body["messages"][0]["content"]
    frames = video["video_url"]["url"].removeprefix("data:video/jpeg;base64,").split(",")
    pictures = [Image.open(io.BytesIO(base64.b64decode(frame))) for frame in frames]
    assert [picture.size for picture in pictures] == [(32, 32)] * 4 and len(video["frame_times"]) == 4
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 16)
    assert "\nQuestion: Which?\nA. red" in text["text"]
    assert run(server, folder, tmp_path, "longvideobench", "--model=m", "--frames=4", before) == score
    assert len(server.seen) == 2
    run(server, folder, tmp_path, "longvideobench", "--model=other", "--frames=4", "--as-images", before)
    assert len(server.seen) == 4
    assert [part["type"] for part in server.seen[-1]["messages"][0]["content"]] == ["image_url"] * 4 + ["text"]


@pytest.mark.parametrize("flag", ("", "--as-images"))
def test_an_image_of_a_question_is_no_frame_of_its_video(server, maker, tmp_path, flag):
    LAYOUTS["videovista"][0](maker)
    Image.new("RGB", (40, 40), (250, 0, 0)).save(tmp_path / "who.png")
    rows = json.loads((tmp_path / "VideoVista.json").read_text())
    maker.write("VideoVista.json", [rows[1] | {"image_name": "who.png"}])
    (tmp_path / "relation_images").mkdir()
    (tmp_path / "who.png").rename(tmp_path / "relation_images" / "who.png")
    flags = ("--frames=3", *([flag] if flag else []))
    assert run(server, tmp_path, tmp_path / "eval", "videovista", *flags)["score"] == 1.0
    *video, image, text = server.seen[0]["messages"][0]["content"]
    assert [part["type"] for part in video] == (["image_url"] * 3 if flag else ["video_url"])
    assert flag or len(video[0]["frame_times"]) == video[0]["video_url"]["url"].count(",") == 3
    shown = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert shown.getpixel((16, 16))[0] > 200 and text["type"] == "text"


def test_failures_are_rows_and_an_answer_is_begun(server, data, tmp_path, capsys):
    server.told = {1: (200, ""), 2: (400, "")}
    score = run(server, data("mlvu-test"), tmp_path / "a", "mlvu-test", "--frames=2", "--at-a-time=1")
    body = server.seen[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant"]
    assert body["messages"][2]["content"] == "Best Option: (" and body["continue_final_message"] is True
    assert score["hidden"] == 1
    failed = run(server, data("videovista"), tmp_path / "b", "videovista", "--frames=2", "--at-a-time=1")
    assert (failed["request"], failed["score"], failed["counted"]) == (1, 0.5, 2)
    again = run(server, data("videovista"), tmp_path / "b", "videovista", "--frames=2", "--at-a-time=1")
    assert len(server.seen) == 4 and again["request"] == 0  # only what failed


def test_a_server_that_is_loading_is_waited_for(server, data, tmp_path):
    server.told = {1: (503, ""), 2: (503, ""), 4: (503, "")}
    benchmark = BENCHMARKS["videovista"]
    tasks = tasks_of(benchmark, questions_of(benchmark, data("videovista")), frames=2)
    with Samples(tmp_path) as samples:
        ask_server(Server(server.address, "m", side=32, retries=0), tasks, samples, at_a_time=1)
        failed = [bool(row.get("failure")) for row in samples.latest.values()]
    assert failed == [False, True] and len(server.seen) == 4  # once it has answered, 503 is a failure


def test_what_a_server_cannot_do_is_one_line(server, data, tmp_path, capsys):
    run(server, data("seed-bench-2"), tmp_path, "seed-bench-2", code=2)
    assert "a server does not tell how likely an option is: choose --prompt=lmms-eval" in capsys.readouterr().err
    server.told = dict.fromkeys(range(1, 9), (401, ""))
    run(server, data("videovista"), tmp_path, "videovista", code=2)
    assert "status 401, the key is wrong" in capsys.readouterr().err
    assert main(["eval", "--server=x", "--checkpoint=x", "--benchmark=mvbench", "--data=.", "--workdir=w"]) == 2
    assert "--checkpoint and --server are two models" in capsys.readouterr().err
