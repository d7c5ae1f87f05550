"""What `kangaroo bench serve` asks, and how: clients of the `openai` package that stream, leave, and make mistakes."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.installing import install_line

SHARES = {"whole": 0.45, "streamed": 0.3, "left": 0.1, "malformed": 0.1, "oversize": 0.05}  # of a round
VALID = ("whole", "streamed")
QUESTIONS = 96  # different ones
_LONGEST_WAIT = 5.0  # seconds, of what a busy server asks for
_LEAVES_AFTER = 0.1  # seconds, where nothing is streamed
_MALFORMED: tuple[Mapping[str, Any], ...] = (
    {"temperature": "hot"},
    {"n": 0},
    {"messages": []},
    {"model": "nobody's"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}}]}
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}]}]},
    {"tools": [{"type": "function"}]},
    {"max_tokens": -1},
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A text, and the file that it is about."""

    text: str
    kind: str = "text"  # "image" or "video" where there is a file
    file: Path | None = None

    def messages(self) -> list[dict[str, Any]]:
        """As a request has it, its file within."""
        if self.file is None:
            return [{"role": "user", "content": self.text}]
        kind = {"image": "image/png", "video": "video/mp4"}[self.kind]
        address = f"data:{kind};base64,{base64.b64encode(self.file.read_bytes()).decode()}"
        part = {"type": f"{self.kind}_url", f"{self.kind}_url": {"url": address}}
        return [{"role": "user", "content": [part, {"type": "text", "text": self.text}]}]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question and how it is asked: one of `SHARES`; `number` is that of the request."""

    question: Question
    way: str
    number: int


@dataclasses.dataclass
class Outcome:
    """What became of a request."""

    status: str  # "answered", "left", an HTTP status with the error's code, or what failed
    text: str = ""
    seconds: float = 0.0  # until all of it was there
    first: float | None = None  # until the first piece of a streamed text
    usage: Mapping[str, float] = dataclasses.field(default_factory=dict)  # the server's seconds by part
    tokens: int = 0
    busy: int = 0  # how often it was told to come again


def made_up(folder: Path, count: int = QUESTIONS) -> list[Question]:
    """Questions about texts, images and videos, which are written into the folder; the same each time."""
    rng = np.random.default_rng(0)
    files: list[tuple[str, Path | None]] = [("text", None), ("text", None)]
    from PIL import Image

    for number in range(6):
        pixels = rng.integers(0, 255, (6, 6, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        memory = io.BytesIO()
        Image.fromarray(pixels).save(memory, "PNG")
        image = folder / f"{number}.png"
        image.write_bytes(memory.getvalue())
        frames = [np.roll(pixels, 4 * place, axis=number % 2) for place in range(16 + 8 * number)]
        video = write_h264(folder / f"{number}.mp4", frames, 8)
        files += [("image", image), ("video", video), ("text", None)]
    words = "What moves here first left right above slowly 红色 方块 先 后 and then which way".split()
    return [
        Question(" ".join(random.Random(place).choices(words, k=3 + place % 9)) + "?", *files[place % len(files)])
        for place in range(count)
    ]


def drawn(questions: Sequence[Question], requests: int, seed: int) -> list[Asked]:
    """A round's requests: as many of each way as `SHARES` says, in an order of its own."""
    rng = random.Random(seed)
    ways = [way for way, share in SHARES.items() for _ in range(int(share * requests))]
    ways += ["whole"] * (requests - len(ways))
    rng.shuffle(ways)
    return [Asked(rng.choice(questions), way, number) for number, way in enumerate(ways)]


