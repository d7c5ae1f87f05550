"""The page over HTTP, as gradio_client drives it and as an attacker would; nothing here needs a browser."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.web.sessions import Bounds, Sessions
from kangaroo_jax.web.talk import Talk
from tests.web.conftest import Shown, files_in, showing
from tests.web.fake import FakeModel

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow  # Gradio's import alone takes seconds
CHAT, STAGE, PROGRESS, NOTE, ALERT, QUESTION = range(6)
GIVEN = (0, 0, 0)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(WorkFolder(tmp_path_factory.mktemp("work")))
        decoder = ThreadDecoder(2)
        stack.callback(decoder.close)
        sessions = Sessions(lambda limits: MediaStore(folder, limits), Bounds(max_upload_mb=2, max_files=4))
        yield stack.enter_context(showing(Talk(FakeModel(), decoder, sessions)))


@pytest.fixture
def user(page: Shown) -> Iterator[SimpleNamespace]:
    """A user, and the address where their files go."""
    with opened(page) as one:
        yield one


@contextlib.contextmanager
def opened(page: Shown) -> Iterator[SimpleNamespace]:
    client = page.client()
    try:
        said = client.predict(api_name="/open")
        upload = next(match[1] for part in said if (match := re.search(r'data-upload="([^"]+)"', str(part))))
        yield SimpleNamespace(client=client, upload=upload, media=upload.replace("/upload/", "/media/"))
    finally:
        client.close()


def put(page: Shown, user: SimpleNamespace, path: Path, name: str = "") -> tuple[int, dict]:
    status, _, body = page.ask("PUT", f"{user.upload}?name={name or path.name}", path.read_bytes())
    return status, json.loads(body)


def test_a_film_two_questions_and_a_new_conversation(page, user, films):
    assert put(page, user, films / "a.mp4") == (200, {"name": "a.mp4"})
    watched = user.client.submit(*GIVEN, api_name="/watch")
    assert watched.result()[STAGE].count("<figure") == 4
    job = user.client.submit("What comes first?", *GIVEN, api_name="/ask")
    chat = job.result()[CHAT]
    assert [turn["role"] for turn in chat] == ["user", "assistant"] and "A red ring" in str(chat[1]["content"])
    assert len([state for state in job.outputs() if "A red" in str(state[CHAT])]) >= 2  # it streams
    assert "4 frames remembered" in job.result()[NOTE]
    chinese = user.client.predict("最后出现什么？", *GIVEN, api_name="/ask")
    assert len(chinese[CHAT]) == 4 and "红色的环" in str(chinese[CHAT][3])
    assert len(page.model.asked[-1][0]) == 3
    assert user.client.predict(api_name="/forget")[CHAT] == [] and files_in(page.talk) == 0
    assert "给它看一段视频" in str(user.client.predict("zh", api_name="/speak"))


def test_mistakes_are_a_line(page, user, films):
    assert put(page, user, films / "no.mp4")[0] == 200
    assert "no.mp4: no video" in user.client.predict(*GIVEN, api_name="/watch")[ALERT]
    assert "must be a number" in user.client.predict("What?", 0, 0, -5, api_name="/ask")[ALERT]
    status, said = put(page, user, films / "a.mp4", "x" * 300)
    assert status == 200 and len(said["name"]) <= 60
    assert json.loads(page.ask("PUT", f"{user.upload}?name=empty.mp4")[2]) == {"error": "empty.mp4: the file is empty"}
    large = page.connection()
    large.putrequest("PUT", f"{user.upload}?name=big.mp4")
    large.putheader("Content-Length", str(3 << 20))
    large.endheaders()  # refused before a byte of it is read
    answer = large.getresponse()
    assert answer.status == 413 and "larger than 2 MB" in json.loads(answer.read())["error"]
    large.close()


def test_stop_and_an_answer_under_way(page, user):
    page.model.go.clear()
    try:
        job = user.client.submit("What?", *GIVEN, api_name="/ask")
        while not page.model.answers or page.model.answers[-1].cancelled:
            time.sleep(0.01)
        user.client.predict(api_name="/stop")
        result = job.result()
        assert page.model.answers[-1].cancelled and result[CHAT] == [] and "What?" in str(result[QUESTION])
    finally:
        page.model.go.set()


def test_users_see_their_own_files_and_nobody_elses(page, user, films):
    assert put(page, user, films / "a.mp4")[0] == 200
    user.client.predict(*GIVEN, api_name="/watch")
    address = user.media + "/1"
    status, headers, body = page.ask("GET", address)
    assert (status, body) == (200, (films / "a.mp4").read_bytes()) and headers["content-type"] == "video/mp4"
    assert headers["x-content-type-options"] == "nosniff" and "sandbox" in headers["content-security-policy"]
    assert page.ask("GET", address, range="bytes=2-5")[0::2] == (206, body[2:6])
    with opened(page) as other:
        assert other.upload != user.upload
        assert page.ask("GET", other.media + "/1")[0] == 404
        asked = other.client.predict("What?", *GIVEN, api_name="/ask")
        assert len(asked[CHAT]) == 2 and "▸" not in str(asked[CHAT])
    for bad in ("/kangaroo/media/x/1", user.media + "/2", user.media + "/../1", user.media + "/%2e%2e/1", user.media):
        assert page.ask("GET", bad)[0] in (404, 405), bad
    watcher = page.connection()
    watcher.request("GET", f"/gradio_api/heartbeat/{user.client.session_hash}")
    watcher.getresponse().readline()
    watcher.sock.close()
    watcher.close()
    end = time.monotonic() + 10
    while page.ask("GET", address)[0] != 404 and time.monotonic() < end:
        time.sleep(0.1)
    assert page.ask("GET", address)[0] == 404  # gone with its page


def test_a_page_of_html_is_never_shown_as_one(page, user, tmp_path):
    (tmp_path / "x.html").write_text("<script>alert(1)</script>")
    put(page, user, tmp_path / "x.html", "film.mp4")
    status, headers, _ = page.ask("GET", user.media + "/1")
    assert status == 200 and headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/stream/x/1/2/playlist.m3u8",
        "/gradio_api/deep_link",
        "/gradio_api/vibe-code/",
        "/gradio_api/runs",
        "/gradio_api/upload_progress?upload_id=1",
        "/gradio_api/openapi.json",
        "/monitoring",
        "/?deep_link=../../x",
        "/docs",
        "/openapi.json",
        "/svelte/../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/static/%2e%2e/%2e%2e/routes.py",
        "//etc/passwd",
    ],
)
def test_gradio_serves_no_files_and_no_pages_of_its_own(page, path):
    status, _, body = page.ask("GET", path)
    assert status in (403, 404) and b"root:" not in body, path


@pytest.mark.parametrize(
    "path", ["upload", "run/ask", "api/ask", "call/ask", "call/v2/ask", "component_server", "vibe-edit/"]
)
def test_gradio_takes_no_files_and_no_calls_beside_its_queue(page, path):
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n--b--\r\n'
    assert page.ask("POST", f"/gradio_api/{path}", form, content_type="multipart/form-data; boundary=b")[0] == 404


def joined(page: Shown, data: object, **headers: str) -> int:
    body = json.dumps({"data": data, "fn_index": 0, "session_hash": "attacker"}).encode()
    return page.ask("POST", "/gradio_api/queue/join?", body, content_type="application/json", **headers)[0]


def test_a_request_names_no_file_to_gradio(page):
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for data in ([file], [[{"a": [file]}]], {"url": "http://127.0.0.1:1/"}, [{"meta": {}}]):
        assert joined(page, data) == 400
    assert page.ask("POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400
    assert page.ask("POST", "/gradio_api/queue/join", b"no json")[0] == 400
    assert page.ask("POST", "/gradio_api/queue/join", bytes(1 << 19))[0] == 413
    assert joined(page, ["What?", 0, 0, 0]) == 200


def test_only_this_page_may_ask(page, user, films):
    own = page.url.rstrip("/")
    assert page.ask("GET", "/", host="evil.example")[0] == 403  # a name that was led here
    assert page.ask("GET", "/", host="localhost:1")[0] == page.ask("GET", "/", host="[::1]:1")[0] == 200
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}):
        assert joined(page, ["What?", 0, 0, 0], **headers) == 403
        assert page.ask("PUT", f"{user.upload}?name=a", b"x", **headers)[0] == 403
        assert page.ask("GET", user.media + "/1", **headers)[0] == 403
    assert joined(page, ["What?", 0, 0, 0], origin=own, sec_fetch_site="same-origin") == 200
    assert page.ask("GET", "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200  # a link


def test_the_page_fetches_nothing_from_elsewhere_and_reports_to_nobody(page):
    status, headers, body = page.ask("GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert headers["x-frame-options"] == "DENY" and headers["referrer-policy"] == "no-referrer"
    config = json.loads(page.ask("GET", "/config")[2])
    assert config["analytics_enabled"] is False and not config.get("space_id")
    assert str(Path(__file__).parents[2]).encode() not in body
    loaded = re.findall(rb'(?:src|href)="(https?:)?//', body)
    assert not loaded
