"""The process: it loads the model, listens, and goes when it is told to."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from kangaroo_jax.data.media.decode import Decoder, ProcessDecoder
from kangaroo_jax.serving.connections import config_of
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.limits import MIB
from kangaroo_jax.serving.listening import Quiet, announced, listening
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.system.memory import Bounded
from kangaroo_jax.web.asking import Model
from kangaroo_jax.web.gate import Gate
from kangaroo_jax.web.page import mounted
from kangaroo_jax.web.routes import routes
from kangaroo_jax.web.sessions import Bounds, Sessions
from kangaroo_jax.web.talk import Talk

log = logging.getLogger(__name__)
_SWEEP = 30.0  # seconds between two looks for pages that nobody uses
_TICK = 0.1
_LAST_WORDS = 1  # seconds in which answers that are given up are told
_PICTURE_SECONDS, _PICTURE_MIB = 60.0, 2048  # what the process that makes pictures of frames may take


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the page is."""

    host: str = "127.0.0.1"
    port: int = 7860  # 0: a free one
    port_file: str = ""
    hosts: tuple[str, ...] = ()  # names of a proxy before it
    folder: str = ""  # for files


def serve(options: Options, bounds: Bounds, load: Callable[[], Model]) -> None:
    """Show the page until SIGTERM or Ctrl-C.

    Raises UserError where `load` does, where the address is taken or the folder cannot be used, and KeyboardInterrupt
    after Ctrl-C.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(listening(options.host, options.port))
        model = load()
        stack.callback(model.close)
        folder = stack.enter_context(WorkFolder(options.folder or None))
        prepare = Bounded(_PICTURE_MIB * MIB).begin
        decoder: Decoder = ProcessDecoder(1, _PICTURE_SECONDS, prepare=prepare)
        stack.callback(decoder.close)
        talk = Talk(model, decoder, Sessions(lambda limits: MediaStore(folder, limits), bounds))
        stack.callback(talk.close)
        interrupted = asyncio.run(_run(make_app(talk, options), talk, opened, options))
    if interrupted:
        raise KeyboardInterrupt


def make_app(talk: Talk, options: Options) -> Any:
    """The application: the page, its files, and the gate before both."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes.extend(routes(talk.sessions))
    return Gate(mounted(app, talk), options.host, options.hosts)


async def _run(app: Any, talk: Talk, opened: socket.socket, options: Options) -> bool:
    """Answer until the end; whether Ctrl-C was pressed."""
    config = config_of(app)
    config.lifespan, config.timeout_graceful_shutdown = "on", _LAST_WORDS  # Gradio's queue begins with it
    server, loop = Quiet(config), asyncio.get_running_loop()
    ends: list[int] = []

    def end(number: int) -> None:
        if number in ends:
            os._exit(130 if number == signal.SIGINT else 1)
        ends.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    serving = asyncio.create_task(server.serve(sockets=[opened]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    log.info("open %s in a browser", announced(opened, options.port_file))
    sweep = loop.time() + _SWEEP
    while not (serving.done() or ends):
        await asyncio.sleep(_TICK)
        if loop.time() >= sweep:
            sweep = loop.time() + _SWEEP
            await asyncio.to_thread(talk.sessions.sweep)
    await asyncio.to_thread(talk.sessions.close)  # ends answers, and who waits for one is told
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # connections are cut, which it takes for faults
    server.should_exit = True
    await serving
    return signal.SIGINT in ends
