"""An OpenAI chat completions server that fails on purpose, to measure the annotation client against.

    python -m kangaroo_jax.bench.faulty_server --faults=0.1        prints its port, serves until it is killed

Answers depend on the request alone: words drawn by its hash, in its language, filled into the JSON schema if it has
one. A share of the calls gets a fault instead of the answer: status 429 (with Retry-After), status 503, no answer at
all, half an answer (finish_reason length), or invalid JSON.

With `--hostile` no answer is valid: each call gets the next entry of the table `HOSTILE`, which has responses of broken
and hostile servers.
"""

import argparse
import asyncio
import gzip
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.system.children import end_with_parent

FAULTS = ("429", "503", "hang", "truncated", "malformed")
_EN = "a man woman dog cat red blue green car ball table street kitchen walks holds throws opens beside near tree door"
_ZH = "一个男人在厨房里打开红色的门然后拿起蓝色的球走到街上看见绿色汽车和一只小狗坐在树旁边女人桌子"
_DEEP, _LONG = b"[" * 100_000, b" " * 16_000_000


def _said(content: Any, **more: Any) -> bytes:
    """A body whose message has that content, of any type; `more` replaces other keys, such as `usage`."""
    choices = [{"message": {"content": content} | more.pop("message", {}), "finish_reason": "stop"}]
    return json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}} | more).encode()


# Name -> status, headers, body. In a body, b"KEY" stands for the request's API key.
HOSTILE: dict[str, tuple[int, tuple[str, ...], bytes]] = {
    "content list": (200, (), _said([1])),
    "content number": (200, (), _said(7)),
    "content null": (200, (), _said(None)),
    "content object": (200, (), _said({"text": "a"})),
    "refusal object": (200, (), _said("a dog", message={"refusal": {"why": 1}})),
    "message list": (200, (), b'{"choices": [{"message": []}]}'),
    "choices object": (200, (), b'{"choices": {"0": {}}}'),
    "usage list": (200, (), _said("a dog", usage=[1])),
    "body list": (200, (), b"[]"),
    "body number": (200, (), b"1"),
    "body empty": (200, (), b""),
    "body not UTF-8": (200, (), b"\xff\xfe"),
    "body deep": (200, (), _DEEP),
    "body long": (200, (), _LONG),
    "body packed": (200, ("content-encoding: gzip",), gzip.compress(_LONG, 1)),
    "body packed twice": (200, ("content-encoding: gzip, gzip",), gzip.compress(gzip.compress(_LONG))),
    "body not packed": (200, ("content-encoding: gzip",), b"{}"),
    "answer deep": (200, (), _said(_DEEP.decode())),
    "answer number": (200, (), _said("9" * 5000)),
    "answer long": (200, (), _said("a dog runs " * 100_000)),
    "answer half a letter": (200, (), _said('{"short": "\\ud83d", "more": 1, "\ud83d": 1}')),
    "tokens infinite": (200, (), _said("a dog").replace(b'_tokens": 1', b'_tokens": 1e999')),
    "tokens no number": (200, (), _said("a dog").replace(b'_tokens": 1', b'_tokens": NaN')),
    "tokens many": (200, (), _said("a dog").replace(b'_tokens": 1', b'_tokens": 1' + b"0" * 40)),
    "tokens negative": (200, (), _said("a dog").replace(b'_tokens": 1', b'_tokens": -1')),
    "tokens text": (200, (), _said("a dog").replace(b'_tokens": 1', b'_tokens": "many"')),
    "redirect": (307, ("location: http://127.0.0.1:9/v1/chat/completions?KEY",), b""),
    "echo of the key": (400, (), b'{"error": {"message": "bad header Authorization: Bearer KEY"}}'),
    "wait of no number": (429, ("retry-after: nan",), b"{}"),
    "wait without end": (503, ("retry-after: inf",), b"{}"),
    "wait of another year": (503, ("retry-after: Mon, 01 Jan 0001 00:00:00 +2359",), b"{}"),
    "status 999": (999, (), b""),
    "drip": (200, (), b'{"choices": [{"message": {"content": "a dog runs"}, "finish_reason": "stop"}]}'),
}


