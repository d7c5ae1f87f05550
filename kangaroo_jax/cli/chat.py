"""`kangaroo chat`: one answer, or an interactive conversation."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax.cli.arguments import Count, Natural, Number, NumberOrNone
from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.system.files import write_bytes


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
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    lora: str = "",
    ema: bool = False,
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
        dtype: of the computation: float32, bfloat16 or float16; by default what suits the device
        quantize: int8 or int4, of the decoder's weights
        kv_dtype: int8 halves the memory of what is remembered; by default it is of the computation's dtype
        lora: folder of an adapter, to use beside the checkpoint; a run that trained one needs no word
        ema: take the average of the weights, where training kept one
    """
    from kangaroo_jax.inference.compiled import keep_programs

    keep_programs()
    media = {"video": video[0] if video and len(video) == 1 else video, "image": image, "start": start, "end": end}
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, forgiving=query is None and sys.stdin.isatty())
    options["held"] = {"dtype": dtype, "quantize": quantize, "kv_dtype": kv_dtype, "lora": lora, "ema": ema}
    talk(checkpoint, typed() if query is None else [query], media, sampling, **options)


def talk(
    checkpoint: str | Path,
    lines: Iterable[str],
    media: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    *,
    max_new_tokens: int = 512,
    forgiving: bool = False,
    held: dict[str, Any] | None = None,
) -> None:
    """Answer each of `lines`, until an empty one, on standard output. Lines that are no list may be COMMANDS_TYPED.

    `media` are arguments of `inference.history.ask` for the first line, `sampling` those of `Sampling`, `held` those of
    `Kangaroo.load`. With `forgiving` what is wrong in a line is said, and the conversation goes on.

    Raises:
        UserError: see `ask`. All possible checks come before the model is loaded.
    """
    from kangaroo_jax.inference.chat import Kangaroo
    from kangaroo_jax.inference.history import ask
    from kangaroo_jax.inference.sampling import Sampling

    drawing, media = Sampling(**sampling or {}), media or {}
    with _typed_addresses():
        ask(lines[0] if isinstance(lines, list) else "?", **media)
        with Kangaroo.load(checkpoint, **held or {}) as kangaroo:
            conversation = _Typed(kangaroo, media, drawing, max_new_tokens)
            for line in lines:
                if not line.strip():
                    return
                try:
                    if line.startswith("/") and not isinstance(lines, list):
                        conversation.command(*line.strip().partition(" ")[::2])
                    else:
                        conversation.answer(line)
                except UserError as error:
                    if not forgiving:
                        raise
                    print(printable(str(error)), file=sys.stderr, flush=True)


COMMANDS_TYPED = {
    "/video": "FILE: what the next question is about",
    "/image": "FILE: what the next question is about",
    "/reset": "forget the conversation",
    "/save": "FILE: write the conversation as JSON",
    "/help": "these commands",
}


class _Typed:
    """A conversation that is typed: its history, and the media that go with the next question."""

    def __init__(self, kangaroo: Any, media: dict[str, Any], sampling: Any, max_new_tokens: int) -> None:
        self._kangaroo, self._sampling, self._max_new_tokens = kangaroo, sampling, max_new_tokens
        self._turns: list[dict[str, Any]] = []
        self._media = {name: value for name, value in media.items() if value is not None}

    def answer(self, line: str) -> None:
        """Print the answer to a line as it comes; Ctrl-C ends it, and what there is of it stays."""
        from kangaroo_jax.inference.history import ask

        turns = [*self._turns, ask(line, **self._media)]
        stream = self._kangaroo.stream(turns, self._sampling, max_new_tokens=self._max_new_tokens)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
            print(" [stopped]", end="")
        print(flush=True)
        self._turns, self._media = stream.history, {}

    def command(self, name: str, argument: str) -> None:
        """Do what a line that begins with a slash says. Raises UserError."""
        argument = argument.strip()
        if name not in COMMANDS_TYPED:
            raise UserError(f"{name}: no such command; there are {', '.join(COMMANDS_TYPED)}")
        if bool(argument) != COMMANDS_TYPED[name].startswith("FILE"):
            raise UserError(f"{name}: {COMMANDS_TYPED[name]}")
        if name == "/help":
            print("\n".join(f"{command} {text}" for command, text in COMMANDS_TYPED.items()))
        elif name == "/reset":
            self._turns, self._media = [], {}
            print("Forgotten.")
        elif name == "/save":
            self._save(Path(argument))
        else:
            self._show(name[1:], argument)

    def _show(self, kind: str, file: str) -> None:
        from kangaroo_jax.inference.history import ask

        shown: dict[str, Any] = {kind: file}
        ask("?", **shown)
        # The start and end of another video are not those of this one.
        kept = {name: value for name, value in self._media.items() if kind == "image" or name == "image"}
        self._media = {**kept, **shown}
        print(f"The next question is about {printable(file)}.")

    def _save(self, path: Path) -> None:
        if path.exists():
            raise UserError(f"{path}: exists already; choose another name")
        data = json.dumps(self._turns, ensure_ascii=False, indent=1) + "\n"
        try:
            write_bytes(path, data.encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        print(f"Saved {len(self._turns) // 2} rounds.")


def typed() -> Iterator[str]:
    """Lines typed at a prompt, until the end of the input; Ctrl-C at the prompt drops the line."""
    if sys.stdin.isatty():
        print("Ask about it; /help lists commands, an empty line ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line


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


COMMANDS = {"": chat}
