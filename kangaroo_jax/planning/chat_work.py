"""What the engine holds, reads and multiplies while it answers, by formula: bounds of memory and time.

A bound of time is the longer of two: the bytes that must be read at the chip's bandwidth, the products at its peak.
No program is as fast; one that is far from it wastes something.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kangaroo_jax.chips import Chip, Slices
from kangaroo_jax.config import ModelConfig, StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import weights
from kangaroo_jax.inference.memories import QUERIES, TAILS, Part, check_kv_dtype
from kangaroo_jax.inference.sizes import TAIL, Key, Sizes
from kangaroo_jax.models.parameters import Binding
from kangaroo_jax.models.quantized import FORMATS
from kangaroo_jax.sharding import MESH_AXES, sharding
from kangaroo_jax.training.flops import Flops, step_flops

GIB = 1 << 30
TEXT_TOKENS = 2048  # of a conversation's questions and answers, beside its video
QUESTION = 128  # tokens of one question
PROGRAM_GIB = 0.3  # the programs themselves; this and the next are fitted to what is compiled for v5e
VISION_WIDTHS = 32  # of the ViT's activations that are there at a time, in multiples of its width


@dataclasses.dataclass(frozen=True)
class Talk:
    """An engine that is planned: a model, how its numbers are kept, and for how long a conversation."""

    config: StageConfig  # a stage's
    quantize: str | None  # the format of the decoder's weights
    kv_dtype: str | None  # how keys and values are kept; None as they are computed
    slots: int
    frames: int  # of the video that a conversation is about; 0: as many tokens as a row in training

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize not in FORMATS:
            raise UserError(f"--quantize={self.quantize}: use one of {', '.join(FORMATS)}")
        check_kv_dtype(self.kv_dtype)
        if self.frames % frames_per_group(self.model):
            raise UserError(f"--frames={self.frames}: must be a multiple of {frames_per_group(self.model)}")
        try:
            assert self.sizes
        except ValueError as error:
            raise UserError(f"--slots={self.slots}: {error}") from None

    @property
    def model(self) -> ModelConfig:
        """The model, in the two-byte dtype of the chip."""
        return dataclasses.replace(self.config.model, dtype="bfloat16")

    @property
    def video_tokens(self) -> int:
        """Tokens of the video with those around its groups."""
        groups = self.frames // frames_per_group(self.model)
        return groups * (tokens_per_group(self.model, self.config.data.image_size) + 1) + 2 if groups else 0

    @property
    def context(self) -> int:
        """Tokens that a conversation may have."""
        tokens: int = self.video_tokens + TEXT_TOKENS if self.frames else self.config.data.tokens_per_pack
        return -(-tokens // 128) * 128

    @property
    def sizes(self) -> Sizes:
        """The shapes of the engine's programs. ValueError for too many slots."""
        return Sizes.for_context(self.context, self.slots)

    @property
    def capacity(self) -> int:
        """Tokens of a slot of the largest class."""
        return self.sizes.classes[-1][0]

    def mesh(self, target: Slices) -> tuple[int, int, int, int]:
        """The mesh that answers fastest: heads are cut over all chips. Raises UserError where they cannot be."""
        heads = self.model.llm.kv_heads
        if target.slices > 1:
            raise UserError("--slices: one engine answers on one slice; plan --slices=1 and start one engine a slice")
        if heads % target.devices:
            sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise UserError(
                f"{target}: an engine is cut over the {heads} key-value heads: plan for {sizes} devices, not "
                f"{target.devices}, and start several engines"
            )
        return 1, 1, 1, target.devices

    def programs(self) -> dict[str, Key]:
        """The programs that need the most memory and time of those that the engine has."""
        capacity, chunk = self.capacity, self.sizes.chunks[-1]
        rows = next(rows for rows in self.sizes.rows if rows >= self.slots)
        found: dict[str, Key] = {
            "encode": ("encode", self.config.data.image_size),
            "extend": ("extend", capacity, chunk, capacity),
            "decode": ("decode", capacity, 1),
        }
        return found if rows == 1 else {**found, f"decode {rows}": ("decode", capacity, rows)}


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device."""

    decoder: int  # without the embedding and the head
    embedding: int
    head: int  # 0 where it is the embedding
    vision: int  # with what makes its output vision tokens
    slot: int  # one conversation, and one of the class of short ones
    large: int  # the large part of one conversation, which a step reads
    own: int  # what else a step takes of it: its tail, and what it has seen

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.decoder + self.embedding + self.head + self.vision


def held(talk: Talk, mesh: tuple[int, int, int, int]) -> Held:
    """What one device of the mesh holds."""
    shape = AbstractMesh(mesh, MESH_AXES)
    binding = Binding(weights.abstract(talk.model, talk.quantize))
    parts = {"decoder": 0, "embedding": 0, "head": 0, "vision": 0}
    for name, there in binding.shapes.items():
        part = "decoder" if name.startswith("llm/") else "vision"
        part = next((other for other in ("embedding", "head") if name.startswith(f"llm/{other}")), part)
        parts[part] += _bytes(there, binding.axes[name], shape)
    large = {capacity: _large(talk, capacity, shape) for capacity, _ in talk.sizes.classes}
    llm = talk.model.llm
    tail = jax.ShapeDtypeStruct((llm.depth, 2, llm.kv_heads, TAIL, llm.head_dim), talk.model.dtype)
    own = _bytes(tail, TAILS, shape) + 4 * llm.vocab_size  # what a row has seen
    return Held(**parts, slot=sum(large.values()) + len(large) * own, large=large[talk.capacity], own=own)


def _large(talk: Talk, capacity: int, mesh: AbstractMesh) -> int:
    llm = talk.model.llm

    def size(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any) -> int:
        return _bytes(jax.ShapeDtypeStruct(shape, dtype), axes, mesh)

    layer = Part.shapes(llm.kv_heads, llm.head_dim, capacity, jnp.dtype(talk.kv_dtype or talk.model.dtype), size)
    return llm.depth * int(sum(layer.arrays().values()))


def _bytes(array: jax.ShapeDtypeStruct, axes: tuple[str | None, ...], mesh: AbstractMesh) -> int:
    return int(math.prod(sharding(mesh, axes, array.shape).shard_shape(array.shape)) * array.dtype.itemsize)


def temporary_gib(talk: Talk, devices: int) -> float:
    """What a program needs beside weights and memories, by formula, for chips without a compiler here."""
    llm, vision, frames = talk.model.llm, talk.model.vision, talk.sizes.frames
    scores = 2 * 4 * QUERIES * llm.heads / devices * (talk.capacity + talk.sizes.chunks[-1])
    patches = (talk.config.data.image_size // vision.patch_size) ** 2 + 1
    seen = VISION_WIDTHS * 2 * frames / devices * patches * vision.width
    logits = 3 * 4 * llm.vocab_size / devices * talk.slots
    return max(scores, seen, logits) / GIB


# ---------------------------------------------------------------------------------------------- time


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least seconds and most tokens a second that the chips' bandwidth and peak allow."""

    first_token_seconds: float  # of a question about the video, which the host has decoded
    of_it_encode_seconds: float
    next_round_seconds: float  # of another question
    tokens_per_second: Mapping[str, float]  # by the conversations that are answered at the same time