class Server:
    """Counts its requests. `truths` maps a part of a question to an answer of common knowledge."""

    def __init__(
        self,
        faults: float,
        latency: float,
        hang: float,
        seed: int,
        truths: Mapping[str, str] | None = None,
        hostile: Sequence[str] = (),
    ) -> None:
        """`faults` is the share from 0 to 1 of all kinds together; `latency` (the longest) and `hang` are seconds.

        `hostile` names entries of `HOSTILE` that are sent in turn instead of answers; a request that says "Say NAME."
        gets the entry with that name.
        """
        self._hostile, self._in_turn = tuple(hostile), itertools.cycle(hostile)
        self._faults, self._latency, self._hang = faults, latency, hang
        self._random, self._truths = random.Random(seed), dict(truths or {})
        self.given: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # good answers by the request's hash

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, kept open for further requests."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
                body = await reader.readexactly(size)
                path = head.split(b" ", 2)[1].decode()
                if self._hostile and not path.endswith("/stats"):
                    asked = (name for name in self._hostile if f"Say {name}.".encode() in body)
                    await self._harm(next(asked, None) or next(self._in_turn), head, writer)
                    return
                status, extra, answer = await self._respond(path, body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                lines = [f"HTTP/1.1 {status} x", "content-type: application/json", f"content-length: {len(data)}"]
                writer.write("\r\n".join([*lines, *extra, "", ""]).encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _harm(self, name: str, head: bytes, writer: asyncio.StreamWriter) -> None:
        """Send an entry of `HOSTILE`; "drip" is sent a byte at a time."""
        self.given[name] += 1
        key = next(
            (line[22:] for line in head.split(b"\r\n") if line.lower().startswith(b"authorization: bearer ")), b""
        )
        status, extra, data = HOSTILE[name]
        lines = [f"HTTP/1.1 {status} x", "content-type: application/json", f"content-length: {len(data)}", *extra]
        whole = "\r\n".join([*lines, "connection: close", "", ""]).encode() + data
        if len(data) < 1000:
            whole = whole.replace(b"KEY", key).replace(b"content-length: %d" % len(data), b"connection: close")
        step = 1 if name == "drip" else len(whole)
        for at in range(0, len(whole), step):
            writer.write(whole[at : at + step])
            await writer.drain()
            if name == "drip":
                await asyncio.sleep(self._hang / 20)

    async def _respond(self, path: str, body: bytes) -> tuple[int, list[str], Any]:
        if path.endswith("/stats"):
            doubled = sum(1 for count in self.answered.values() if count > 1)
            return 200, [], {"given": dict(self.given), "answered": len(self.answered), "doubled": doubled}
        request = json.loads(body)
        fault = self._random.choice(FAULTS) if self._random.random() < self._faults else ""
        await asyncio.sleep(self._random.random() * self._latency)
        self.given[fault or "ok"] += 1
        if fault == "429":
            return 429, ["retry-after: 0.1"], {"error": {"message": "slow down"}}
        if fault == "503":
            return 503, [], {"error": {"message": "overloaded"}}
        if fault == "hang":
            await asyncio.sleep(self._hang)
            return 504, [], {"error": {"message": "too late"}}
        for changing in ("seed", "max_tokens"):
            request.pop(changing, None)
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        text = self._answer(request, digest)
        finish = "stop"
        if fault == "truncated":
            text, finish = text[: len(text) // 2], "length"
        elif fault == "malformed":
            half = _completion('{"short": ', "stop", request)  # an answer that is cut short
            return 200, [], half if "response_format" in request and digest[0] < "8" else b'{"choices": [{'
        else:
            self.answered[digest] += 1
        return 200, [], _completion(text, finish, request)

    def _answer(self, request: dict[str, Any], digest: str) -> str:
        content = request["messages"][-1]["content"]
        said = content if isinstance(content, str) else content[-1]["text"]
        rng, chinese = random.Random(digest), any("\u4e00" <= letter <= "\u9fff" for letter in said[:20])
        schema = request.get("response_format", {}).get("json_schema", {}).get("schema")
        if schema is None:
            return _sentences(rng, chinese, 3)
        known = next((answer for question, answer in self._truths.items() if question in said), None)
        if known is not None and "enum" in schema["properties"].get("answer", {}):
            return json.dumps({"answer": _letter_of(known, said)})
        return json.dumps(_fill(schema, rng, chinese, "", self._truths), ensure_ascii=False)


def _completion(text: str, finish: str, request: Mapping[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": len(str(request["messages"])) // 4, "completion_tokens": len(text) // 2}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}], "usage": usage}


def _letter_of(answer: str, said: str) -> str:
    """The letter of an option."""
    line = next(line for line in said.splitlines() if line[:1] in "ABCDEFGH" and line[2:].strip() == answer)
    return line[0]


def _sentences(rng: random.Random, chinese: bool, count: int) -> str:
    if chinese:
        return "".join("".join(rng.sample(_ZH, rng.randint(10, 20))) + "。" for _ in range(count))
    words = _EN.split()
    return " ".join(" ".join(rng.sample(words, rng.randint(7, 12))).capitalize() + "." for _ in range(count))


def _fill(schema: Mapping[str, Any], rng: random.Random, chinese: bool, key: str, truths: Mapping[str, str]) -> Any:
    """A value that obeys a schema. A share of the questions has a truth of common knowledge."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return True
    if kind == "array":
        return [_fill(schema["items"], rng, chinese, key, truths) for _ in range(schema.get("minItems", 3))]
    if kind == "string":
        words = rng.sample(_ZH, 5) if chinese else rng.sample(_EN.split(), 3)
        phrase = "".join(words) if chinese else " ".join(words)
        if key == "question":
            return f"{phrase}是什么？" if chinese else f"What is {phrase}?"
        return _sentences(rng, chinese, 6) if key == "detailed" else phrase
    filled = {name: _fill(part, rng, chinese, name, truths) for name, part in schema["properties"].items()}
    if truths and "distractors" in filled and rng.random() < 0.2:
        filled["question"] = rng.choice(sorted(truths))
        filled["answer"] = truths[filled["question"]]
    return filled


async def _run(arguments: argparse.Namespace) -> None:
    truths = json.loads(Path(arguments.truths).read_text(encoding="utf-8")) if arguments.truths else {}
    hostile = tuple(HOSTILE) if arguments.hostile else ()
    server = Server(arguments.faults, arguments.latency, arguments.hang, arguments.seed, truths, hostile)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=512, limit=1 << 26)
    print(listening.sockets[0].getsockname()[1], flush=True)
    async with listening:
        await listening.serve_forever()


def main() -> None:
    """Run the server; see the module's docstring."""
    parser = argparse.ArgumentParser(description="a server of chat completions that fails on purpose")
    parser.add_argument("--faults", type=float, default=0.1, help="share of the calls")
    parser.add_argument("--latency", type=float, default=0.3, help="longest, in seconds")
    parser.add_argument("--hang", type=float, default=30.0, help="seconds that an unanswered call stays open")
    parser.add_argument("--truths", default="", help="JSON file of questions and answers that anybody knows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hostile", action="store_true", help="no answer is one: the table HOSTILE in turn")
    parser.add_argument("--parent", type=int, help="number of the process that starts it, with which it ends")
    options = parser.parse_args()
    if options.parent is not None:
        end_with_parent(options.parent)
    asyncio.run(_run(options))


if __name__ == "__main__":
    main()
