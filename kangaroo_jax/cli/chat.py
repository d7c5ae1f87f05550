"""`kangaroo chat`: one answer, or an interactive conversation."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.cli.arguments import Count, Natural, Number, NumberOrNone


def chat(
    *,
    checkpoint: str,
    video: list[str] | None = None,
    image: str | None = None,
    query: str | None = None,
    max_new_tokens: Count = 512,
    start: NumberOrNone = None,
    end: NumberOrNone = None,
    temperature: Number = 0.0,
    top_p: Number = 0.9,
    seed: Natural = 0,
) -> None:
    """Ask a trained model about a video or an image.

        kangaroo chat --checkpoint=runs/quickstart --video=clip.mp4 --query="What comes first?"

    Args:
        checkpoint: folder that training wrote: a curriculum, a stage or one step
        video: file, folder of images or address of a video to talk about; if given several times, its frames as images
        image: file or address of an image to talk about
        query: one question; without it an interactive conversation starts
        max_new_tokens: longest answer, in tokens
        start: begin at this second of the video
        end: end at this second of the video
        temperature: sampling temperature; 0 always takes the most likely token
        top_p: sample among the most likely tokens with this total probability
        seed: seed of the sampling
    """
    media = {"video": video[0] if video and len(video) == 1 else video, "image": image, "start": start, "end": end}
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    talk(checkpoint, typed() if query is None else [query], media, sampling, max_new_tokens=max_new_tokens)


def talk(
    checkpoint: str | Path,
    lines: Iterable[str],
    media: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    *,
    max_new_tokens: int = 512,
) -> None:
    """Answer each of `lines`, until an empty one, on standard output.

    `media` are arguments of `inference.history.ask` for the first line, `sampling` those of `Sampling`.

    Raises:
        UserError: see `ask`. All possible checks come before the model is loaded.
    """
    from kangaroo_jax.inference.chat import Kangaroo
    from kangaroo_jax.inference.history import History, ask
    from kangaroo_jax.inference.sampling import Sampling

    drawing, media = Sampling(**sampling or {}), media or {}
    with _typed_addresses():
        ask(lines[0] if isinstance(lines, list) else "?", **media)
        kangaroo = Kangaroo.load(checkpoint)
        turns: History = []
        for line in lines:
            if not line.strip():
                return
            turns.append(ask(line, **(media if not turns else {})))
            answer = _say(kangaroo.stream(turns, drawing, max_new_tokens=max_new_tokens))
            turns.append({"role": "assistant", "text": answer})


def typed() -> Iterator[str]:
    """Lines typed at a prompt, until the end of the input."""
    if sys.stdin.isatty():
        print("Ask about it; an empty line ends.")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


@contextlib.contextmanager
def _typed_addresses() -> Iterator[None]:
    """While inside, addresses may lead to the user's own network: the user types them, unlike those of records."""
    from kangaroo_jax.data.media.storage import current_cache, use_cache

    cache = current_cache()
    use_cache(cache.with_private())
    try:
        yield
    finally:
        use_cache(cache)


def _say(pieces: Iterable[str]) -> str:
    """Print pieces of an answer as they come; returns the whole."""
    answer = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        answer += piece
    print(flush=True)
    return answer


COMMANDS = {"": chat}
