"""`kangaroo bench chat` without `--vs`: how long this device takes to answer about a video, part by part.

Weights are random, of a preset's shapes, made on the device. What a step reads is put beside a copy of memory that is
measured in the same run.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.bench.data import make_video
from kangaroo_jax.config import StageConfig, frames_per_group, stage_config, tokens_per_group
from kangaroo_jax.data.media.decode import Decoder, Outcome, ThreadDecoder
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import weights
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.requests import Answer, Event, Request
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.inference.vision import Vision
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.models.quantized import SCALE
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.memory import peak_mib
from kangaroo_jax.system.progress import Tell

QUESTION = 32  # tokens of text around a video
COPIED = 1 << 30  # bytes of the array whose copy tells the bandwidth; on a CPU a sixteenth
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of frames; seconds are medians of the rounds."""

    frames: int
    prompt_tokens: int
    decode_s: float  # the file's frames, alone
    encode_s: float  # the ViT, frames being there
    prefill_s: float  # vision tokens being there
    first_token_from_frames_s: float
    first_token_from_file_s: float  # decoding, ViT and prompt side by side
    next_question_s: float  # to its first token
    tokens_per_second: float
    read_gib_per_token: float  # weights and the conversation's memory
    share_of_bandwidth: float
    peak_gib: float  # of the device, since the program began; on a CPU of the process


@dataclasses.dataclass(frozen=True)
class Video:
    """A file, and how long it is."""

    path: Path
    seconds: int


class Given(Decoder):
    """Decodes, or gives clips that are decoded already."""

    def __init__(self) -> None:
        self.clips: dict[tuple[float, ...], Clip] = {}
        self._decoder = ThreadDecoder(usable_cpus())

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        """See `Decoder`."""
        found = next((clip for times, clip in self.clips.items() if set(ref.times) <= set(times)), None)
        if found is None:
            return self._decoder.submit(ref, image_size)
        times = next(times for times, clip in self.clips.items() if clip is found)
        first = times.index(ref.times[0])
        part = slice(first, first + len(ref.times))
        future: Future[Outcome] = Future()
        future.set_result(Clip(found.pixels[part], found.times[part]))
        return future

    def probe(self, path: str, kind: str) -> Any:
        """See `Decoder`."""
        return self._decoder.probe(path, kind)

    def close(self) -> None:
        """See `Decoder`."""
        self._decoder.close()


def bench_answering(
    preset: str,
    frames: Sequence[int],
    *,
    quantize: str | None,
    kv_dtype: str | None,
    new: int,
    rounds: int,
    seconds: int,
    folder: Path,
    tell: Tell,
) -> dict[str, Any]:
    """Measure; `rows`, a `Row` for each number of frames, and what the device is.

    Raises UserError: there is no such preset, or the frames do not fit its groups.
    """
    try:
        config = StageConfig.from_config(stage_config(preset))
    except ValueError as error:
        raise UserError(f"bench chat: --preset: {error}") from None
    group = frames_per_group(config.model)
    if bad := [count for count in frames if count % group]:
        raise UserError(f"bench chat: --frames={bad[0]}: must be a multiple of {group}")
    dtype = weights.compute_dtype()
    model = random_weights(dataclasses.replace(config.model, dtype=dtype), quantize)
    bandwidth = copy_bandwidth()
    tell(f"{device_name()}: {bandwidth / GIB:.0f} GiB/s by a copy; {preset}, {dtype}, decoder {quantize or dtype}")
    video = Video(make_video(folder / f"{seconds}s.mp4", seconds, 0), seconds)
    found = [
        _measured(config, model, video, count, kv_dtype, new, rounds, bandwidth, tell) for count in sorted(set(frames))
    ]
    return {
        "device": device_name(),
        "bandwidth_gib_s": round(bandwidth / GIB, 1),
        "preset": preset,
        "dtype": dtype,
        "quantize": quantize,
        "kv_dtype": kv_dtype,
        "rows": [dataclasses.asdict(row) for row in found],
    }


