"""Answers before the first client comes, so that what happens once has happened: nobody waits for it, nothing stalls.

A program's first run, the first jobs of decoding processes, threads and modules take hundreds of milliseconds in all,
and hold up the event loop for a part of them.
"""

import logging
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.requests import Request
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.prompts import Found, Prompts
from kangaroo_jax.serving.protocol import chat_request

log = logging.getLogger(__name__)

_FRAMES = 16  # of the video
_SIDE = 64  # pixels
_TOKENS = 8  # of an answer
_QUESTION = "What is there? "
_LENGTHS = 4  # texts are this question 1, 2, 4 and 8 times


def rehearse(engines: Sequence[Engine], prompts: Prompts, limits: Limits, context: int, rounds: int) -> None:
    """Let each engine answer about a text, an image and a video, `rounds` times at once, and forget all of it.

    `context` is the tokens that a conversation may have. What the limits allow nobody is left out, and a medium that
    cannot be decoded costs a line of the log. Raises EngineError where an engine fails.
    """
    with tempfile.TemporaryDirectory(prefix="kangaroo-rehearsal-") as folder:
        requests = [
            request for number in range(rounds) for request in _requests(prompts, limits, context, Path(folder), number)
        ]
        for engine in engines:
            for ticket in [engine.submit(request) for request in requests]:
                try:
                    ticket.result()
                except UserError as error:
                    log.warning("rehearsal: %s", error)
            engine.forget()


def _requests(prompts: Prompts, limits: Limits, context: int, folder: Path, number: int) -> Iterator[Request]:
    rng = np.random.default_rng(number)
    frames = [Image.fromarray(rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)) for _ in range(_FRAMES)]
    image, video = folder / f"{number}.png", folder / f"{number}.gif"
    frames[0].save(image)
    frames[0].save(video, save_all=True, append_images=frames[1:], duration=500)
    for kind, path in ((None, ""), ("image", image), ("video", video)):
        shown = [{"type": f"{kind}_url", f"{kind}_url": {"url": "data:,"}}] if kind is not None else []
        text = {"type": "text", "text": _QUESTION * (1 << number % _LENGTHS)}
        prompt = chat_request({"messages": [{"role": "user", "content": [*shown, text]}]}, limits).prompt
        found: list[Found] = [(Media(kind, str(path)), ())] if kind is not None else []
        try:
            recipe = prompts.render(prompt, found, {}).recipe
        except (UserError, ApiError) as error:
            log.warning("rehearsal: %s", error)
            continue
        room = context - len(recipe.tokens)
        if room > 0:
            yield Request(
                tokens=recipe.tokens,
                is_vision=recipe.is_vision,
                media=recipe.media,
                max_new_tokens=min(room, _TOKENS),
                namespace=secrets.token_bytes(16),
            )
