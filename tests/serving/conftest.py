"""A server on 127.0.0.1 in a thread, whose engine says what it is told to."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.store import MediaStore
from tests.data.media import write_video

TEXT = [
    "What moves in the video, and which way?",
    "A red square moves to the left.",
    "视频里有什么?",
    "一个红色的方块。",
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXT, tmp_path_factory.mktemp("words") / "tokenizer.model", 300)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media root with a.mp4, 3 s, and no.mp4, which is none."""
    folder = tmp_path_factory.mktemp("films")
    write_video(folder / "a.mp4", 24)
    (folder / "no.mp4").write_bytes(b"no video" * 100)
    return folder


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    engine: Any
    service: Any
    folder: Path
    connections: Callable[[], int]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, key: str = "none", **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, **options)

    def left(self) -> dict[str, int]:
        """What requests hold at the moment."""
        there = self.service.admission
        files = len(list(self.folder.iterdir())) - 1
        return {"requests": there.requests, "bytes": there.body_bytes, "frames": there.frames, "files": files}


@pytest.fixture
def start(
    tmp_path: Path, tokenizer: Tokenizer, films: Path, make_micro_config: Callable
) -> Iterator[Callable[..., Running]]:
    """Starts a server: `start(limits, keys=..., ready=False, ...)`; `seconds` and `most` of its connections."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from kangaroo_jax.serving.app import make_app
    from kangaroo_jax.serving.connections import config_of
    from kangaroo_jax.serving.service import Service
    from tests.serving.fake import FakeEngine, fake_backend

    with contextlib.ExitStack() as stack:

        def begin(
            limits: Limits | None = None,
            engine: Any = None,
            ready: bool = True,
            share_cache: bool = False,
            **options: Any,
        ) -> Running:
            limits, engine = limits or Limits(), engine or FakeEngine()
            folder = stack.enter_context(WorkFolder(tmp_path / "work"))
            several = len(options.get("keys", ())) > 1
            store = MediaStore(folder, limits, films, several_keys=several)
            service = Service(("kangaroo", "k2"), limits, store, share_cache=share_cache, several_keys=several)
            if ready:
                service.backend = fake_backend(
                    engine, tokenizer, DataConfig.from_config(make_micro_config().data), limits
                )
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            bounds = {name: options.pop(name) for name in ("seconds", "most") if name in options}
            server = uvicorn.Server(config_of(make_app(service, **options), **bounds))
            thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
            thread.start()

            def stop() -> None:
                server.should_exit = server.force_exit = True
                thread.join(10)
                service.close()

            stack.callback(stop)
            return Running(
                f"http://127.0.0.1:{listening.getsockname()[1]}",
                engine,
                service,
                folder.path,
                lambda: len(server.server_state.connections),
            )

        yield begin
