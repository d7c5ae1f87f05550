"""A backend that is a Kangaroo in this process: a checkpoint of ours, or an export of it, answers in batches."""

import asyncio
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.requests import Completion, Failure, Request


class OwnModel:
    """A model that training wrote. Requests that wait at the same time are answered in one batch.

    It has no structured outputs: an answer to a request with a schema is only checked.
    """

    cached = True

    def __init__(self, name: str, checkpoint: str, *, batch_size: int = 16, settings: Mapping[str, Any]) -> None:
        """`settings`: temperature, top_p and seed. Raises UserError if there is no checkpoint."""
        self.name, self.settings = name, dict(settings)
        folder = _folder_of(checkpoint)
        self._path = str(folder)
        self.model = f"kangaroo:{folder.parent.name}/{folder.name}@{folder.stat().st_mtime_ns}"
        self._batch_size = batch_size
        self._waiting: list[tuple[Any, int, asyncio.Future[str]]] = []
        self._worker: asyncio.Task[None] | None = None

    @property
    def _kangaroo(self) -> Any:
        """The model, loaded for the first call."""
        return _load(self._path)

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """See `Backend`. Token counts are those of the text, without vision tokens."""
        from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn

        media = tuple(Media("image", path) for path in request.images)
        text = "<image>\n" * len(media) + "\n\n".join(part for part in (request.system, request.text) if part)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((Conversation(request.prompt, (Turn("user", text),), media), max_tokens, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        answer = await future
        encode = self._kangaroo.tokenizer.encode
        written = len(encode(answer))
        return Completion(answer, "length" if written >= max_tokens else "stop", len(encode(text)), written)

    async def _work(self) -> None:
        """Answer batches of requests with equal `max_tokens` until none waits."""
        await asyncio.sleep(0)  # lets requests made at the same moment join the batch
        while self._waiting:
            longest = self._waiting[0][1]
            indices = [i for i, item in enumerate(self._waiting) if item[1] == longest][: self._batch_size]
            batch = [self._waiting[i] for i in indices]
            for i in reversed(indices):
                del self._waiting[i]
            conversations = [item[0] for item in batch]
            try:
                answers = await asyncio.to_thread(self._answer, conversations, longest)
            except Exception as error:
                answers = [error] * len(batch)
            if len(batch) > 1 and isinstance(answers[0], UserError):  # one file is bad: answer one by one
                answers = [await asyncio.to_thread(self._answer_one, one, longest) for one in conversations]
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, UserError):
                    future.set_exception(Failure("input", str(answer), transient=False))
                elif isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _answer(self, conversations: list[Any], max_tokens: int) -> list[Any]:
        from kangaroo_jax.inference.sampling import Sampling

        settings = self.settings
        sampling = Sampling(settings.get("temperature", 0.0), settings.get("top_p", 0.9), settings.get("seed", 0))
        return self._kangaroo.answer_many(
            conversations, max_new_tokens=max_tokens, batch_size=self._batch_size, sampling=sampling
        )

    def _answer_one(self, conversation: Any, max_tokens: int) -> Any:
        try:
            return self._answer([conversation], max_tokens)[0]
        except UserError as error:
            return error

    async def close(self) -> None:
        """See `Backend`."""
        if self._worker is not None:
            self._worker.cancel()


@functools.lru_cache(maxsize=4)
def _load(checkpoint: str) -> Any:
    """One model for all backends that name it."""
    from kangaroo_jax.inference.chat import Kangaroo

    return Kangaroo.load(checkpoint)


def _folder_of(checkpoint: str) -> Path:
    """The folder of the step that a folder of a curriculum, stage or step stands for. Raises UserError."""
    from kangaroo_jax.checkpoints.reading import find

    return Path(find(checkpoint)).resolve()
