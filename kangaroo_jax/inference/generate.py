"""Generation with a key-value cache: vision once, prompts once (ragged, in one batch), then token by token.

The three parts are pure functions, jitted for a few sizes only: token counts, frames and answers are
rounded up to buckets. Rows are padded on the right, and padding never enters the cache, so that a prompt
gets the same answer alone and among others.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.conventions import Array, PackedBatch
from kangaroo_jax.data.sample import Recipe
from kangaroo_jax.inference.sampling import Sampling, sample
from kangaroo_jax.models.kangaroo import Kangaroo
from kangaroo_jax.models.llama import Cache

FRAMES_AT_A_TIME = 16  # that the ViT sees in one call, of each row
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """One prompt a row, padded on the right."""

    tokens: Array  # int32[B, T]
    vision_index: Array  # int32[B, T]; the vision row that stands here, -1 for text
    lengths: Array  # int32[B]; 0 for an empty row, which gets an empty answer

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> "Prompts":
        """Those of a batch with one sample a row (`data.loader.batch_from_recipes`)."""
        lengths = np.count_nonzero(np.asarray(batch.segment_ids), axis=1).astype(np.int32)
        return cls(batch.tokens, batch.vision_index, lengths)

    @classmethod
    def from_recipes(cls, recipes: Sequence[Recipe], rows: int, tokens: int) -> "Prompts":
        """Those of recipes, without their pixels: B = `rows`, T = `tokens`."""
        padded = np.zeros((rows, tokens), np.int32)
        vision_index = np.full((rows, tokens), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, recipe in enumerate(recipes):
            n = lengths[row] = len(recipe.tokens)
            padded[row, :n] = recipe.tokens
            vision_index[row, :n] = np.where(recipe.is_vision, np.cumsum(recipe.is_vision) - 1, -1)
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

    def __init__(self, model: Kangaroo) -> None:
        """Splits the model, once."""
        self._graph, self._weights = nnx.split(model)
        self._frames_per_group = model.patchify.kernel_size[0] if model.joins_frames else 1

    def encode(self, frames: np.ndarray, frame_times: np.ndarray) -> jax.Array | None:
        """frames uint8[B, F, S, S, 3] and their seconds float32[B, F] -> vision tokens [B, R, D]; None where F is 0.

        F is a multiple of the frames that the patchify joins. R is that of F rounded up to a bucket. The ViT
        sees a fixed number of frames at a time, so that it is compiled once whatever F is, and its
        activations stay small.
        """
        rows, count = frames.shape[:2]
        if not count:
            return None
        groups = count // self._frames_per_group
        chunk = min(max(1, FRAMES_AT_A_TIME // self._frames_per_group), bucket(groups, smallest=1))
        total = chunk if groups <= chunk else bucket(groups, smallest=2 * chunk)
        size = chunk * self._frames_per_group
        pieces = []
        for start in range(0, count, size):
            part, times = frames[:, start : start + size], frame_times[:, start : start + size]
            short = size - part.shape[1]
            part = np.pad(part, ((0, 0), (0, short), (0, 0), (0, 0), (0, 0)))
            pieces.append(_encode(self._graph, self._weights, part, np.pad(times, ((0, 0), (0, short)))))
        if missing := total // chunk - len(pieces):
            _, length, width = pieces[0].shape
            pieces.append(jnp.zeros((rows, missing * length, width), pieces[0].dtype))
        return jnp.concatenate(pieces, axis=1)

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
            vision: what `encode` gave, None for prompts without.
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
        decoding = _prefill(self._graph, self._weights, prompts, vision, choice, room)
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
        batch: PackedBatch,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """The answer of each row of a batch that has one prompt a row; see `stream`."""
        vision = self.encode(np.asarray(batch.frames), np.asarray(batch.frame_times))
        *_, answers = self.stream(
            Prompts.from_batch(batch),
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
def _encode(graph: nnx.GraphDef, weights: nnx.State, frames: jax.Array, frame_times: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights).encode(frames, frame_times)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    prompts: Prompts,
    vision: jax.Array | None,
    choice: Choice,
    room: int,
) -> Decoding:
    """Read the prompts into a new cache and choose the first token of each answer."""
    model: Kangaroo = nnx.merge(graph, weights)
    tokens, vision_index, lengths = map(jnp.asarray, (prompts.tokens, prompts.vision_index, prompts.lengths))
    rows, length = tokens.shape
    capacity = length + room
    place = jnp.broadcast_to(jnp.arange(length), (rows, length))
    filled = place < lengths[:, None]
    embeddings = model.embed(tokens, vision_index, vision)
    hidden, cache = model.llm(
        embeddings,
        segment_ids=filled.astype(jnp.int32),
        positions=place,
        cache=model.llm.init_cache(rows, capacity),
        slots=jnp.where(filled, place, capacity),
    )
    assert cache is not None
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = model.llm.unembed(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    decoding = Decoding(
        cache=cache,
        lengths=lengths,
        last=jnp.zeros(rows, jnp.int32),
        done=lengths == 0,
        answers=jnp.full((rows, room), NO_TOKEN, jnp.int32),
        step=jnp.int32(0),
    )
    return _choose(decoding, logits, choice)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(graph: nnx.GraphDef, weights: nnx.State, decoding: Decoding, until: jax.Array, choice: Choice) -> Decoding:
    """Go on until every answer has ended or has `until` tokens."""
    model: Kangaroo = nnx.merge(graph, weights)
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
