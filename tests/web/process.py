"""A whole page around a model without weights: `python -m tests.web.process OPTIONS BOUNDS PIECES`, JSON each."""

import json
import logging
import sys

from kangaroo_jax.errors import UserError
from kangaroo_jax.web.server import Options, serve
from kangaroo_jax.web.sessions import Bounds
from tests.web.fake import FakeModel


def run() -> int:
    options, bounds, pieces = (json.loads(word) for word in sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        serve(Options(**options), Bounds(**bounds), lambda: FakeModel(pieces))
    except UserError as error:
        print(f"kangaroo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
