"""Asks a server of OpenAI's protocol: frames of a video are decoded here, once for its questions, and sent as JPEG."""

import asyncio
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from kangaroo_jax.data.media.video import FramePolicy, MediaRef, load_frames, load_media
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.asking import Told, fail, head_of, was_answered
from kangaroo_jax.evaluation.marking import MEDIA, REQUEST
from kangaroo_jax.evaluation.prompting import Shuffled, Task, digests_of, media_of, text_of, times_of
from kangaroo_jax.evaluation.samples import Row, Samples, key_of
from kangaroo_jax.evaluation.served import endpoint_of
from kangaroo_jax.llm_client.client import Client, Limits
from kangaroo_jax.llm_client.ordered import in_order
from kangaroo_jax.llm_client.requests import Reply, Request

_QUALITY = 95  # of JPEG
_LOADING = 1800.0  # seconds that a server may take to load its model
_EMPTY = "malformed: empty answer"  # what the client calls an answer without text


@dataclasses.dataclass(frozen=True)
class Server:
    """Where to ask, and how frames are sent."""

    url: str  # with /v1
    model: str  # as the server calls it
    api_key_env: str = ""  # the variable of the environment that holds the key
    as_images: bool = False  # each frame as an image, for servers that know no video
    side: int = 448  # pixels of a frame, padded square
    retries: int = 6
    timeout: float = 300.0  # seconds of a call


def ask_server(
    server: Server,
    tasks: Sequence[Task],
    samples: Samples,
    *,
    at_a_time: int = 8,
    strict: bool = False,
    told: Told = lambda task, row, before: None,
) -> None:
    """Ask what `samples` has no answer to yet; see `asking.ask_model`.

    Raises UserError: no server answers there, the key is wrong, or it cannot be asked a task.
    """
    for task in tasks:
        _check_can_be_asked(task)
    asyncio.run(_ask_all(server, tasks, samples, at_a_time, strict, told))


def _check_can_be_asked(task: Task) -> None:
    if not (task.wording.likelihood or task.wording.interleaved):
        return
    styles = [
        name
        for name, words in task.benchmark.wordings.items()
        if not any(wording.likelihood or wording.interleaved for wording in words.values())
    ]
    why = "does not tell how likely an option is" if task.wording.likelihood else "takes no text between frames"
    other = f": choose --prompt={styles[0]}" if styles else ""
    raise UserError(f"{task.benchmark.name}: a server {why}{other}")


async def _ask_all(
    server: Server, tasks: Sequence[Task], samples: Samples, at_a_time: int, strict: bool, told: Told
) -> None:
    endpoint = endpoint_of("server", server)
    client = Client(endpoint, Limits(concurrency=at_a_time, retries=server.retries, answer_retries=0))
    asking = _Asking(server, client, samples, strict, told)
    try:
        await in_order(asking.ask, tasks, at_a_time, lambda: None)
    finally:
        asking.shuffled.close()
        await endpoint.close()


class _Asking:
    def __init__(self, server: Server, client: Client, samples: Samples, strict: bool, told: Told) -> None:
        self._server, self._client, self._samples = server, client, samples
        self._strict, self._told = strict, told
        self._policy = FramePolicy(multiple=1)
        self.shuffled = Shuffled(server.side)
        self._answered, self._patience = False, time.monotonic() + _LOADING
        self._frames: dict[str, asyncio.Future[list[bytes]]] = {}  # of the videos that were asked about last

    async def ask(self, task: Task) -> None:
        """Ask one task, unless it was answered, and store what comes."""
        try:
            refs, text, identity = await asyncio.to_thread(self._prepared, task)
            key = key_of(identity)
            if was_answered(task, key, self._samples, self._told):
                return
            frames = [await self._jpegs(ref) for ref in refs]
        except UserError as error:
            fail(task, MEDIA, error, self._samples, self._strict, self._told)
            return
        reply = await self._reply(self._request(task, refs, text, frames))
        if reply.outcome == "error" and reply.reason != _EMPTY:
            fail(task, REQUEST, UserError(reply.reason), self._samples, self._strict, self._told)
            return
        row = self._row(task, refs, reply) | {"key": key, "identity": identity}
        self._samples.add(row)
        self._told(task, row, False)

    async def _reply(self, request: Request) -> Reply:
        """The reply of a server that may still be loading its model: until its first answer it may say so for long."""
        while True:
            reply = await self._client.ask(request)
            loading = reply.reason.startswith("status 503") and not self._answered
            if not loading or time.monotonic() > self._patience:
                self._answered = self._answered or reply.outcome != "error"
                return reply
            await asyncio.sleep(1.0)

    def _prepared(self, task: Task) -> tuple[tuple[MediaRef, ...], str, dict[str, Any]]:
        refs = media_of(task, self._policy, self.shuffled)
        text = text_of(task, refs)
        told = [task.wording.system, text, task.wording.prefill]
        identity = {
            "weights": f"{self._server.model} at {self._server.url}",
            "media": digests_of(refs),
            "prompt": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            "times": times_of(refs),
            "generation": task.generation(),
            "sent": {"side": self._server.side, "as_images": self._server.as_images, "quality": _QUALITY},
        }
        return refs, text, identity

    async def _jpegs(self, ref: MediaRef) -> list[bytes]:
        """The frames of a medium, decoded once by whoever asks first. Raises UserError."""
        name = repr(ref)
        if name not in self._frames:
            while len(self._frames) >= 2 * self._client.limits.concurrency:
                self._frames.pop(next(iter(self._frames)))
            self._frames[name] = asyncio.ensure_future(asyncio.to_thread(_decoded, ref, self._server.side))
        return await asyncio.shield(self._frames[name])

    def _request(self, task: Task, refs: Sequence[MediaRef], text: str, frames: Sequence[list[bytes]]) -> Request:
        """The request of a task; an image of the question stands behind its video."""
        shown = sorted(zip(refs, frames, strict=True), key=lambda pair: pair[0].kind == "image")
        timed = [] if self._server.as_images else [ref for ref in refs if ref.kind == "video"]
        return Request(
            f"{task.benchmark.name}@{task.style}",
            text,
            task.wording.system,
            max_tokens=task.max_new_tokens,
            frames=tuple(frame for _, some in shown for frame in some),
            frame_times=tuple(time for ref in timed for time in ref.times),
            prefill=task.wording.prefill,
        )

    @staticmethod
    def _row(task: Task, refs: Sequence[MediaRef], reply: Reply) -> Row:
        finish = "length" if reply.outcome == "truncated" else "stop"
        times = [[round(second, 3) for second in ref.times] for ref in refs]
        row: Row = {**head_of(task), "text": reply.text, "finish": finish, "tokens": reply.completion_tokens}
        return row | {"frame_times": times, "seconds": round(reply.seconds, 3)}


def _decoded(ref: MediaRef, side: int) -> list[bytes]:
    if ref.frames:
        clip = load_frames(ref.frames, ref.times, side)
    else:
        clip = load_media(ref.path, ref.kind, image_size=side, times=ref.times, start=ref.start)
    jpegs = []
    for pixels in clip.pixels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=_QUALITY)
        jpegs.append(file.getvalue())
    return jpegs
