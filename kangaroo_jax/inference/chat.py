"""Talk with a trained model about videos and images.

kangaroo = Kangaroo.load("runs/quickstart")
answer, history = kangaroo.chat(video="a.mp4", query="What happens?")
answer, history = kangaroo.chat(query="And then?", history=history)  # without a second look at the video
"""

import collections
import dataclasses
import secrets
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.batches.sample import Recipe, render_prompt
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.hub import local
from kangaroo_jax.inference.adapters import load_adapted
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.grammars import Grammar, Grammars
from kangaroo_jax.inference.history import History, ask, conversation
from kangaroo_jax.inference.memories import check_kv_dtype
from kangaroo_jax.inference.programs import Programs
from kangaroo_jax.inference.requests import Answer, Logprob, Request, Ticket, Usage
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.inference.spool import Spool
from kangaroo_jax.inference.text import Detokenizer
from kangaroo_jax.inference.vision import Vision
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.sharding import make_mesh
from kangaroo_jax.system.cpus import usable_cpus

CACHE_GIB = 2.0  # of the host's memory
SLOTS = 4  # conversations that are remembered on the device
RELEASED_TEMPERATURE = 0.6  # of the released model's chat, where it samples


class Reply(str):
    """An answer's text, and how it came about.

    Attributes:
        ids: its tokens.
        finish_reason: stop, length or cancelled.
        usage: tokens, frames and seconds that it took.
        logprobs: of its tokens, where they were asked for.
    """

    ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    logprobs: tuple[Logprob, ...]

    @classmethod
    def of(cls, answer: Answer) -> "Reply":
        """The reply of a finished request, without white space at its ends."""
        reply = cls(answer.text.strip())
        reply.ids, reply.finish_reason = answer.ids, answer.finish_reason
        reply.usage, reply.logprobs = answer.usage, answer.logprobs
        return reply


