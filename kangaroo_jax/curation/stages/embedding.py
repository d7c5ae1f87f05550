"""Embedding of a clip: the features of its key frames from the vision encoder of a Kangaroo checkpoint.

The patch features of each key frame are averaged and normalised to unit length, and so is the mean over the key frames.
The stage is off until `config.embedding.checkpoint` names a checkpoint, of which only the encoder's weights are read.
Clips are batched, `batch` at a time, and padded to one shape, so that one program is compiled.
"""

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.curation.stages.base import Outcome, Row, Settings
from kangaroo_jax.curation.stages.pictures import key_frame_paths
from kangaroo_jax.data.media.image import load_image


def embedding(row: Row, settings: Settings, root: Path) -> Outcome:
    """`vector`: base64 of int8[D] with a largest magnitude of 127. Raises UserError: no checkpoint, or no key frame."""
    return embed_clips([row], settings, root)[0]


def embed_clips(rows: Sequence[Row], settings: Settings, root: Path) -> list[Outcome]:
    """The outcomes of at most `batch` clips. Raises UserError, see `embedding`."""
    side, encode = _encoder(settings["checkpoint"], settings["side"])
    paths = [key_frame_paths(row, root) for row in rows]
    most = max(settings["frames"], max(len(clip) for clip in paths))
    frames = np.zeros((settings["batch"] * most, side, side, 3), np.uint8)
    owner = np.concatenate([np.full(len(clip), i) for i, clip in enumerate(paths)])
    for i, path in enumerate(path for clip in paths for path in clip):
        frames[i] = load_image(path, side)
    vectors = encode(frames)[: len(owner)]
    return [Outcome({"vector": packed(_unit(vectors[owner == i].mean(0)))}) for i in range(len(rows))]


def packed(vector: np.ndarray) -> str:
    """float[D] as base64 of int8[D], with a rounding error of up to 1/254 of the largest value."""
    scaled = np.round(vector * (127 / max(float(np.abs(vector).max()), 1e-9)))
    return base64.b64encode(scaled.astype(np.int8).tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """int8[D] from its base64 text; its length is not normalised."""
    return np.frombuffer(base64.b64decode(text), np.int8)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def with_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the checkpoint's full path and modification time, so that a new checkpoint is noticed.

    Raises UserError: there is no such checkpoint.
    """
    from kangaroo_jax.checkpoints.reading import find

    folder = find(settings["checkpoint"])
    return {**settings, "checkpoint": str(folder), "changed": folder.stat().st_mtime_ns}


@functools.cache
def _encoder(checkpoint: str, side: int) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """The side S of the frames, and a function uint8[n, S, S, 3] -> float32[n, D] of unit length; cached."""
    import jax

    from kangaroo_jax.checkpoints.reading import load_stage

    config = load_stage(checkpoint)
    binding, params = load_encoder(checkpoint, config.model)

    @jax.jit
    def encode(params: Any, frames: jax.Array) -> jax.Array:
        return binding.bind(params)(frames).astype("float32").mean(1)

    return side or config.data.image_size, lambda frames: _unit(np.asarray(encode(params, frames)))


def load_encoder(path: str, config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """The vision encoder of a checkpoint: its `Binding` and its weights. Nothing else is read.

    Args:
        path: a checkpoint, or a stage or curriculum that holds checkpoints.
        config: the model's config.

    Raises UserError: there is no checkpoint, or it is of another model.
    """
    import jax
    import orbax.checkpoint as ocp
    from flax import nnx

    from kangaroo_jax.checkpoints.frozen import weight_folders
    from kangaroo_jax.checkpoints.reading import check_shapes, find
    from kangaroo_jax.models.eva_clip import EvaClip
    from kangaroo_jax.models.parameters import Binding

    options: dict[str, Any] = dict(dtype=config.dtype, scan=config.scan, attention=config.attention)
    binding = Binding(nnx.eval_shape(lambda: EvaClip(config.vision, rngs=nnx.Rngs(0), **options)))
    checkpoint, prefix = find(path), "vision/"
    found = {folder: ocp.StandardCheckpointHandler().metadata(folder).tree for folder in weight_folders(checkpoint)}
    stored = {name: leaf for tree in found.values() for name, leaf in tree.items() if name.startswith(prefix)}
    check_shapes({name.removeprefix(prefix): leaf for name, leaf in stored.items()}, binding.shapes, checkpoint)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    for folder, tree in found.items():  # trained and frozen weights are stored apart
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
            for name, leaf in tree.items()
            if name in stored
        }
        if target:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                how = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
                params |= reader.restore(folder, args)
    return binding, {name.removeprefix(prefix): value for name, value in params.items()}
