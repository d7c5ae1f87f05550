"""Generation with a key-value cache: vision once, prompts once (ragged, in one batch), then token by token.

The parts are pure functions, jitted for a few sizes only: frames and tokens are rounded up to buckets.
Rows are padded on the right, and padding never enters the cache, so that a prompt gets the same answer
alone and among others.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.conventions import Array
from kangaroo_jax.data.batches.sample import Recipe
from kangaroo_jax.inference.sampling import Sampling, sample
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.llama import Cache

# The ViT sees as many frames at a time as have this many patches, but no more than that many frames.
PATCHES_AT_A_TIME, FRAMES_AT_A_TIME = 16_384, 64
# The decoder reads so many tokens of a prompt at a time: the attention's scores are [B, N, this, T], where T
# may be 24,576. On a CPU they should also fit its cache (1024 tokens, 16 rows, tiny: 2.1 s, and 3.3 s with 512).
TOKENS_AT_A_TIME, TOKENS_AT_A_TIME_CPU = 512, 128
NO_TOKEN = -1

Graph = nnx.GraphDef[KangarooModel]
Weights = Any  # nnx.State of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """One prompt a row, padded on the right."""

    tokens: Array  # int32[B, T]
    vision_index: Array  # int32[B, T]; the vision row that stands here, -1 for text; rows may share them
    lengths: Array  # int32[B]; 0 for an empty row, which gets an empty answer

    @classmethod
    def from_recipes(
        cls, recipes: Sequence[Recipe], *, tokens: int, first_rows: Sequence[int] | None = None, rows: int = 0
    ) -> "Prompts":
        """The prompts of recipes.

        Args:
            recipes: what `data.sample.render_prompt` makes.
            tokens: T.
            first_rows: the vision row at which the media of each recipe begin; 0 by default.
            rows: B, if more than there are recipes.
        """
        rows = max(rows, len(recipes))
        padded = np.zeros((rows, tokens), np.int32)
        vision_index = np.full((rows, tokens), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, recipe in enumerate(recipes):
            n = lengths[row] = len(recipe.tokens)
            first = first_rows[row] if first_rows is not None else 0
            padded[row, :n] = recipe.tokens
            vision_index[row, :n] = np.where(recipe.is_vision, first + np.cumsum(recipe.is_vision) - 1, -1)
        return cls(padded, vision_index, lengths)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Answers on their way. M is the longest answer that there is room for."""

    cache: Cache
    lengths: jax.Array  # int32[B] of the prompts
    last: jax.Array  # int32[B]; the token chosen last, which the decoder has not seen yet
    done: jax.Array  # bool[B]
    answers: jax.Array  # int32[B, M]; NO_TOKEN from the end of the answer on
    step: jax.Array  # int32[]; tokens chosen so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """`Sampling` and the ids that end an answer, as arrays, so that none of them means a new compilation."""

    temperature: Array  # float32[]
    top_p: Array  # float32[]
    seed: Array  # uint32[]
    stop_ids: Array  # int32[any]


