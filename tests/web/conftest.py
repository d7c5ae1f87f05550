"""The page's actions around a model that says what it is told to."""

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.web.sessions import Bounds, Session, Sessions
from kangaroo_jax.web.talk import Talk
from tests.data.media import numbered_frame, write_video
from tests.web.fake import FakeModel

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4 and b.mp4 of 4 s, photo.png, and no.mp4, which is none."""
    folder = tmp_path_factory.mktemp("films")
    write_video(folder / "a.mp4", 32, 8)
    write_video(folder / "b.mp4", 32, 8, gop=4)
    Image.fromarray(numbered_frame(5)).save(folder / "photo.png")
    (folder / "no.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Talk]]:
    """Makes a `Talk`: `begin(model, **bounds)`."""
    with contextlib.ExitStack() as stack:

        def make(model: FakeModel | None = None, **bounds: float) -> Talk:
            folder, decoder = stack.enter_context(WorkFolder(tmp_path / "work")), ThreadDecoder(2)
            stack.callback(decoder.close)
            sessions = Sessions(lambda limits: MediaStore(folder, limits), Bounds(**bounds))  # type: ignore[arg-type]
            talk = Talk(model or FakeModel(), decoder, sessions)
            stack.callback(talk.close)
            return talk

        yield make


def give(session: Session, path: Path, name: str = "") -> None:
    """Upload a file."""
    with session.receiving(name or path.name) as receiver:
        receiver.write(path.read_bytes())


def files_in(talk: Talk) -> int:
    """Files that are stored."""
    return len(list(talk.sessions.folder.iterdir())) - 1


@dataclass
class Shown:
    """A page in a thread of this process."""

    url: str
    talk: Talk

    @property
    def model(self) -> Any:
        return self.talk.model

    def client(self) -> Any:
        """Another user's browser, as gradio_client has it."""
        import gradio_client

        return gradio_client.Client(self.url, verbose=False, analytics_enabled=False)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://").rstrip("/"), timeout=20)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a bare request; underscores in names of headers are hyphens."""
        connection = self.connection()
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body or None, given)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def showing(talk: Talk) -> Iterator[Shown]:
    """The page of `talk`, on a free port."""
    import uvicorn

    from kangaroo_jax.web.server import Options, make_app

    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(make_app(talk, Options()), log_config=None, lifespan="on", http="h11", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Shown(f"http://127.0.0.1:{listening.getsockname()[1]}/", talk)
        talk.close()
        server.should_exit = server.force_exit = True
        thread.join(10)