class Stream:
    """An answer as it comes: an iterator of pieces of text, none of which ends inside a character.

    Closing it, or leaving a `with` block of it, cancels the rest.
    """

    def __init__(self, ticket: Ticket, turns: History) -> None:
        self._ticket, self._turns = ticket, turns

    def __iter__(self) -> Iterator[str]:
        """The pieces. Raises UserError where the input cannot be used."""
        try:
            for event in self._ticket:
                if event.text:
                    yield event.text
        finally:
            self.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The rest is not wanted. Nothing where the answer is complete."""
        if not self._ticket.done:
            self._ticket.cancel()

    @property
    def reply(self) -> Reply:
        """The whole answer, as far as it came; waits for it. Raises UserError where the input cannot be used."""
        return Reply.of(self._ticket.result())

    @property
    def history(self) -> History:
        """The history with this round in it; waits for the answer."""
        return [*self._turns, {"role": "assistant", "text": str(self.reply)}]


class Kangaroo:
    """A model, its tokenizer and the frame sampling that it was trained with. May be used by several threads.

    What was seen and read is remembered: a video that was asked about is not decoded, looked at or read again.
    A context manager, which closes it.

    Attributes:
        weights_id: names the numbers of the weights, their dtype and how they are quantised.
        grammars: makes the forms that `chat`, `stream` and `submit` can give an answer.
    """

    def __init__(
        self,
        model: KangarooModel,
        config: StageConfig,
        tokenizer: Tokenizer,
        *,
        weights_id: str = "",
        mesh: Mesh | None = None,
        kv_dtype: str | None = None,
        slots: int = SLOTS,
        cache_gib: float = CACHE_GIB,
    ) -> None:
        """See `load`. `config` is that of the stage which trained the model, `weights_id` what names its numbers."""
        if slots < 1:
            raise UserError(f"slots is {slots}: at least one conversation must be remembered")
        self.config, self.tokenizer = config, tokenizer
        self._frames_per_group = frames_per_group(config.model)
        self._tokens_per_group = tokens_per_group(config.model, config.data.image_size)
        self.weights_id = weights_id or secrets.token_hex(16)
        self._cache_bytes = int(cache_gib * 2**30) // 2  # as much for what was seen as for what was read
        self._decoder, self._given = ThreadDecoder(usable_cpus()), Spool()
        if not isinstance(model.llm.layers, nnx.List):
            model = nnx.merge(*nnx.split(model)).unstack()
        self.engine = Engine(
            model,
            Sizes.for_context(config.data.tokens_per_pack, slots),
            vision=self._vision,
            detokenizer=lambda stop: Detokenizer(tokenizer, stop),
            host_bytes=self._cache_bytes,
            mesh=mesh,
            kv_dtype=kv_dtype,
        )
        self.grammars = Grammars(tokenizer, self.engine.programs.vocabulary)
        self._end = weakref.finalize(self, _close, self.engine, self.grammars, self._decoder, self._given)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        quantize: str | None = None,
        kv_dtype: str | None = None,
        mesh: Mesh | None = None,
        slots: int = SLOTS,
        cache_gib: float = CACHE_GIB,
        lora: str | Path = "",
        ema: bool = False,
    ) -> "Kangaroo":
        """Load what training wrote: a curriculum's folder (its last stage), a stage's, or one checkpoint.

        Args:
            path: the folder, or OWNER/NAME or OWNER/NAME@REVISION of Hugging Face's hub. If a run trained an adapter
                there, its base is loaded, too.
            lora: folder of an adapter for the weights in `path`, or its name on the hub.
            ema: take the average of the weights, or of the adapter's factors, that the run kept.
            dtype, quantize, mesh: see `adapters.load_adapted`; without a mesh, this process's first device.
            kv_dtype: int8 halves what a conversation takes on the device; None keeps keys and values as computed.
            slots: conversations that are remembered on the device.
            cache_gib: GiB of the host's memory for what was seen, and for conversations that have lost their slot.

        Raises:
            UserError: there is no checkpoint or tokenizer, it is of another model than its config, or an option is
                none of those known.
        """
        check_kv_dtype(kv_dtype)
        if mesh is None and jax.process_count() > 1:
            # A program that is compiled for no device in particular is one for a device of process 0: others crash.
            mesh = make_mesh((1, 1, 1, 1), jax.local_devices()[:1])
        adapter = local(lora) if lora else ""
        loaded = load_adapted(local(path), adapter, dtype=dtype, quantize=quantize, mesh=mesh, ema=ema)
        options: dict[str, Any] = dict(mesh=mesh, kv_dtype=kv_dtype, slots=slots, cache_gib=cache_gib)
        return cls(loaded.model, loaded.config, loaded.tokenizer, weights_id=loaded.weights_id, **options)

    def _vision(self, programs: Programs) -> Vision:
        return Vision(
            programs.encode,
            self._decoder,
            image_size=self.config.data.image_size,
            frames_per_group=self._frames_per_group,
            tokens_per_group=self._tokens_per_group,
            frames_a_call=programs.frames_a_call,
            weights_id=self.weights_id,
            cache_bytes=self._cache_bytes,
            pieces=usable_cpus(),
        )

    def __enter__(self) -> "Kangaroo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way, and forget everything. It is done, too, when nobody refers to this any more."""
        self._end()

    def warm_up(self) -> int:
        """Compile every program now, so that no answer waits for it; how many there are."""
        return self.engine.warm_up(self.config.data.image_size)

    def stats(self) -> dict[str, int]:
        """Counts since the beginning, and what is remembered; see `Engine.stats` and `Vision.stats`."""
        return self.engine.stats()

    # ------------------------------------------------------------------------------------ talking

    def chat(
        self,
        video: Any = None,
        query: str = "",
        history: History | None = None,
        *,
        image: Any = None,
        frames: Sequence[Any] | np.ndarray | None = None,
        times: Sequence[float] | None = None,
        media: Sequence[Any] | None = None,
        stream: bool = False,
        start: float | None = None,
        end: float | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        top_p: float = 0.9,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        do_sample: bool | None = None,
        video_path: Any = None,
        tokenizer: Any = None,
        eos_token_id: int | Sequence[int] | None = None,
        **sampling: Any,
    ) -> Any:
        """Answer a query about a video, an image, frames, any of them, or what the history is about.

        A medium is a path, an address, a member of a container (`data.media.storage`), the bytes of a file, an array
        uint8[height, width, 3] or an image of PIL. Media stand before the query, or where it says `<video>` and
        `<image>`. The call of the released model is understood as well: `video_path`, `do_sample`, `eos_token_id`;
        its `tokenizer` is not needed.

        Args:
            video: a medium; also a folder or a list of images, or an array uint8[n, height, width, 3].
            query: what to ask.
            history: what the last round returned (JSON-able where media were given as paths); its media need not be
                given again.
            image: a medium.
            frames, times: a video as its frames, and the second of each (one a second by default).
            media: several media in the order of their tags, each a pair ("video" or "image", medium).
            stream: return a `Stream` at once in place of the answer.
            start, end: seconds of the video to look at.
            max_new_tokens: longest answer; it is shorter where the conversation has no more room.
            temperature: 0, the default, always takes the likeliest token.
            top_p: draw among the likeliest tokens that have this probability together.
            stop: strings that end the answer, and are no part of it.
            logprobs: also give the tokens' log-probabilities, and those of so many likeliest ones.
            grammar: the answer's form, of `grammars`.
            do_sample: False is a temperature of 0; True without one is one of 0.6.
            video_path, tokenizer, eos_token_id: of the released model's call.
            sampling: seed, top_k, min_p, presence, frequency, repetition, bias; see `Sampling`.

        Returns:
            The answer (a `Reply`, a string with its `usage`), and the history with this round in it.

        Raises:
            UserError: the query is empty, a file cannot be read, or a value is out of range.
        """
        if temperature is None:
            temperature = RELEASED_TEMPERATURE if do_sample else 0.0
        unknown = sorted(set(sampling) - {field.name for field in dataclasses.fields(Sampling)})
        if unknown:
            raise UserError(f"chat has no argument {unknown[0]!r}")
        drawing = Sampling(0.0 if do_sample is False else temperature, top_p, **sampling)
        if video_path is not None:
            video = video_path
        shown, still, listed = (None if x is None else self._given.path(x) for x in (video, image, frames))
        several = [(kind, self._given.path(thing)) for kind, thing in media or ()]
        turn = ask(query, shown, still, start, end, frames=listed, times=times, media=several)
        ends = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
        answering = self.stream(
            [*(history or []), turn],
            drawing,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_ids=ends,
            logprobs=logprobs,
            grammar=grammar,
        )
        return answering if stream else (answering.reply, answering.history)

    def stream(
        self,
        turns: History,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Stream:
        """The answer to the last of `turns` (a history and what `ask` returns) as it comes. Raises UserError."""
        options: dict[str, Any] = dict(stop=stop, stop_ids=stop_ids, logprobs=logprobs, grammar=grammar)
        return Stream(self.submit(conversation(turns), sampling, max_new_tokens=max_new_tokens, **options), turns)

    def submit(
        self,
        conversation: Conversation,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Ticket:
        """The engine's ticket for the answer to a conversation that ends with the user's turn. Raises UserError."""
        options: dict[str, Any] = dict(stop=tuple(stop), logprobs=logprobs, grammar=grammar)
        options["stop_ids"] = tuple(stop_ids) or self.tokenizer.stop_ids
        return self._submit(self.recipe(conversation), max_new_tokens, sampling or Sampling(), **options)

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        n: int = 1,
        max_new_tokens: int = 64,
        at_a_time: int = 16,
        sampling: Sampling | None = None,
    ) -> list[list[Reply]]:
        """`n` answers to each conversation, in their order; those after the first have the next seeds.

        Each conversation ends with the user's turn. `at_a_time` of the answers are under way together, those about
        the same media one after another, which are decoded and looked at once.

        Raises:
            UserError: a file cannot be read; the message names it.
        """
        sampling = sampling or Sampling()
        with ThreadPoolExecutor(usable_cpus()) as pool:
            recipes = list(pool.map(self.recipe, conversations))
        replies: list[list[Reply]] = [[] for _ in recipes]
        under_way: collections.deque[tuple[int, Ticket]] = collections.deque()
        order = sorted(range(len(recipes)), key=lambda i: _size(recipes[i]))
        try:
            for i, draw in ((i, draw) for i in order for draw in range(n)):
                if len(under_way) >= at_a_time:
                    self._collect(under_way, replies)
                drawing = dataclasses.replace(sampling, seed=(sampling.seed + draw) % 2**32)
                options: dict[str, Any] = dict(stop_ids=self.tokenizer.stop_ids)
                under_way.append((i, self._submit(recipes[i], max_new_tokens, drawing, **options)))
            while under_way:
                self._collect(under_way, replies)
        finally:
            for _, ticket in under_way:
                ticket.cancel()
        return replies

    @staticmethod
    def _collect(under_way: "collections.deque[tuple[int, Ticket]]", replies: list[list[Reply]]) -> None:
        number, ticket = under_way.popleft()
        replies[number].append(Reply.of(ticket.result()))

    def answer_many(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """The answers to many questions, in their order; greedy by default. See `generate`."""
        options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, at_a_time=batch_size, sampling=sampling)
        return [reply for (reply,) in self.generate(conversations, **options)]

    def score(self, conversations: Sequence[Conversation], continuations: Sequence[str]) -> list[np.ndarray]:
        """How likely each continuation is as the answer: the log-probability of each of its tokens, float32[M].

        Raises:
            UserError: a file cannot be read, or a continuation is empty.
        """
        tickets = []
        for asked, text in zip(conversations, continuations, strict=True):
            ids = np.array(self.tokenizer.encode(text), np.int32)
            if not ids.size:
                raise UserError(f"conversation {asked.id!r}: the continuation to score is empty")
            tickets.append(self._submit(self.recipe(asked), 1, Sampling(), continuation=ids, logprobs=0))
        return [np.array([token.logprob for token in ticket.result().logprobs], np.float32) for ticket in tickets]

    def warm(
        self, video: Any = None, *, image: Any = None, start: float | None = None, end: float | None = None
    ) -> Usage:
        """Look at a video or image and read it, so that the first question about it is answered like a second one.

        Raises UserError where it cannot be read.
        """
        shown, still = (self._given.path(thing) if thing is not None else None for thing in (video, image))
        recipe = self.recipe(conversation([ask("?", shown, still, start, end)]))
        length = int(np.flatnonzero(recipe.is_vision)[-1]) + 3 if recipe.is_vision.any() else len(recipe.tokens)
        recipe = dataclasses.replace(recipe, tokens=recipe.tokens[:length], is_vision=recipe.is_vision[:length])
        return self._submit(recipe, 1, Sampling()).result().usage

    def recipe(self, conversation: Conversation) -> Recipe:
        """The prompt of a conversation that ends with the user's turn. Raises UserError."""
        return render_prompt(
            conversation, self.tokenizer, self.config.data, self._frames_per_group, self._tokens_per_group
        )

    def _submit(self, recipe: Recipe, max_new_tokens: int, sampling: Sampling, **options: Any) -> Ticket:
        request = Request(recipe.tokens, recipe.is_vision, recipe.media, max_new_tokens, sampling, **options)
        return self.engine.submit(request)


def _close(engine: Engine, grammars: Grammars, decoder: ThreadDecoder, given: Spool) -> None:
    engine.close()
    grammars.close()
    decoder.close()
    given.close()


def _size(recipe: Recipe) -> tuple[int, list[str], int]:
    """Sorts prompts so that those of like size, and of them those about the same files, are neighbours."""
    return recipe.frames, [ref.path for ref in recipe.media], len(recipe.tokens)
