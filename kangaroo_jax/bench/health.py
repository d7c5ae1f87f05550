"""Asks a server's /health again and again until its input ends, then prints the seconds of each answer as JSON.

A process of its own, so that what loads the server does not hold up what measures it:
`python -m kangaroo_jax.bench.health HOST PORT`.
"""

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

_PAUSE = 0.05  # seconds between two questions
_LONGEST = 30.0  # seconds that one is waited for


@contextlib.contextmanager
def watched_health(url: str) -> Iterator[list[float]]:
    """Inside, /health is asked; afterwards the list has the seconds of each answer, `_LONGEST` where none came."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    command = [sys.executable, "-m", "kangaroo_jax.bench.health", parts.scheme, parts.hostname or "", str(port)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).resolve().parents[2])
    found: list[float] = []
    with process:
        try:
            yield found
            found += json.loads(process.communicate(timeout=2 * _LONGEST)[0])
        finally:
            process.kill()


def asked(scheme: str, host: str, port: int, over: threading.Event) -> list[float]:
    """Seconds of each answer, on a new connection each time, until `over`."""
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    found = []
    while not over.wait(_PAUSE):
        connection = kind(host, port, timeout=_LONGEST)
        begun = time.perf_counter()
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/health")
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                status = 0
        found.append(time.perf_counter() - begun if status == 200 else _LONGEST)
    return found


def main() -> None:
    """See the module's docstring."""
    over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    print(json.dumps(asked(sys.argv[1], sys.argv[2], int(sys.argv[3]), over)))


if __name__ == "__main__":
    main()