class Generator:
    """Generates with one model. Two generators of equal structure share their compiled functions."""

    def __init__(self, model: KangarooModel) -> None:
        """Splits the model, once."""
        self._graph, self._weights = nnx.split(model)
        self._patch_size = model.vision.patch_size
        self._frames_per_group = model.patchify.kernel_size[0] if model.joins_frames else 1

    def encode(self, frames: np.ndarray, times: np.ndarray) -> jax.Array:
        """frames uint8[F, S, S, 3] and their seconds float32[F] -> vision tokens [R, D].

        F is a multiple of the frames that the patchify joins; the frames may be of several media, which never
        share a group. R is that of F rounded up. The ViT sees a fixed number of frames at a time, so that it
        is compiled once whatever F is, and its activations stay small.
        """
        k, (count, side) = self._frames_per_group, frames.shape[:2]
        frames_at_a_time = min(FRAMES_AT_A_TIME, PATCHES_AT_A_TIME // (side // self._patch_size) ** 2)
        size = k * min(max(1, frames_at_a_time // k), bucket(count // k, smallest=1))
        pieces = []
        for start in range(0, count, size):
            part, seconds = frames[start : start + size], times[start : start + size]
            short = size - len(part)
            part, seconds = np.pad(part, ((0, short), (0, 0), (0, 0), (0, 0))), np.pad(seconds, (0, short))
            pieces.append(_encode(self._graph, self._weights, part, seconds))
        return jnp.concatenate(pieces)

    def stream(
        self,
        prompts: Prompts,
        vision: jax.Array | None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        every: int = 1,
    ) -> Iterator[list[list[int]]]:
        """The answers so far, each time that `every` more tokens have been chosen, and at the end.

        Args:
            prompts: one a row; T is best a bucket.
            vision: what `encode` gave, [R, D]; None for prompts without media.
            max_new_tokens: longest answer.
            stop_ids: tokens that end an answer; they are not part of it.
            sampling: the default is greedy.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: must be at least 1")
        sampling = sampling or Sampling()
        choice = Choice(
            np.asarray(sampling.temperature, np.float32),
            np.asarray(sampling.top_p, np.float32),
            np.asarray(sampling.seed, np.uint32),
            np.asarray(stop_ids, np.int32),
        )
        room = bucket(max_new_tokens, smallest=64)
        rows = None if vision is None else _place(vision, prompts.vision_index)
        decoding = _prefill(self._graph, self._weights, prompts, rows, choice, room)
        while True:
            step, done = jax.device_get((decoding.step, decoding.done))
            finished = step >= max_new_tokens or done.all()
            if finished or step % every == 0:
                yield [[int(i) for i in row if i != NO_TOKEN] for row in np.asarray(decoding.answers[:, :step])]
            if finished:
                return
            until = min(int(step) + every - int(step) % every, max_new_tokens)
            decoding = _decode(self._graph, self._weights, decoding, np.int32(until), choice)

    def generate(
        self,
        prompts: Prompts,
        vision: jax.Array | None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """The whole answers; see `stream`."""
        *_, answers = self.stream(
            prompts,
            vision,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            every=max_new_tokens,
        )
        return answers


def bucket(size: int, *, smallest: int = 128) -> int:
    """`size` rounded up to smallest * (1, 1.5, 2, 3, 4, 6, 8, 12...): few sizes, a third wasted at most."""
    length = smallest
    while length < size:
        if length * 3 // 2 >= size:
            return length * 3 // 2
        length *= 2
    return length


# ---------------------------------------------------------------------------- pure functions


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: Graph, weights: Weights, frames: jax.Array, times: jax.Array) -> jax.Array:
    model = nnx.merge(graph, weights)
    return model.encode(frames[None], times[None])[0]


@jax.jit
def _place(vision: jax.Array, index: jax.Array) -> jax.Array:
    """vision [R, D], index int32[B, T] -> [B, T, D]. Apart, so that R means no new compilation of the rest."""
    return vision[jnp.maximum(index, 0)]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _prefill(
    graph: Graph,
    weights: Weights,
    prompts: Prompts,
    vision: jax.Array | None,
    choice: Choice,
    room: int,
) -> Decoding:
    """Read the prompts into a new cache, some tokens at a time, and choose the first token of each answer.

    vision [B, T, D]: what `_place` put where a prompt wants vision tokens.
    """
    model: KangarooModel = nnx.merge(graph, weights)
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    rows, length = tokens.shape
    capacity, chunk = length + room, _chunk(length)
    embeddings = model.embed(tokens, jnp.where(prompts.vision_index < 0, -1, jnp.arange(length)), vision)

    def read(number: jax.Array, carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, last = carry
        start = number * chunk
        place = jnp.broadcast_to(start + jnp.arange(chunk), (rows, chunk))
        filled = place < lengths[:, None]
        hidden, grown = model.llm(
            jax.lax.dynamic_slice_in_dim(embeddings, start, chunk, axis=1),
            segment_ids=filled.astype(jnp.int32),
            positions=place,
            cache=cache,
            slots=jnp.where(filled, place, capacity),
        )
        assert grown is not None
        end = lengths - 1 - start  # where in this chunk the prompt ends, if it does
        state = jnp.take_along_axis(hidden, jnp.clip(end, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return grown, jnp.where(((end >= 0) & (end < chunk))[:, None], state, last)

    empty = (model.llm.init_cache(rows, capacity), jnp.zeros((rows, embeddings.shape[-1]), embeddings.dtype))
    cache, last = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), read, empty)
    decoding = Decoding(
        cache=cache,
        lengths=lengths,
        last=jnp.zeros(rows, jnp.int32),
        done=lengths == 0,
        answers=jnp.full((rows, room), NO_TOKEN, jnp.int32),
        step=jnp.int32(0),
    )
    return _choose(decoding, model.llm.unembed(last), choice)


def _chunk(length: int) -> int:
    """Tokens of a prompt of `length` (a bucket) to read at a time."""
    chunk, most = length, TOKENS_AT_A_TIME_CPU if jax.default_backend() == "cpu" else TOKENS_AT_A_TIME
    while chunk > most and chunk % 2 == 0:
        chunk //= 2
    return chunk


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graph: Graph, weights: Weights, decoding: Decoding, until: jax.Array, choice: Choice) -> Decoding:
    """Go on until every answer has ended or has `until` tokens."""
    model: KangarooModel = nnx.merge(graph, weights)
    capacity = decoding.cache.positions.shape[1]

    def goes_on(decoding: Decoding) -> jax.Array:
        return (decoding.step < until) & ~jnp.all(decoding.done)

    def next_token(decoding: Decoding) -> Decoding:
        place = (decoding.lengths + decoding.step - 1)[:, None]
        tokens = decoding.last[:, None]
        hidden, cache = model.llm(
            model.embed(tokens, jnp.full_like(tokens, -1), None),
            segment_ids=jnp.ones_like(tokens),
            positions=place,
            cache=decoding.cache,
            slots=jnp.where(decoding.done[:, None], capacity, place),
        )
        assert cache is not None
        return _choose(dataclasses.replace(decoding, cache=cache), model.llm.unembed(hidden[:, 0]), choice)

    return jax.lax.while_loop(goes_on, next_token, decoding)


def _choose(decoding: Decoding, logits: jax.Array, choice: Choice) -> Decoding:
    """Choose the next token of every answer from logits float32[B, V]. Each row and step has its own random key."""
    rows = jnp.arange(logits.shape[0])
    key = jax.random.fold_in(jax.random.key(choice.seed), decoding.step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    token = sample(logits, keys, jnp.asarray(choice.temperature), jnp.asarray(choice.top_p))
    done = decoding.done | jnp.any(token[:, None] == choice.stop_ids, axis=1)
    answers = decoding.answers.at[:, decoding.step].set(jnp.where(done, NO_TOKEN, token))
    return dataclasses.replace(decoding, last=token, done=done, answers=answers, step=decoding.step + 1)
