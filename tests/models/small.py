"""A model of a few thousand weights, packs for it, and how the tests compare trees."""

import functools
from collections.abc import Callable
from dataclasses import fields

import jax
import numpy as np
from flax import nnx

from kangaroo_jax.config import ModelConfig, model_config
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.models.kangaroo import KangarooModel

VOCABULARY, SIDE, GROUP_FRAMES, GROUP_TOKENS = 67, 16, 2, 4  # 16 pixels, patches of 4: a grid of 4 x 4


def small_config(**changes) -> ModelConfig:
    """Two layers each; `changes` are dotted keys of the model's configuration with __ for the dot."""
    c = model_config("tiny")
    c.vision.update(patch_size=4, width=16, depth=2, heads=2, mlp_width=24, pos_embed_grid=4, rope_reference_grid=4)
    c.llm.update(vocab_size=VOCABULARY, width=24, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=40, loss_chunk=8)
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return ModelConfig.from_config(c)


@functools.cache
def _parts(**changes) -> tuple[nnx.GraphDef, nnx.State]:
    make = lambda: nnx.split(KangarooModel(small_config(**changes), rngs=nnx.Rngs(0)))  # noqa: E731
    return nnx.eval_shape(make)[0], jax.jit(lambda: make()[1])()


def small_model(**changes) -> KangarooModel:
    """A model of `small_config`, always with the same weights."""
    return nnx.merge(*_parts(**changes), copy=True)  # what a test does to it stays its own


def sample(seed: int, groups: int, text: int) -> PackedBatch:
    """One sample alone in one pack: marks around `groups` vision groups, then `text` tokens, half of them weighted."""
    random = np.random.default_rng(seed)
    tokens, vision_index = [1], [-1]
    for group in range(groups):
        tokens += [6 if group == 0 else 7] + [10] * GROUP_TOKENS
        vision_index += [-1] + list(range(group * GROUP_TOKENS, (group + 1) * GROUP_TOKENS))
    if groups:
        tokens, vision_index = tokens + [8, 9], vision_index + [-1, -1]
    tokens, vision_index = tokens + list(random.integers(11, VOCABULARY, text)), vision_index + [-1] * text
    length, frames = len(tokens), groups * GROUP_FRAMES
    weights = np.zeros(length)
    weights[length - text // 2 :] = random.uniform(0.5, 2.0, text // 2)
    return PackedBatch(
        tokens=np.asarray([tokens], np.int32),
        segment_ids=np.ones((1, length), np.int32),
        positions=np.arange(length, dtype=np.int32)[None],
        targets=np.asarray([tokens[1:] + [2]], np.int32),
        weights=weights[None].astype(np.float32),
        frames=random.integers(0, 256, (1, frames, SIDE, SIDE, 3)).astype(np.uint8),
        frame_times=np.sort(random.uniform(0, 9, (1, frames))).astype(np.float32),
        frame_groups=(1 + np.arange(frames) // GROUP_FRAMES)[None].astype(np.int32),
        vision_index=np.asarray([vision_index], np.int32),
    )


def pack(samples: list[PackedBatch], length: int, frames: int) -> PackedBatch:
    """The samples one after another in one pack of T = `length` and F = `frames`, padded at the end."""
    moved, seen = [], 0
    for number, one in enumerate(samples, start=1):
        rows = seen // GROUP_FRAMES * GROUP_TOKENS
        index = np.where(one.vision_index < 0, -1, one.vision_index + rows)
        groups = one.frame_groups + seen // GROUP_FRAMES
        moved.append(one.replace(segment_ids=one.segment_ids * number, vision_index=index, frame_groups=groups))
        seen += one.frames.shape[1]
    packed = {}
    for field in fields(PackedBatch):
        array = np.concatenate([getattr(one, field.name) for one in moved], axis=1)
        size = frames if field.name.startswith("frame") else length
        pad = [(0, 0), (0, size - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        packed[field.name] = np.pad(array, pad, constant_values=-1 if field.name == "vision_index" else 0)
    return PackedBatch(**packed)


def stack_packs(packs: list[PackedBatch]) -> PackedBatch:
    """Packs of the same sizes as one batch."""
    return jax.tree.map(lambda *x: np.concatenate(x), *packs)


@functools.cache
def _gradient_of(**changes) -> Callable[[PackedBatch], tuple[jax.Array, nnx.State]]:
    graph, weights = _parts(**changes)

    def mean_loss(weights, batch):
        loss, weight = nnx.merge(graph, weights).loss(batch)
        return loss / weight

    return functools.partial(jax.jit(jax.value_and_grad(mean_loss)), weights)


def gradients(batch: PackedBatch, **changes) -> tuple[jax.Array, nnx.State]:
    """(mean loss, its gradient by every weight) of `small_model`, compiled once for each shape of batch."""
    return _gradient_of(**changes)(batch)


def assert_trees_close(actual, expected, tolerance: float) -> None:
    """Largest difference of each leaf, relative to the largest value of that leaf of `expected`, or of 1e-3."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * max(np.abs(np.asarray(b)).max(), 1e-3)
