"""The speed of the real train step on this machine, on full packs of random pixels, and against PyTorch.

It imports nothing of the data stack, so that it needs only jax, flax and optax.
"""

import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from kangaroo_jax.chips import find_chip
from kangaroo_jax.config import StageConfig, frames_per_group, stage_config, tokens_per_group
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.attention import choose
from kangaroo_jax.models.kangaroo import KangarooModel, count_parameters
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.planning import formula
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.training.flops import step_flops
from kangaroo_jax.training.placement import resolve
from kangaroo_jax.training.state import build_step, make_state

FORETOLD_MFU = 0.45  # that `kangaroo plan` assumes, too


def bench_config(config: StageConfig, packs: int = 0, moment_dtype: str = "") -> StageConfig:
    """A stage's config placed on one device; `packs` and `moment_dtype` replace its own values if given."""
    asked = {"data.packs_per_batch": packs, "optimizer.moment_dtype": moment_dtype}
    given = {key: value for key, value in asked.items() if value}
    config = config.changed({"train.mesh": (1, 1, 1, 1), **given})
    return resolve(config, find_chip(jax.devices()[0].device_kind), 1)


def full_batch(config: StageConfig, seed: int = 0, segments: int = 1) -> PackedBatch:
    """One video a row that fills the row's frames (as far as its tokens allow), then text to the end.

    The row is cut into `segments` of equal length.
    """
    data, rng = config.data, np.random.default_rng(seed)
    b, t, f, s = data.packs_per_batch, data.tokens_per_pack, data.frames_per_pack, data.image_size
    group, rows = frames_per_group(config.model), tokens_per_group(config.model, data.image_size)
    vision = min(f // group * rows, t - 16)
    index, length = np.arange(t, dtype=np.int32), -(-t // segments)
    tokens = rng.integers(16, config.model.llm.vocab_size, (b, t), np.int32)
    vision_index = np.full((b, t), -1, np.int32)
    vision_index[:, 8 : 8 + vision] = np.arange(vision)
    weights = np.ones((b, t), np.float32)
    weights[:, : 8 + vision] = 0
    return PackedBatch(
        tokens=tokens,
        segment_ids=np.tile(index // length + 1, (b, 1)),
        positions=np.tile(index % length, (b, 1)),
        targets=np.roll(tokens, -1, axis=1),
        weights=weights,
        frames=rng.integers(0, 256, (b, f, s, s, 3), np.uint8),
        frame_times=np.tile(np.arange(f, dtype=np.float32), (b, 1)),
        frame_groups=np.tile(np.arange(f, dtype=np.int32) // group + 1, (b, 1)),
        vision_index=vision_index,
    )


def bench_train(config: StageConfig, steps: int, segments: int = 1, profile: str = "") -> dict[str, float | str]:
    """Compile the step of a stage's config and run it `steps` times on rows of `segments`; the result is the median.

    `profile` is a folder for a trace of one more step, for TensorBoard or xprof.

    Returns attention, compile_seconds, ms_per_step, tokens_per_second, frames_per_second, model_tflops, loss, device
    and foretold_gib (by formula); where the device counts its memory peak_gib; on a chip whose peak is known
    (`kangaroo_jax.chips`) also mfu_causal, mfu_full, and foretold_ms, the step's by formula at FORETOLD_MFU. Logits
    are counted for targets with weight.
    """
    batch = full_batch(config, segments=segments)
    flops = step_flops(config, head_tokens=int((batch.weights > 0).sum()))
    chip = find_chip(jax.devices()[0].device_kind)
    trainer = JaxTrainer(config, batch)
    start = time.perf_counter()
    loss = trainer.step()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = trainer.step()
        seconds.append(time.perf_counter() - start)
    if profile:
        with jax.profiler.trace(profile):
            trainer.step()
    median, data, counts = float(np.median(seconds)), config.data, count_parameters(config.model)
    used: dict[str, float] = {"foretold_gib": formula.peak_gib(config, counts)}
    if held := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        used["peak_gib"] = round(held / (1 << 30), 2)
    if chip is not None:
        used["foretold_ms"] = round(1000 * formula.step_seconds(config, chip, counts, FORETOLD_MFU), 1)
        peak = chip.tflops * 1e12 * median
        used |= {"mfu_causal": round(flops.causal / peak, 4), "mfu_full": round(flops.full / peak, 4)}
    return {
        "device": jax.devices()[0].device_kind,
        "attention": choose(config.model.attention, config.model.llm.head_dim),
        "compile_seconds": round(compile_seconds, 2),
        "ms_per_step": round(1000 * median, 1),
        "tokens_per_second": round(data.packs_per_batch * data.tokens_per_pack / median, 1),
        "frames_per_second": round(data.packs_per_batch * data.frames_per_pack / median, 1),
        "model_tflops": round(flops.causal / 1e12, 4),
        **used,
        "loss": round(loss, 4),
    }


def bench_vision(config: StageConfig, steps: int, frames: int) -> dict[str, float | str]:
    """The vision encoder and projector alone, forward: the median of `steps` calls on `frames` frames.

    Returns ms_per_call, frames_per_second, device and, where the chip's peak is known, mfu.
    """
    model = config.model
    graph, weights = nnx.split(KangarooModel(model, rngs=nnx.Rngs(config.seed), param_dtype=model.dtype))
    side, random = config.data.image_size, np.random.default_rng(0)
    pixels = jax.device_put(random.integers(0, 256, (1, frames, side, side, 3), np.uint8))
    times = jax.device_put(np.arange(frames, dtype=np.float32)[None])
    encode = jax.jit(lambda weights, pixels, times: nnx.merge(graph, weights).encode(pixels, times))
    jax.block_until_ready(encode(weights, pixels, times))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(encode(weights, pixels, times))
        seconds.append(time.perf_counter() - start)
    median, chip = float(np.median(seconds)), find_chip(jax.devices()[0].device_kind)
    alone = {"data.packs_per_batch": 1, "data.frames_per_pack": frames, "optimizer.trainable": ((".*", None),)}
    flops = step_flops(config.changed(alone))
    result: dict[str, float | str] = {
        "device": jax.devices()[0].device_kind,
        "ms_per_call": round(1000 * median, 2),
        "frames_per_second": round(frames / median, 1),
    }
    if chip is not None:
        result["mfu"] = round((flops.vision + flops.projector) / (chip.tflops * 1e12 * median), 4)
    return result


def compare_with_torch(config: StageConfig, steps: int, rounds: int, segments: int) -> dict[str, float | str]:
    """Run our step and the same model in plain PyTorch in turn, from the same weights on the same batch.

    Both take real AdamW steps with clipping, in float32, with all CPU threads. The first step of each turn is not
    measured, because it reclaims the memory of the other's turn. Returns the fastest ms_per_step of each (the steps
    that other work on the machine disturbed least), `ratio` (torch's time / ours: above 1 we are faster), the ratio
    of the medians, and the losses of the first and last step.

    Raises UserError if torch or transformers is not installed, or the losses differ by more than 1e-4.
    """
    try:
        from kangaroo_jax.bench.torch_kangaroo import TorchTrainer
    except ImportError as error:
        raise UserError(f"{error.name} is missing: {install_line('convert')}") from None
    batch = full_batch(config, segments=segments)
    ours = JaxTrainer(config, batch)
    theirs = TorchTrainer(config, batch, ours.state.params)
    trainers: dict[str, Any] = {"jax": ours, "torch": theirs}
    losses = {name: [trainer.step()] for name, trainer in trainers.items()}
    if abs(losses["jax"][0] - losses["torch"][0]) > 1e-4 * abs(losses["torch"][0]):
        raise UserError(f"the two models do not agree at step 0: losses {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            losses[name].append(trainer.step())
            for _ in range(steps):
                start = time.perf_counter()
                losses[name].append(trainer.step())
                seconds[name].append(time.perf_counter() - start)
    best = {name: 1000 * min(values) for name, values in seconds.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "parameters": sum(int(np.prod(x.shape)) for x in ours.state.params.values()),
        "jax_ms_per_step": round(best["jax"], 1),
        "torch_ms_per_step": round(best["torch"], 1),
        "ratio": round(best["torch"] / best["jax"], 3),
        "ratio_of_medians": round(float(np.median(seconds["torch"]) / np.median(seconds["jax"])), 3),
        **{
            f"{name}_loss_{when}": round(losses[name][i], 5)
            for when, i in (("first", 0), ("last", -1))
            for name in losses
        },
    }


class JaxTrainer:
    """Runs the real train step of a config repeatedly on one batch."""

    def __init__(self, config: StageConfig, batch: PackedBatch) -> None:
        model, binding = config.model, abstract_model(config.model)
        make = lambda: make_state(config, binding.flatten(KangarooModel(model, rngs=nnx.Rngs(config.seed))))  # noqa: E731
        self.state = jax.jit(make)()  # in one program, so that frozen weights never exist in float32
        self._step = build_step(config, binding, self.state)
        self._batch = jax.device_put(batch)

    def step(self) -> float:
        """One step; waits for its loss and returns it."""
        self.state, metrics = self._step(self.state, self._batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def torch_config() -> StageConfig:
    """The config of `train-vs-torch`: `base_100m`, float32, all trained; 2 rows of 4 frames at 224 px, 512 tokens."""
    config = stage_config("base_100m")
    config.model.update(dtype="float32", scan=False)
    config.data.update(image_size=224, packs_per_batch=2, tokens_per_pack=512, frames_per_pack=4)
    config.train.update(steps=100, accumulate=1)
    return StageConfig.from_config(config)
