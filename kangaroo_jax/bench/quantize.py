"""`kangaroo bench quantize`: how far rounded weights, or keys and values, move what a model says.

Of held-out questions with their true answers: the divergence (KL, in nats) from the model that is not rounded, over
all tokens, at each token of the answer; and the share of answers of which every token is the likeliest one. The
vision tokens are the same for all: the ViT is not rounded.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.config import frames_per_group, tokens_per_group
from kangaroo_jax.data.annotations.sources import read_conversations
from kangaroo_jax.data.batches.sample import Recipe, render_prompt
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import weights
from kangaroo_jax.inference.memories import Chunk, Part, check_kv_dtype
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.progress import Tell

FRAMES = 16  # that the ViT sees at a time
_TOKENS, _TARGETS = 256, 16  # prompts and answers are padded to multiples of these


@dataclasses.dataclass(frozen=True)
class _Compared:
    """A model beside the one that is not rounded."""

    name: str
    graph: Any
    state: Any
    kv_dtype: str | None = None
    divergences: list[float] = dataclasses.field(default_factory=list)  # of each token
    same: list[bool] = dataclasses.field(default_factory=list)  # whether a token is the likeliest for both
    right: list[bool] = dataclasses.field(default_factory=list)  # of each question


def bench_quantize(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    *,
    forms: Sequence[str] = ("int8", "int4"),
    kv_dtype: str | None = None,
    dtype: str | None = None,
    questions: int = 0,
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """A row for the model as it is, for each of `forms`, and for keys and values of `kv_dtype`.

    Args:
        checkpoint: what training wrote, not quantised.
        files: annotations whose conversations end with the true answer.
        forms: of the decoder's weights.
        kv_dtype: int8 or None.
        dtype: of the computation; by default what suits the device.
        questions: the first so many of each file; 0 is all.
        tell: called with a line now and then.

    Raises:
        UserError: the checkpoint, a file or a medium cannot be read, or is quantised already.
    """
    check_kv_dtype(kv_dtype)
    plain = weights.load(checkpoint, dtype=dtype)
    if plain.quantized is not None:
        raise UserError(f"{checkpoint}: is stored as {plain.quantized}; compare from the checkpoint it was made of")
    compared = [_Compared(plain.dtype, *nnx.split(plain.model))]
    for form in forms:
        compared.append(_Compared(form, *nnx.split(weights.load(checkpoint, dtype=dtype, quantize=form).model)))
    if kv_dtype is not None:
        compared.append(_Compared(f"{kv_dtype} keys and values", *nnx.split(plain.model), kv_dtype))
    asked = 0
    for question in _questions(plain, files, questions):
        _compare(compared, *question)
        asked += 1
        if asked % 100 == 0:
            tell(f"{asked} questions compared")
    if not asked:
        raise UserError("bench quantize: there are no questions in --data")
    return [_row(one) for one in compared]


def _questions(
    plain: weights.Loaded, files: Sequence[str | Path], most: int
) -> Iterator[tuple[Recipe, np.ndarray, np.ndarray]]:
    """Each question, the vision tokens [R, D] of its media, and the tokens int32[n] of its answer with its end."""
    model_config, data = plain.config.model, plain.config.data
    per_group, tokens = frames_per_group(model_config), tokens_per_group(model_config, data.image_size)
    decoder = ThreadDecoder(usable_cpus())
    seen: dict[MediaRef, np.ndarray] = {}  # of the media of the question before: many are about the same
    try:
        for file in files:
            for conversation in itertools.islice(read_conversations([file]), most or None):
                question, answer = conversation.split_answer()
                recipe = render_prompt(question, plain.tokenizer, data, per_group, tokens)
                said = np.array([*plain.tokenizer.encode(answer), plain.tokenizer.eot], np.int32)
                clips = decoder.decode([ref for ref in recipe.media if ref not in seen], data.image_size)
                for clip in clips:
                    if isinstance(clip, UserError):
                        raise clip
                new = (clip for clip in clips if not isinstance(clip, UserError))
                seen = {
                    ref: seen[ref] if ref in seen else _look(plain.model, next(new), per_group) for ref in recipe.media
                }
                rows = [np.zeros((0, model_config.llm.width), np.float32), *(seen[ref] for ref in recipe.media)]
                yield recipe, np.concatenate(rows), said
    finally:
        decoder.close()


def _look(model: KangarooModel, clip: Any, per_group: int) -> np.ndarray:
    """The vision tokens [R, D] of a clip."""
    size, rows = -(-FRAMES // per_group) * per_group, []
    graph, state = nnx.split(model)
    for first in range(0, len(clip.pixels), size):
        frames, times = clip.pixels[first : first + size], clip.times[first : first + size].astype(np.float32)
        missing = size - len(frames)
        padded = np.pad(frames, ((0, missing), (0, 0), (0, 0), (0, 0)))
        found = np.asarray(_encode(graph, state, padded, np.pad(times, (0, missing))))
        rows.append(found[: len(found) * len(frames) // size])
    return np.concatenate(rows)


def _compare(compared: Sequence[_Compared], recipe: Recipe, vision: np.ndarray, said: np.ndarray) -> None:
    """Add what one question and its answer tell of each model."""
    plain = None
    for one in compared:
        found = _log_probabilities(one, recipe, vision, said)
        plain = found if plain is None else plain
        one.divergences.extend((np.exp(plain) * (plain - found)).sum(-1).tolist())
        one.same.extend((plain.argmax(-1) == found.argmax(-1)).tolist())
        one.right.append(bool((found.argmax(-1) == said).all()))


def _log_probabilities(one: _Compared, recipe: Recipe, vision: np.ndarray, said: np.ndarray) -> np.ndarray:
    """float64[n, V] at the place of each token of the answer."""
    tokens = np.concatenate([recipe.tokens, said[:-1]])
    length, first = -(-len(tokens) // _TOKENS) * _TOKENS, len(recipe.tokens) - 1
    index = np.where(recipe.is_vision, np.cumsum(recipe.is_vision) - 1, -1).astype(np.int32)
    logits = _logits(
        one.graph,
        one.kv_dtype,
        one.state,
        np.pad(tokens, (0, length - len(tokens))),
        np.pad(index, (0, length - len(index)), constant_values=-1),
        np.pad(vision, ((0, length - len(vision)), (0, 0))),
        np.pad(np.arange(first, first + len(said), dtype=np.int32), (0, -len(said) % _TARGETS)),
    )
    return np.asarray(jax.nn.log_softmax(logits), np.float64)[: len(said)]


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: Any, state: Any, frames: jax.Array, times: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).encode(frames[None], times[None])[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    graph: Any,
    kv_dtype: str | None,
    state: Any,
    tokens: jax.Array,
    index: jax.Array,
    vision: jax.Array,
    places: jax.Array,
) -> jax.Array:
    """float32[n, V] after the tokens at `places`, by one chunk that holds them all."""
    model = nnx.merge(graph, state)
    llm, count = model.llm, len(tokens)

    def nothing(shape: tuple[int, ...], _: Any, dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    memory = Part.shapes(llm.kv_heads, llm.head_dim, count, jnp.dtype(kv_dtype or llm.dtype), nothing)
    x = model.embed(tokens[None], index[None], vision[None])
    hidden, _ = llm.read(x, jnp.arange(count)[None], [Chunk(memory, jnp.int32(0), visible=0)] * llm.depth)
    logits: jax.Array = model.unembed(hidden[0, places])
    return logits


def _row(one: _Compared) -> dict[str, Any]:
    divergences = np.array(one.divergences)
    return {
        "model": one.name,
        "questions": len(one.right),
        "tokens": len(divergences),
        "mean_divergence": float(divergences.mean()),
        "largest_divergence": float(divergences.max()),
        "same_token": float(np.mean(one.same)),
        "right": float(np.mean(one.right)),
    }


def line(row: dict[str, Any]) -> str:
    """One row in words."""
    return (
        f"{row['model']}: {row['right']:.1%} of {row['questions']} answers right; of {row['tokens']} tokens mean "
        f"divergence {row['mean_divergence']:.1e}, largest {row['largest_divergence']:.1e}, "
        f"{row['same_token']:.1%} the likeliest in both"
    )
