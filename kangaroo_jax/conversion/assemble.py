"""A starting checkpoint from public parts: an EVA-CLIP encoder, a Llama, and a newly initialised connector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints.stored import Box, Spec
from kangaroo_jax.config import stage_config
from kangaroo_jax.conversion.names import SPECIAL
from kangaroo_jax.conversion.sources import WeightSource, shapes_of
from kangaroo_jax.conversion.weights import Arrays, Grown, Joined, Weights, boxes
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError

POSITIONS = "vision/position_embedding"
VOCABULARY_MULTIPLE = 128  # of which a vocabulary with new rows is one, so that devices can share it
SPECIAL_NOISE = 0.1  # noise of new marks, as a share of the deviation of the token embedding's rows
FRESH = ("patchify/", "projector/", SPECIAL)  # parts that are initialised if no source has them


class Resized:
    """Weights with the vision encoder's position embedding resized to another grid; CLS keeps its row."""

    def __init__(self, weights: Weights, grid: int, target: int) -> None:
        """Resize from `grid` to `target` patches a side: bicubic, antialiased (`models.eva_clip.resize_matrix`)."""
        self._weights, self._grid, self._target = weights, grid, target
        spec = weights.specs[POSITIONS]
        self.specs: Mapping[str, Spec] = {**weights.specs, POSITIONS: Spec((1 + target**2, spec.shape[1]), spec.dtype)}

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        if path != POSITIONS:
            return self._weights.read(path, box)
        from kangaroo_jax.models.eva_clip import resize_matrix

        spec = self.specs[path]
        stored = self._weights.read(path, (slice(0, 1 + self._grid**2), slice(0, spec.shape[1])))
        resized = resize_matrix(self._grid, self._target) @ stored[1:].astype(np.float32)
        return np.concatenate([stored[:1], resized.astype(spec.dtype)])[box]


def combine(
    sources: Sequence[WeightSource],
    preset: str,
    overrides: Mapping[str, Any],
    seed: int,
    tokenizer: Path | None = None,
    *,
    parts_alone: bool = False,
) -> tuple[Weights, ConfigDict, list[str]]:
    """(weights, a stage's config, notes on what was initialised) of one source, or of several that form one model.

    The marks around a video have the ids that the decoder's `tokenizer` gives them, in rows of their own where it has
    no token to spare. With `parts_alone` a decoder may come alone: it gets a new encoder, that of the preset.

    Raises:
        UserError: two sources have the same part, or several sources lack the encoder or the decoder.
    """
    if len(sources) == 1 and not parts_alone:
        return sources[0].weights, sources[0].config, []
    config = ConfigDict(stage_config(preset).to_dict())
    config.stage = "assembled"
    parts: dict[str, WeightSource] = {}
    for source in sources:
        for part in sorted({path.split("/")[0] for path in source.weights.specs}):
            if part in parts:
                raise UserError(f"{source.path} and {parts[part].path} both have the part {part}; give one of them")
            parts[part] = source
    for part, flag in (("vision", "--vision"), ("llm", "--llm")):
        if part not in parts and not (parts_alone and part == "vision"):
            raise UserError(f"{', '.join(str(s.path) for s in sources)}: none has the part {part}; give it by {flag}")
    config.model.llm = parts["llm"].config.model.llm
    config.update_from_flattened_dict(dict(overrides))
    llm, notes = _with_marks(parts["llm"].weights, config.model, tokenizer)
    grid = stored = config.model.vision.pos_embed_grid
    if "vision" in parts:
        stored = parts["vision"].config.model.vision.pos_embed_grid
        encoder = parts["vision"].weights if stored == grid else Resized(parts["vision"].weights, stored, grid)
    else:
        encoder = fresh_encoder(config.model, seed)
        notes.append(f"a new encoder of {config.model.preset}, to be trained from the beginning")
    known = Joined(encoder, llm)
    shapes = shapes_of(config.model)
    fresh = {path: shape for path, shape in shapes.items() if path not in known.specs and path.startswith(FRESH)}
    weights = Joined(known, initialise(fresh, known, seed))
    for path, shape in shapes.items():
        if path not in weights.specs or weights.specs[path].shape != shape:
            found = weights.specs[path].shape if path in weights.specs else "nothing"
            raise UserError(f"{path}: the parts give {found}, the config wants {shape}; check --preset and --config")
    notes += [f"initialised: {', '.join(sorted(fresh))}"] if fresh else []
    if stored != grid:
        notes.append(f"position embedding resized from {stored} x {stored} to {grid} x {grid} patches (bicubic)")
    return weights, config, notes