def bounds(talk: Talk, target: Slices, one: Held) -> Bounds:
    """The bounds of a conversation, with what each of the devices holds."""
    devices, chip = target.devices, target.chip
    encode = _encode_seconds(talk, chip, devices, one) if talk.frames else 0.0
    prompt = talk.video_tokens + QUESTION
    step = _decode_seconds(talk, chip, devices, one, 1)
    first = encode + _extend_seconds(talk, chip, devices, one, 0, prompt) + step
    again = _extend_seconds(talk, chip, devices, one, prompt, prompt + QUESTION) + step
    rows = {1, talk.slots}
    speeds = {str(n): round(n / _decode_seconds(talk, chip, devices, one, n), 1) for n in sorted(rows)}
    return Bounds(round(first, 3), round(encode, 3), round(again, 4), speeds)


def _least(chip: Chip, flops: float, read: float) -> float:
    """Seconds of one device that multiplies and reads so much."""
    return max(flops / (chip.tflops * 1e12), read / (chip.hbm_gb * 1e9))


def _flops(talk: Talk, tokens: int, frames: int) -> Flops:
    """The work of forward passes over so many tokens or frames."""
    row = {"data.packs_per_batch": 1, "data.tokens_per_pack": tokens, "data.frames_per_pack": frames}
    return step_flops(talk.config.changed({**row, "optimizer.trainable": ((".*", None),)}))


def _encode_seconds(talk: Talk, chip: Chip, devices: int, one: Held) -> float:
    work = _flops(talk, 0, talk.frames)
    calls = -(-talk.frames // talk.sizes.frames)
    return max(_least(chip, (work.vision + work.projector) / devices, 0), calls * _least(chip, 0, one.vision))


def _extend_seconds(talk: Talk, chip: Chip, devices: int, one: Held, start: int, prompt: int) -> float:
    """Reading a prompt from `start` on, but for its last token, in the chunks in which the engine does."""
    total, llm, a_token = 0.0, talk.model.llm, _flops(talk, 1, 0).llm_linear
    capacity = talk.capacity
    for size, far in _chunks(talk.sizes, start, prompt - 1, capacity):
        linear = size * a_token
        attention = 4.0 * llm.depth * llm.heads * llm.head_dim * size * (far + size / 2)
        read = one.decoder + one.large * far / capacity
        total += _least(chip, (linear + attention) / devices, read)
    return total


def _chunks(sizes: Sizes, start: int, end: int, capacity: int) -> Iterator[tuple[int, int]]:
    """(tokens, how far they look back) of each chunk between two places of a prompt."""
    while start < end:
        size = sizes.chunk(end - start, start, capacity)
        yield size, next(far for far in sizes.lookbacks(capacity) if far >= start)
        start += min(size, end - start)


def _decode_seconds(talk: Talk, chip: Chip, devices: int, one: Held, rows: int) -> float:
    """One token of so many conversations; a step reads the whole large part of each."""
    llm, work = talk.model.llm, _flops(talk, rows, 0)
    attention = 4.0 * llm.depth * llm.heads * llm.head_dim * rows * talk.capacity
    read = one.decoder + (one.head or one.embedding) + rows * one.large
    return _least(chip, (work.llm_linear + work.head + attention) / devices, read)