def random_weights(config: Any, form: str | None) -> KangarooModel:
    """A model with random weights, made on the device one array after another."""
    graph, state = nnx.split(weights.abstract(config, form))
    drawn = [
        (path, weight.replace(_drawn(jax.random.key(number), weight.shape, jnp.dtype(weight.dtype), path[-1] == SCALE)))
        for number, (path, weight) in enumerate(nnx.to_flat_state(state))
    ]
    model: KangarooModel = nnx.merge(graph, nnx.from_flat_state(drawn))
    return model


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any, is_scale: bool) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        whole: jax.Array = jax.random.bits(key, shape, jnp.uint8).astype(dtype)
        return whole
    return jnp.full(shape, 2e-4, dtype) if is_scale else 0.02 * jax.random.normal(key, shape, dtype)


def copy_bandwidth() -> float:
    """Bytes a second that the device moves when it copies a large array: read and written."""
    size = COPIED // (16 if jax.devices()[0].platform == "cpu" else 1)
    array = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        jax.block_until_ready(copy(array))
        best = min(best, time.perf_counter() - begun)
    return 2 * size / best


def device_name() -> str:
    """What JAX calls the device."""
    device = jax.devices()[0]
    return f"{device.platform} {device.device_kind}"


def peak_gib() -> float:
    """The most memory that the device has held, or the process where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return float(stats["peak_bytes_in_use"]) / GIB if "peak_bytes_in_use" in stats else peak_mib() / 1024


def read_bytes(model: KangarooModel) -> int:
    """Bytes of weights that one token reads: the decoder and its head, and one row of the embedding."""
    size = 0
    for path, weight in nnx.to_flat_state(nnx.state(model.llm)):
        is_embedding = path[0] == "embedding" and model.llm.head is not None
        size += 0 if is_embedding else weight.get_value().nbytes
    return size


class _Talk:
    """An engine for one number of frames, and what is asked of it."""

    def __init__(
        self, config: StageConfig, model: KangarooModel, video: "Video", frames: int, new: int, kv_dtype: str | None
    ) -> None:
        tokens = tokens_per_group(config.model, config.data.image_size)
        group = frames_per_group(config.model)
        self.rows = frames // group * tokens
        times = tuple(float(second) for second in (np.arange(frames) + 0.5) * video.seconds / frames)
        self.ref = MediaRef("video", str(video.path), times)
        self.side = config.data.image_size
        self.decoder = Given()
        self._number = 0
        self._vocabulary = config.model.llm.vocab_size
        room = -(-(self.rows + 3 * QUESTION + new) // 128) * 128
        self.engine = Engine(
            model,
            Sizes(((room + 128, 1),), rows=(1,)),
            vision=lambda programs: Vision(
                programs.encode,
                self.decoder,
                image_size=self.side,
                frames_per_group=group,
                tokens_per_group=tokens,
                frames_a_call=programs.frames_a_call,
                weights_id="random",
                cache_bytes=4 * GIB,
                pieces=usable_cpus(),
            ),
            kv_dtype=kv_dtype,
        )

    def ask(self, namespace: int, new: int, before: Sequence[int] = ()) -> tuple[Answer, list[float]]:
        """Ask about the video with new text before and behind it, or go on after such a conversation; the answer,
        and when each of its tokens came."""
        self._number += 1
        text = np.random.default_rng(self._number).integers(16, self._vocabulary, 2 * QUESTION).astype(np.int32)
        if len(before):
            tokens = np.concatenate([np.asarray(before, np.int32), text[:QUESTION]])
        else:
            tokens = np.concatenate([text[:QUESTION], np.zeros(self.rows, np.int32), text[QUESTION:]])
        is_vision = np.zeros(len(tokens), bool)
        is_vision[QUESTION : QUESTION + self.rows] = True
        self.last = tokens
        ticks: list[float] = []
        ticket = self.engine.submit(
            Request(tokens, is_vision, (self.ref,), new, namespace=namespace.to_bytes(4, "little"))
        )
        ticket.add_listener(lambda told: ticks.append(time.perf_counter()) if isinstance(told, Event) else None)
        return ticket.result(), ticks

    def encode(self, clip: Clip) -> float:
        """Seconds of the ViT for these frames."""
        programs = self.engine.programs
        size = programs.frames_a_call
        begun = time.perf_counter()
        for first in range(0, len(clip.pixels), size):
            missing = max(0, first + size - len(clip.pixels))
            pixels = np.pad(clip.pixels[first : first + size], ((0, missing), (0, 0), (0, 0), (0, 0)))
            seconds = np.pad(clip.times[first : first + size].astype(np.float32), (0, missing))
            rows = programs.encode(pixels, seconds)
        jax.block_until_ready(rows)
        return time.perf_counter() - begun

    def close(self) -> None:
        """End the engine."""
        self.engine.close()
        self.decoder.close()


def _measured(
    config: StageConfig,
    model: KangarooModel,
    video: Video,
    frames: int,
    kv_dtype: str | None,
    new: int,
    rounds: int,
    bandwidth: float,
    tell: Tell,
) -> Row:
    talk, times = _Talk(config, model, video, frames, new, kv_dtype), dict[str, list[float]]()
    try:
        for number in range(rounds + 1):  # the first compiles
            measured = _round(talk, number, new)
            for name, value in measured.items():
                if number:
                    times.setdefault(name, []).append(value)
        programs = talk.engine.programs
        capacity = programs.sizes.classes[0][0]
        read = read_bytes(model) + programs.size(capacity)
    finally:
        talk.close()
    middle = {name: statistics.median(values) for name, values in times.items()}
    step = middle.pop("step")
    row = Row(
        frames,
        len(talk.last) - QUESTION - new,
        **{f"{name}_s": round(value, 4) for name, value in middle.items()},
        tokens_per_second=round(1 / step, 2),
        read_gib_per_token=round(read / GIB, 3),
        share_of_bandwidth=round(read / step / bandwidth, 3),
        peak_gib=round(peak_gib(), 2),
    )
    tell(line(row))
    return row


def _round(talk: _Talk, number: int, new: int) -> dict[str, float]:
    """Seconds of every part, once. A namespace knows nothing of another's media and conversations."""
    talk.decoder.clips.clear()
    begun = time.perf_counter()
    clip = talk.decoder.submit(talk.ref, talk.side).result()
    decode = time.perf_counter() - begun
    if isinstance(clip, UserError):
        raise clip
    encode = talk.encode(clip)
    from_file, _ = talk.ask(2 * number, 1)
    talk.decoder.clips[talk.ref.times] = clip
    from_frames, _ = talk.ask(2 * number + 1, 1)
    known, _ = talk.ask(2 * number + 1, 1)  # other text before the video: nothing but its vision tokens is known
    answer, ticks = talk.ask(2 * number + 1, new)
    following, _ = talk.ask(2 * number + 1, 1, [*talk.last.tolist(), *answer.ids])
    steps = np.diff(ticks)
    return {
        "decode": decode,
        "encode": encode,
        "prefill": known.usage.prefill,
        "first_token_from_frames": from_frames.usage.first_token,
        "first_token_from_file": from_file.usage.first_token,
        "next_question": following.usage.first_token,
        "step": float(np.median(steps)),
    }


def line(row: Row) -> str:
    """A row in words."""
    return (
        f"{row.frames} frames, {row.prompt_tokens} tokens: decoded in {row.decode_s:.2f} s, ViT {row.encode_s:.2f}, "
        f"prompt {row.prefill_s:.2f}; first token {row.first_token_from_frames_s:.2f} s from frames, "
        f"{row.first_token_from_file_s:.2f} from the file, {row.next_question_s:.3f} for the next question; "
        f"{row.tokens_per_second:.1f} tokens/s, {row.share_of_bandwidth:.0%} of the bandwidth; {row.peak_gib:.1f} GiB"
    )


def table(found: dict[str, Any]) -> str:
    """All rows as a Markdown table."""
    names = [field.name for field in dataclasses.fields(Row)]
    rows = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in found["rows"])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