@dataclasses.dataclass(frozen=True)
class Clients:
    """Clients of one server.

    `body_mb`: of what is larger than the server takes; `tokens`: of the longest answer.
    """

    url: str
    model: str
    key: str
    count: int
    body_mb: int
    tokens: int

    def ask(self, asked: Sequence[Asked]) -> list[list[Outcome]]:
        """What became of each request: a list that should have one outcome. Raises UserError without `openai`."""
        return asyncio.run(self._all(asked))

    async def _all(self, asked: Sequence[Asked]) -> list[list[Outcome]]:
        try:
            import openai
        except ImportError:
            raise UserError(f"bench serve: the package openai is missing: {install_line('dev')}") from None
        left = iter(asked)
        outcomes: list[list[Outcome]] = [[] for _ in asked]

        async def work() -> None:
            options: dict[str, Any] = {"base_url": f"{self.url}/v1", "api_key": self.key or "none"}
            async with openai.AsyncOpenAI(**options, max_retries=0, timeout=600) as client:
                for one in left:
                    outcomes[one.number].append(await self._outcome(client, one))

        await asyncio.gather(*(work() for _ in range(self.count)))
        return outcomes

    async def _outcome(self, client: Any, asked: Asked) -> Outcome:
        """One request, asked again while the server is busy."""
        import openai

        busy = 0
        while True:
            begun = time.perf_counter()
            try:
                outcome = await self._answer(client, asked)
            except openai.RateLimitError as error:
                busy += 1
                await asyncio.sleep(min(_LONGEST_WAIT, float(error.response.headers.get("retry-after", 1))))
                continue
            except openai.APIStatusError as error:
                outcome = Outcome(f"{error.status_code} {error.code}")
            except openai.APIConnectionError as error:
                outcome = Outcome(f"no connection ({type(error.__cause__).__name__})")
            except openai.APIError as error:  # in the middle of a stream
                outcome = Outcome(f"broken off ({error.code})")
            outcome.seconds, outcome.busy = time.perf_counter() - begun, busy
            return outcome

    async def _answer(self, client: Any, asked: Asked) -> Outcome:
        fields: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": self.tokens}
        fields["messages"] = asked.question.messages()
        if asked.way == "malformed":
            fields["extra_body"] = _MALFORMED[asked.number % len(_MALFORMED)]
        if asked.way == "oversize":
            fields["user"] = "x" * ((self.body_mb << 20) + 1)
        create = client.chat.completions.create
        if asked.way == "left":
            return await _left(create, fields | {"max_tokens": 4096}, streamed=asked.number % 2 == 0)
        if asked.way == "streamed":
            return await _streamed(create, fields)
        whole = await create(**fields)
        message = whole.choices[0].message.content
        return Outcome("answered", message, usage=_seconds(whole), tokens=whole.usage.completion_tokens)


async def _streamed(create: Any, fields: dict[str, Any]) -> Outcome:
    """A stream to its end."""
    begun = time.perf_counter()
    found = Outcome("ended without a reason")
    async with await create(**fields, stream=True, stream_options={"include_usage": True}) as stream:
        async for piece in stream:
            if piece.usage is not None:
                found.tokens = piece.usage.completion_tokens
            for choice in piece.choices:
                if choice.delta.content and found.first is None:
                    found.first = time.perf_counter() - begun
                found.text += choice.delta.content or ""
                if choice.finish_reason is not None:
                    found.status = "answered" if found.status != "answered" else "ended twice"
                    found.usage = _seconds(piece)
    return found


async def _left(create: Any, fields: dict[str, Any], *, streamed: bool) -> Outcome:
    """A request whose client goes half-way: after the first words of a stream, or while it waits for the whole."""
    fields["extra_body"] = {"ignore_eos": True}
    if streamed:
        async with await create(**fields, stream=True) as stream:
            async for piece in stream:
                if piece.choices and piece.choices[0].delta.content:
                    break
    else:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVES_AFTER):
                await create(**fields)
    return Outcome("left")


def _seconds(answer: Any) -> Mapping[str, float]:
    """Seconds by part of the work, where the server tells them."""
    told = getattr(answer, "kangaroo", None) or {}
    return dict(told.get("seconds", {}))