def _with_marks(weights: Weights, model: ConfigDict, file: Path | None) -> tuple[Weights, list[str]]:
    """(a decoder's weights with rows for the marks around a video, notes), and sets the marks' ids in `model`."""
    if file is None:
        return weights, []
    tokenizer = load_tokenizer(file)
    ids = {mark: getattr(tokenizer, mark) for mark in model.special_ids}
    model.special_ids.update(ids)
    lacking = tokenizer.vocab_size - model.llm.vocab_size
    if lacking > len(ids):
        raise UserError(
            f"{file}: {tokenizer.vocab_size} tokens, but the decoder has {model.llm.vocab_size}; give its own tokenizer"
        )
    note = f"the marks around a video are tokens {', '.join(map(str, ids.values()))}"
    if lacking <= 0:
        return weights, [note]
    rows = lacking + -tokenizer.vocab_size % VOCABULARY_MULTIPLE
    model.llm.update(vocab_size=model.llm.vocab_size + rows, added_rows=rows)
    return Grown(weights, rows), [f"{note}, in {rows} new rows of the vocabulary (now {model.llm.vocab_size})"]


def fresh_encoder(model: ConfigDict, seed: int) -> Weights:
    """A new encoder of config.model, as training begins one. The same seed gives the same numbers."""
    from flax import nnx

    from kangaroo_jax.config import VisionConfig
    from kangaroo_jax.models.eva_clip import EvaClip
    from kangaroo_jax.models.parameters import Binding

    encoder = EvaClip(VisionConfig.from_config(model.vision), rngs=nnx.Rngs(seed))
    flat = Binding(encoder).flatten(encoder)
    return Arrays.holding({f"vision/{path}": np.asarray(array) for path, array in flat.items()})


def initialise(shapes: Mapping[str, tuple[int, ...]], known: Weights, seed: int) -> Arrays:
    """New weights for the parameters that no public part has.

    The patchify starts as average pooling, the projector as a fresh linear map (truncated normal of
    deviation 1 / sqrt(fan in), biases zero), each mark as the mean row of the token embedding plus noise of a
    tenth of the rows' deviation. The same seed gives the same numbers.
    """
    single = np.dtype(np.float32)
    makers: dict[str, Any] = {}
    for number, (path, shape) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng([seed, number])
        if path == SPECIAL:
            makers[path] = (
                Spec(shape, known.specs["llm/embedding"].dtype),
                lambda rng=rng, shape=shape: _marks(known, shape, rng),
            )
        elif path.endswith("bias"):
            makers[path] = Spec(shape, single), lambda shape=shape: np.zeros(shape)
        elif path == "patchify/kernel":
            makers[path] = Spec(shape, single), lambda shape=shape: np.full(shape, 1 / np.prod(shape[:-1]))
        else:
            makers[path] = Spec(shape, single), lambda rng=rng, shape=shape: _linear(shape, rng)
    return Arrays(makers)


def _linear(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A normal distribution cut at two deviations, as in `models.layers.truncated_normal`."""
    values = rng.standard_normal(shape)
    while (far := np.abs(values) > 2).any():
        values[far] = rng.standard_normal(int(far.sum()))
    return values * shape[0] ** -0.5 / 0.87962566103423978


def _marks(known: Weights, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    spec = known.specs["llm/embedding"]
    total, squares = np.zeros(shape[1]), 0.0
    for box in boxes(spec, "llm/embedding", 0):
        rows = known.read("llm/embedding", box).astype(np.float32)
        total += rows.sum(axis=0, dtype=np.float64)
        squares += float(np.square(rows).sum(dtype=np.float64))
    mean = total / spec.shape[0]
    deviation = np.sqrt(max(squares / (spec.shape[0] * shape[1]) - float(np.square(mean).mean()), 0.0))
    return mean + SPECIAL_NOISE * deviation * rng.standard_normal(shape)
