"""A backend that is a Kangaroo in this process: a checkpoint of ours, or an export of it, answers many at a time."""

import asyncio
import functools
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.requests import Completion, Failure, Request

_loading = threading.Lock()


class OwnModel:
    """A model that training wrote. Its engine answers what is asked at the same time together.

    An answer to a request with a schema has its form, with `structured`; else it is only checked.
    """

    cached = True

    def __init__(
        self,
        name: str,
        checkpoint: str,
        *,
        batch_size: int = 16,
        structured: bool = True,
        settings: Mapping[str, Any],
    ) -> None:
        """`batch_size`: answers under way at a time; `settings`: temperature, top_p and seed.

        Raises UserError if there is no checkpoint.
        """
        self.name, self.settings = name, dict(settings)
        folder = _folder_of(checkpoint)
        self._path = str(folder)
        self.model = f"kangaroo:{folder.parent.name}/{folder.name}@{folder.stat().st_mtime_ns}"
        self._structured = structured
        self._turns = asyncio.Semaphore(batch_size)

    async def complete(self, request: Request, images: tuple[bytes, ...], max_tokens: int, attempt: int) -> Completion:
        """See `Backend`. The prompt's tokens are counted with its vision tokens."""
        from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn

        media = tuple(Media("image", path) for path in request.images)
        text = "<image>\n" * len(media) + "\n\n".join(part for part in (request.system, request.text) if part)
        asked = Conversation(request.prompt, (Turn("user", text),), media)
        async with self._turns:
            try:
                answer = await _answer(await asyncio.to_thread(self._ask, asked, request.schema, max_tokens))
            except UserError as error:
                raise Failure("input", str(error), transient=False) from None
        reason = "length" if answer.finish_reason == "length" else "stop"
        return Completion(answer.text.strip(), reason, answer.usage.prompt_tokens, len(answer.ids))

    def _ask(self, asked: Any, schema: Mapping[str, Any] | None, max_tokens: int) -> Any:
        """The engine's ticket. Loads the model for the first one."""
        from kangaroo_jax.inference.sampling import Sampling

        settings = self.settings
        sampling = Sampling(settings.get("temperature", 0.0), settings.get("top_p", 0.9), settings.get("seed", 0))
        with _loading:  # of those who come at the same time one loads it
            model = _load(self._path)
        grammar = None
        if schema is not None and self._structured:
            grammar = model.grammars.of("json_schema", json.dumps(schema))
        return model.submit(asked, sampling, max_new_tokens=max_tokens, grammar=grammar)

    async def close(self) -> None:
        """See `Backend`."""


async def _answer(ticket: Any) -> Any:
    """A ticket's answer, for which no thread waits; who stops waiting cancels it."""
    from kangaroo_jax.inference.requests import Event

    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(outcome: Any) -> None:
        if future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    ticket.add_listener(lambda told: None if isinstance(told, Event) else loop.call_soon_threadsafe(settle, told))
    try:
        return await future
    finally:
        ticket.cancel()


@functools.lru_cache(maxsize=4)
def _load(checkpoint: str) -> Any:
    """One model for all backends that name it."""
    from kangaroo_jax.inference.chat import Kangaroo

    return Kangaroo.load(checkpoint)


def _folder_of(checkpoint: str) -> Path:
    """The folder of the step that a folder of a curriculum, stage or step stands for. Raises UserError."""
    from kangaroo_jax.checkpoints.reading import find

    return Path(find(checkpoint)).resolve()
