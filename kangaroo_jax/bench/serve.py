"""`kangaroo bench serve`: a server under many clients, round after round: what it answers, how late, and what is left.

Each valid request must be answered once, and with a checkpoint as `Kangaroo.chat` answers it; the others must be
refused. Clients run in this process, and take a good part of a small machine from the server.
"""

import contextlib
import dataclasses
import http.client
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.bench.health import watched_health
from kangaroo_jax.bench.load import VALID, Asked, Clients, Outcome, Question, drawn, made_up
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.children import uninterrupted
from kangaroo_jax.system.progress import Tell

_REFUSED = {"malformed": ("400", "403", "404"), "oversize": ("413",)}  # statuses that these should have
_START_SECONDS = 900.0
_QUIET_SECONDS = 60.0  # until nothing is under way any more after a round
_SHARES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs; `process` and `folder` (of media) are known where it was started here."""

    url: str
    key: str = ""
    process: "subprocess.Popen[bytes] | None" = None
    folder: Path | None = None

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an address. Raises OSError, http.client.HTTPException."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", parts.path + path, headers={"Authorization": f"Bearer {self.key}"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def numbers(self) -> dict[str, float]:
        """/metrics by name. Raises UserError where it does not answer."""
        try:
            status, text = self.get("/metrics")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"bench serve: {self.url} does not answer ({error})") from None
        if status != 200:
            raise UserError(f"bench serve: {self.url}/metrics: status {status}; --api-key has the server's key")
        return {name: float(value) for name, value in re.findall(r"^(?:kangaroo_)?(\S+) (\S+)$", text, re.M)}

    def state(self) -> dict[str, float]:
        """What it holds when nothing is under way, as soon as that is so."""
        end = time.monotonic() + _QUIET_SECONDS
        while True:
            now = self.numbers()
            used = {name: value for name, value in now.items() if name.startswith("slots_used")}
            busy = now["requests_running"] + now["requests_waiting"] + sum(used.values())
            if not busy or time.monotonic() > end:
                break
            time.sleep(0.1)
        held = {
            "memory_mib": round(now.get("process_resident_memory_bytes", 0) / 2**20, 1),
            "descriptors": int(now.get("process_open_fds", 0)),
            "slots": int(busy),
            "workers_replaced": int(now["decode_workers_replaced_total"]),
            "programs_compiled": int(now["compilations_total"]),
        }
        if self.folder is not None and self.process is not None:
            held["files"] = len([path for path in self.folder.rglob("*") if path.is_symlink() or path.is_file()]) - 1
            held["workers_mib"] = round(sum(_resident_mib(pid) for pid in children(self.process.pid)), 1)
        return held


def bench_serve(
    *,
    checkpoint: str = "",
    url: str = "",
    key: str = "",
    model: str = "kangaroo",
    clients: int = 64,
    requests: int = 500,
    rounds: int = 3,
    tokens: int = 16,
    body_mb: int = 4,
    flags: Sequence[str] = (),
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """A row for each round, see `_row`; what `tell` gets says the same.

    Args:
        checkpoint: a server of it is started, and its answers are compared with those of the Python API.
        url: a server that runs, in place of a checkpoint.
        key: its API key.
        model: its name there.
        clients, requests, rounds: so many at a time, in a round, and of these.
        tokens: of the longest answer.
        body_mb: of a body that is refused; a server that is started gets it as its bound.
        flags: more flags for a server that is started.

    Raises UserError.
    """
    if bool(checkpoint) == bool(url):
        raise UserError("bench serve: give --checkpoint=DIR, or --url=http://HOST:PORT of a server that runs")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        questions = made_up(Path(name))
        right: Mapping[Question, str] = {}
        if checkpoint:
            tell("answering without a server")
            right = offline(checkpoint, questions, tokens)
            bounds = [f"--max-body-mb={body_mb}", f"--max-requests={2 * clients}", f"--max-key-requests={2 * clients}"]
            words = [f"--checkpoint={checkpoint}", "--dtype=float32", *bounds, *flags]
            tell("starting a server")
            server = stack.enter_context(started(words, Path(name)))
        else:
            server = Server(url.rstrip("/").removesuffix("/v1"), key)
            server.numbers()
        load = Clients(server.url, model, key, clients, body_mb, tokens)
        rows = []
        for number in range(1, rounds + 1):
            asked = drawn(questions, requests, number)
            with watched_health(server.url) as health:
                begun = time.perf_counter()
                outcomes = load.ask(asked)
                seconds = time.perf_counter() - begun
            rows.append(_row(number, asked, outcomes, right, seconds, health) | server.state())
            tell(line(rows[-1]))
        return rows


def offline(checkpoint: str, questions: Sequence[Question], tokens: int) -> dict[Question, str]:
    """What the Python API answers, in float32, always with the likeliest token. Raises UserError."""
    from kangaroo_jax.inference.chat import Kangaroo

    found = {}
    with Kangaroo.load(checkpoint, dtype="float32") as model:
        for question in questions:
            media = [] if question.file is None else [(question.kind, question.file)]
            found[question] = str(model.chat(query=question.text, media=media, max_new_tokens=tokens)[0])
    return found


@contextlib.contextmanager
def started(words: Sequence[str], folder: Path) -> Iterator[Server]:
    """A server with these flags, when it is ready; it ends with the block. Raises UserError where it does not start."""
    log, port = folder / "log", folder / "port"
    told = ["--port=0", f"--port-file={port}", f"--media-folder={folder / 'media'}", *words]
    with open(log, "wb") as file, uninterrupted():
        process = subprocess.Popen([sys.executable, "-m", "kangaroo_jax", "serve", *told], stderr=file)
    try:
        end = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            if port.exists():
                server = Server(f"http://127.0.0.1:{port.read_text().strip()}", "", process, folder / "media")
                if server.get("/health")[0] == 200:
                    break
            time.sleep(0.1)
        else:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"bench serve: the server did not start: {said[-1].removeprefix('kangaroo: ')}")
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _row(
    number: int,
    asked: Sequence[Asked],
    outcomes: Sequence[Sequence[Outcome]],
    right: Mapping[Question, str],
    seconds: float,
    health: Sequence[float],
) -> dict[str, Any]:
    """A round's figures; `lost`, `doubled`, `different` and `wrong` should be 0. Seconds where nothing else is said."""
    pairs = [(one, found[0]) for one, found in zip(asked, outcomes, strict=True)]
    valid = [(one, found) for one, found in pairs if one.way in VALID]
    answered = [(one, found) for one, found in valid if found.status == "answered"]
    row: dict[str, Any] = {
        "round": number,
        "requests": len(asked),
        "seconds": round(seconds, 2),
        "valid": len(valid),
        "lost": len(valid) - len(answered),
        "doubled": sum(len(found) != 1 for found in outcomes),
        "different": sum(found.text.strip() != right.get(one.question, found.text).strip() for one, found in answered),
        "wrong": sum(found.status[:3] not in _REFUSED[one.way] for one, found in pairs if one.way in _REFUSED),
        "busy": sum(found.busy for _, found in pairs),
        "statuses": dict(Counter(f"{one.way}: {found.status}" for one, found in pairs)),
        "tokens_per_second": round(sum(found.tokens for _, found in valid) / seconds, 1),
    }
    parts = {
        "queue": [found.usage.get("queue") for _, found in answered],
        "first_token": [found.usage.get("first_token") for _, found in answered],
        "first_piece": [found.first for _, found in answered],
        "health": health,
    }
    for name, measured in parts.items():
        known = [value for value in measured if value is not None]
        row |= {f"{name}_p{share}": round(float(np.percentile(known, share)), 4) for share in _SHARES if known}
    return row


