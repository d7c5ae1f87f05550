"""A whole server with an engine that has no model: `python -m tests.serving.process OPTIONS LIMITS ENGINE`, JSON each.

ENGINE: `tokenizer`, a file; `pieces` and `pause` of the engine; `loads` seconds; `fault` of loading; `fails` after so
many seconds.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from kangaroo_jax.config import stage_config
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.backend import Backend
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.server import Options, serve
from tests.serving.fake import FakeEngine, fake_backend


def run() -> int:
    options, limits, told = (json.loads(word) for word in sys.argv[1:])
    bounds = Limits(**limits)

    def load(step: Callable[[str], None]) -> Backend:
        own, loop = (os.getpriority(os.PRIO_PROCESS, number) for number in (threading.get_native_id(), os.getpid()))
        step(f"loading, {own - loop} nicer than the event loop")
        time.sleep(told.get("loads", 0))
        if told.get("fault"):
            raise UserError(told["fault"])
        engine = FakeEngine(tuple(told["pieces"]), told["pause"])
        if "fails" in told:
            threading.Timer(told["fails"], lambda: setattr(engine, "failed", "it has failed twice")).start()
        return fake_backend(engine, load_tokenizer(told["tokenizer"]), stage_config("tiny").data, bounds)

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return serve(Options(**options), bounds, load)
    except UserError as error:
        print(f"kangaroo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(run())
