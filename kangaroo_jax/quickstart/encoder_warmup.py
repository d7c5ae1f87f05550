"""Teaches a new encoder words, before stage 1. It replaces the pretraining of EVA-CLIP and is no part of Kangaroo.

The vision tokens of a picture learn to be the decoder's own embeddings of its caption's words, one after another and
then from the first again: of "A blue ring." blue, ring, blue, ring. A frozen decoder reads them as it reads words.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Float32, Int, UInt8

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.config import StageConfig, tokens_per_group
from kangaroo_jax.conventions import Array
from kangaroo_jax.conversion.building import Building
from kangaroo_jax.conversion.store import write_params
from kangaroo_jax.conversion.weights import Arrays
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer
from kangaroo_jax.models.parameters import Binding, Params, abstract_model
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.json_text import read_json, read_objects
from kangaroo_jax.system.progress import Progress, Tell

PICTURES = 96  # of a step
LEARNING_RATE = 6e-4
SHARPNESS = 8.0  # of the choice among words, by distances between words
LATEST = 160.0  # seconds: half of the pictures are shown at any time up to it, the others at 0, where pictures are
HELD_OUT = 20  # one picture of so many is not trained on
TRAINED = ("vision/", "projector/")
ARTICLES = {"a", "an", "the"}


def warm_up(config: StageConfig, captions: Path, target: Path, steps: int, tell: Tell) -> dict[str, Any]:
    """Train the encoder and the projector of the checkpoint `config.init_from`; the result is the checkpoint `target`.

    Args:
        config: of the stage that follows: its model, its pixels and its seed.
        captions: LLaVA records of one image, one question and one answer each.
        target: made whole or not at all; what is there already is not made again.
        steps: of `PICTURES` pictures.
        tell: prints a line.

    Returns:
        `steps`, `pictures`, and `words_right`: the share of the pictures not trained on whose tokens are all nearest to
        the right words. They are kept in `target/warmup.json`.

    Raises:
        UserError: a picture or the checkpoint cannot be read.
    """
    kept = target / "warmup.json"
    if kept.exists():
        found: dict[str, Any] = read_json(kept)
        return found
    source, binding = reading.find(config.init_from), abstract_model(config.model)
    params = reading.load_params(source, binding)
    records = list(read_objects(captions))
    words = [words_of(record["conversations"][-1]["value"]) for record in records]
    vocabulary = sorted({word for one in words for word in one})
    table = embeddings(vocabulary, load_tokenizer(source), np.asarray(params["llm/embedding"]))
    number = {word: i for i, word in enumerate(vocabulary)}
    pictures = _pictures([captions.parent / record["image"] for record in records], config.data.image_size, tell)
    a_picture = tokens_per_group(config.model, config.data.image_size)
    wanted = np.array([[number[one[i % len(one)]] for i in range(a_picture)] for one in words], np.int32)

    trained, share = _train(binding, params, jnp.asarray(table), pictures, wanted, steps, config.seed, tell)
    found = {"steps": steps, "pictures": len(pictures), "words_right": share}
    tell(f"the encoder has learnt words: all are right of {share:.0%} of the pictures that it did not train on")
    with Building(target, found) as building:
        arrays = {path: np.asarray(value) for path, value in {**params, **trained}.items()}
        progress = Progress("orbax", sum(a.nbytes for a in arrays.values()), "bytes", tell)
        write_params(Arrays.holding(arrays), building, progress)
        beside = shutil.ignore_patterns("params")
        shutil.copytree(source, building.folder, ignore=beside, dirs_exist_ok=True)
        write_json(building.folder / kept.name, found)
    return found


def words_of(caption: str) -> list[str]:
    """The words of a caption in small letters, without articles."""
    return [word for word in re.findall(r"\w+", caption.lower()) if word not in ARTICLES]


def embeddings(
    words: Sequence[str], tokenizer: Tokenizer, table: Float[np.ndarray, "V D"]
) -> Float32[np.ndarray, "words D"]:
    """What stands for each word inside a sentence: the mean embedding of its tokens, a space alone left out."""
    rows = []
    for word in words:
        tokens = [token for token in tokenizer.encode(f" {word}") if tokenizer.decode([token]).strip()]
        rows.append(table[tokens].astype(np.float32).mean(axis=0))
    return np.stack(rows)


def nearness(tokens: Float[Array, "n P D"], table: Float[Array, "words D"]) -> Float32[Array, "n P words"]:
    """How near each vision token is to each word: less half of the squared distance, up to a constant of the token."""
    squares = jnp.square(table).sum(-1)
    return jnp.einsum("npd,wd->npw", tokens, table, preferred_element_type=jnp.float32) - squares / 2


def loss_of(
    tokens: Float[Array, "n P D"], table: Float[Array, "words D"], wanted: Int[Array, "n P"]
) -> Float32[Array, ""]:
    """Cross-entropy of the nearest word, and half of the squared distance to the right one, in squares of a word."""
    size = jnp.square(table).sum(-1).mean()
    choice = optax.softmax_cross_entropy_with_integer_labels(SHARPNESS * nearness(tokens, table) / size, wanted)
    distance = jnp.square(tokens.astype(jnp.float32) - table[wanted]).sum(-1) / size
    total: jax.Array = choice.mean() + distance.mean() / 2
    return total


def _pictures(paths: Sequence[Path], side: int, tell: Tell) -> UInt8[np.ndarray, "n S S 3"]:
    progress, loaded = Progress("pictures", len(paths), "read", tell), []
    for path in paths:
        loaded.append(load_image(path, side))
        progress.add()
    return np.stack(loaded)


def _train(
    binding: Binding,
    params: Params,
    table: Float32[Array, "words D"],
    pictures: UInt8[np.ndarray, "n S S 3"],
    wanted: Int[np.ndarray, "n P"],
    steps: int,
    seed: int,
    tell: Tell,
) -> tuple[Params, float]:
    """(the trained weights, the share of held-out pictures whose words are all right)."""
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(steps // 20, 1), steps, LEARNING_RATE / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))

    def encode(trained: Params, params: Params, frames: Any, seconds: Any) -> Float[Array, "n P D"]:
        flat = binding.bind({**params, **trained}).encode(frames[None], seconds[None])
        return flat.reshape(len(frames), -1, flat.shape[-1])

    @jax.jit
    def step(trained: Params, state: Any, params: Params, frames: Any, seconds: Any, wanted: Any) -> Any:
        def loss(trained: Params) -> jax.Array:
            return loss_of(encode(trained, params, frames, seconds), table, wanted)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    @jax.jit
    def right(trained: Params, params: Params, frames: Any, wanted: Any) -> jax.Array:
        nearest = nearness(encode(trained, params, frames, jnp.zeros(len(frames))), table).argmax(-1)
        return (nearest == wanted).all(-1)

    trained = {path: value for path, value in params.items() if path.startswith(TRAINED)}
    rng, state = np.random.default_rng(seed), optimizer.init(trained)
    held = np.arange(len(pictures)) % HELD_OUT == 0
    mine, others, losses = np.flatnonzero(~held), np.flatnonzero(held), list[float]()
    progress = Progress("encoder", steps, "steps", tell, more=lambda: f"loss {np.mean(losses[-10:]):.3f}")
    for _ in range(steps):
        chosen = rng.choice(mine, min(PICTURES, len(mine)), replace=False)
        seconds = np.where(rng.random(len(chosen)) < 0.5, 0.0, rng.uniform(0.0, LATEST, len(chosen)))
        arguments = pictures[chosen], seconds.astype(np.float32), wanted[chosen]
        trained, state, value = step(trained, state, params, *arguments)
        losses.append(float(value))
        progress.add()
    parts = np.array_split(others, max(len(others) // PICTURES, 1))
    found = [np.asarray(right(trained, params, pictures[part], wanted[part])) for part in parts]
    return trained, round(float(np.concatenate(found).mean()), 4)