def line(row: Mapping[str, Any]) -> str:
    """A row in words."""

    def times(name: str) -> str:
        return "/".join(f"{1e3 * row[f'{name}_p{share}']:.0f}" if f"{name}_p50" in row else "-" for share in _SHARES)

    wrong = ", ".join(f"{row[name]} {name}" for name in ("lost", "doubled", "different", "wrong"))
    refused = ", ".join(f"{count} {status}" for status, count in sorted(row["statuses"].items()))
    files = f", {row['files']} files, workers {row['workers_mib']:.0f} MiB" if "files" in row else ""
    return (
        f"round {row['round']}: {row['requests']} requests in {row['seconds']:.1f} s, "
        f"{row['tokens_per_second']:.0f} tokens/s; {row['valid']} valid ones: {wrong}\n"
        f"  p50/p90/p99 ms: queue {times('queue')}, first token {times('first_token')}, "
        f"first piece of a stream {times('first_piece')}, /health {times('health')}\n"
        f"  {refused}; told to come again {row['busy']} times\n"
        f"  after it: {row['memory_mib']:.0f} MiB, {row['descriptors']} descriptors, "
        f"{row['slots']} slots in use{files}; "
        f"{row['workers_replaced']} workers replaced, {row['programs_compiled']} programs compiled"
    )


def children(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                    found += [int(child), *children(int(child))]
    return found


def _resident_mib(pid: int) -> float:
    """Resident memory of a process, 0 where it has ended."""
    with contextlib.suppress(OSError):
        for text in Path(f"/proc/{pid}/status").read_text().splitlines():
            if text.startswith("VmRSS:"):
                return int(text.split()[1]) / 1024
    return 0.0
