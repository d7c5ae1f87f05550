"""The process: it listens at once, loads and compiles beside that, answers, and goes when it is told to."""

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from kangaroo_jax.serving.app import make_app
from kangaroo_jax.serving.backend import Backend
from kangaroo_jax.serving.connections import config_of
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.listening import Quiet, announced, listening
from kangaroo_jax.serving.service import Service
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.system.progress import Tell

log = logging.getLogger(__name__)

_TICK = 0.1  # seconds between two looks at the event loop, the engine and who is left
_NICER = 5  # by which threads and processes that compute give way to the event loop
_LAST_WORDS = 3.0  # seconds in which those whose answers are given up are told


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the server listens, to whom, and what of this machine it reads."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    port_file: str = ""  # where the port is written
    names: tuple[str, ...] = ("kangaroo",)
    keys: tuple[str, ...] = ()
    share_cache: bool = False
    origins: tuple[str, ...] = ()
    root_path: str = ""
    media_root: str = ""
    media_hosts: tuple[str, ...] = ()
    media_folder: str = ""
    drain_seconds: float = 60.0


def serve(options: Options, limits: Limits, load: Callable[[Tell], Backend]) -> int:
    """Answer until SIGTERM or Ctrl-C; the exit code: 0, or 1 where the engine has failed.

    `load` makes what answers; it is given a function to say how far it is. Raises UserError where it does, where the
    address is taken or a folder cannot be used, and KeyboardInterrupt after Ctrl-C.
    """
    with WorkFolder(options.media_folder or None) as folder, listening(options.host, options.port) as opened:
        several = len(set(options.keys)) > 1
        store = MediaStore(folder, limits, options.media_root or None, options.media_hosts, several_keys=several)
        service = Service(options.names, limits, store, share_cache=options.share_cache, several_keys=several)
        app = make_app(service, keys=options.keys, origins=options.origins, root_path=options.root_path)
        process = _Process(service, options, load)
        asyncio.run(process.run(app, opened))
        if process.loading.is_alive():  # nothing ends a compilation
            folder.close()
            sys.stdout.flush()
            os._exit(130 if process.interrupted else 0)
        service.close()
    if process.interrupted:
        raise KeyboardInterrupt
    if process.error is not None:
        raise process.error
    return 1 if process.lost else 0


class _Process:
    """What goes on beside the answering."""

    def __init__(self, service: Service, options: Options, load: Callable[[Tell], Backend]) -> None:
        self.service, self._options, self._load = service, options, load
        self.error: Exception | None = None
        self.lost = self.interrupted = False
        self.loading = threading.Thread(target=self._open, name="loading", daemon=True)
        self._leaves_at: float | None = None

    async def run(self, app: Any, opened: socket.socket) -> None:
        """Serve until the end."""
        server = Quiet(config_of(app))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        serving = asyncio.create_task(server.serve(sockets=[opened]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        log.info("listening on %s", announced(opened, self._options.port_file))
        self.loading.start()
        while not (serving.done() or self._is_over()):
            due = loop.time() + _TICK
            await asyncio.sleep(_TICK)
            self.service.metrics.lag.observe(max(0.0, loop.time() - due))
        self.service.give_up()
        end = loop.time() + _LAST_WORDS
        while self.service.admission.requests and loop.time() < end and not serving.done():
            await asyncio.sleep(0.02)
        server.should_exit = server.force_exit = True
        await serving

    def _open(self) -> None:
        """Load the model, in a thread of its own."""

        def step(what: str) -> None:
            self.service.state = what
            log.info("%s", what)

        _give_way()
        try:
            backend = self._load(step)
            gc.collect()
            gc.freeze()  # a search of all that was loaded for garbage would hold up the event loop
            self.service.backend = backend
        except Exception as error:
            self.error = error

    def _drain(self) -> None:
        """Take nothing in any more, and go when nothing is left or the time is over."""
        if not self.service.admission.draining:
            log.info("going down, %d requests are under way", self.service.admission.requests)
            self.service.admission.draining = True
            self._leaves_at = time.monotonic() + self._options.drain_seconds

    def _interrupt(self) -> None:
        if self.interrupted:
            os._exit(130)
        self.interrupted = True
        self._drain()
        self._leaves_at = time.monotonic()

    def _is_over(self) -> bool:
        backend = self.service.backend
        if backend is not None and backend.failed is not None:
            log.error("%s", backend.failed)
            self.lost = True
        left = self.service.admission.requests
        drained = self._leaves_at is not None and (not left or time.monotonic() >= self._leaves_at)
        return self.lost or self.error is not None or drained


def _give_way() -> None:
    """This thread, and the threads and processes that it starts, give way to the event loop where CPUs are short."""
    if sys.platform == "linux":  # elsewhere priorities are those of processes
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICER))
