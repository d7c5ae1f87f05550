"""Checkpoints with random weights, written by Orbax as training writes them, a tokenizer and a real video."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from kangaroo_jax.config import stage_config
from kangaroo_jax.conversion.verify import make_video
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.models.parameters import Binding, Params

TEXT = [
    "What moves in the video, and which way?",
    "A red square moves to the left.",
    "视频里有什么?",
    "一个红色的方块。",
]
VOCABULARY = 320  # more than the tokenizer has


def small_config() -> ConfigDict:
    """A stage of the tiny preset, smaller still; a video of 24 s is 24 frames, 12 groups of 4 vision tokens."""
    config = stage_config("tiny")
    config.stage = "stage5_long_video"
    model, data = config.model, config.data
    model.vision.update(width=32, depth=3, heads=2, mlp_width=40, pos_embed_grid=4, rope_reference_grid=4)
    model.llm.update(vocab_size=VOCABULARY, width=48, depth=3, heads=6, kv_heads=2, head_dim=8, mlp_width=80)
    data.update(image_size=32, min_frames=2, max_frames=24, long_min_frames=4, long_max_frames=32)
    return config


PIECES = range(267, 310)  # of the tokenizer, that are neither special nor a byte


def _speaking(head: np.ndarray) -> np.ndarray:
    """A head [D, V] whose likeliest token is always a piece of text: any other is nine tenths of one."""
    head = head.copy()
    for token in set(range(head.shape[1])) - set(PIECES):
        head[:, token] = 0.9 * head[:, PIECES[token % len(PIECES)]]
    return head


def save(folder: Path, params: Params, config: ConfigDict, tokenizer: Path) -> Path:
    """A stage folder as training leaves it."""
    step = folder / "checkpoints" / "7"
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "params", params)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(step / "config", args=ocp.args.JsonSave(config.to_dict()))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    return train_sentencepiece(TEXT, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=310)


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> Path:
    """24 seconds in which a square moves and the picture grows brighter."""
    return make_video(tmp_path_factory.mktemp("media") / "square.mp4", side=48)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tokenizer_file, make_random_model) -> Callable[..., Path]:
    """make_checkpoint(dtype, **changes): a checkpoint with random weights; "mixed" is a frozen bfloat16 encoder."""

    @functools.cache
    def make(dtype: str, **changes) -> Path:
        config = small_config()
        config.model.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        model = make_random_model(config.model)
        rng = np.random.default_rng(1)
        params = {}
        for path, value in Binding(model).flatten(model).items():
            kept = value if value.ndim > 1 and "bias" not in path else value + 0.1 * rng.standard_normal(value.shape)
            if path == "llm/head/kernel":
                kept = _speaking(np.asarray(kept))
            narrow = dtype == "bfloat16" or (dtype == "mixed" and path.startswith(("vision/", "llm/")))
            params[path] = jnp.asarray(kept, jnp.bfloat16 if narrow else jnp.float32)
        return save(tmp_path_factory.mktemp("run") / "stage5_long_video", params, config, tokenizer_file)

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint) -> Path:
    """In float32."""
    return make_checkpoint("float32")
