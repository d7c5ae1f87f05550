"""`kangaroo bench train`: how fast the real train step runs on this machine, on full packs of made-up pixels.

Imports nothing of the data stack, so that it runs where only jax, flax and optax are.
"""

import argparse
import json
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from kangaroo_jax.config_files import load_config
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.models.kangaroo import Kangaroo, frames_per_group, tokens_per_group
from kangaroo_jax.training.optimizer import make_optimizer, make_schedule
from kangaroo_jax.training.parameters import Binding, split_trainable
from kangaroo_jax.training.step import TrainState, make_train_step


def full_batch(config: ConfigDict, seed: int = 0) -> PackedBatch:
    """One video a row that fills the row's frames (as far as its tokens allow), then text to the end."""
    data, rng = config.data, np.random.default_rng(seed)
    b, t, f, s = data.packs_per_batch, data.tokens_per_pack, data.frames_per_pack, data.image_size
    group, rows = frames_per_group(config.model), tokens_per_group(config.model, data.image_size)
    vision = min(f // group * rows, t - 16)
    tokens = rng.integers(16, config.model.llm.vocab_size, (b, t), np.int32)
    vision_index = np.full((b, t), -1, np.int32)
    vision_index[:, 8 : 8 + vision] = np.arange(vision)
    weights = np.ones((b, t), np.float32)
    weights[:, : 8 + vision] = 0
    return PackedBatch(
        tokens=tokens,
        segment_ids=np.ones((b, t), np.int32),
        positions=np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        targets=np.roll(tokens, -1, axis=1),
        weights=weights,
        frames=rng.integers(0, 256, (b, f, s, s, 3), np.uint8),
        frame_times=np.tile(np.arange(f, dtype=np.float32), (b, 1)),
        frame_groups=np.tile(np.arange(f, dtype=np.int32) // group + 1, (b, 1)),
        vision_index=vision_index,
    )


def bench_train(config: ConfigDict, steps: int) -> dict[str, float | str]:
    """Compile the step of a stage's config and run it `steps` times; the median counts.

    Returns compile_seconds, ms_per_step, tokens_per_second, frames_per_second, loss and device.
    """
    model = Kangaroo(config.model, rngs=nnx.Rngs(config.seed))
    binding = Binding(model)
    params, frozen = split_trainable(binding.flatten(model), config.optimizer.trainable, config.optimizer.frozen_dtype)
    optimizer = make_optimizer(config.optimizer, config.train.steps, params)
    step = make_train_step(binding, optimizer, make_schedule(config.optimizer, config.train.steps))
    state = TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))
    batch = jax.device_put(full_batch(config))
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    return {
        "device": jax.devices()[0].device_kind,
        "compile_seconds": round(compile_seconds, 2),
        "ms_per_step": round(1000 * median, 1),
        "tokens_per_second": round(batch.tokens.size / median),
        "frames_per_second": round(batch.frames.shape[0] * batch.frames.shape[1] / median),
        "loss": round(float(metrics["loss"]), 4),
    }


def main(argv: Sequence[str]) -> None:
    """`train [--config=STAGE:PRESET] [--steps=N] [--json]`."""
    parser = argparse.ArgumentParser(prog="kangaroo bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train",))
    parser.add_argument("--config", default="stage4_instruct:tiny", help="a stage and a preset")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured, after the first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    result = bench_train(load_config(arguments.config), arguments.steps)
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))
