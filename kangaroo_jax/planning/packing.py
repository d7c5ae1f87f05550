"""What packing leaves of a stage's rows: made-up samples, packed with the real packer."""

import dataclasses
import random

import numpy as np

from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.batches.packing import Packer, PackItem
from kangaroo_jax.models.attention_splash import block_sizes

TEXT_TOKENS = (32, 512)  # assumed tokens of a sample's text (question and answer), uniform, cut to the room left
SAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Packed:
    """Shares of a row, and how many samples it has."""

    useful: float  # of its tokens, that are a sample's
    pairs: float  # of its causal pairs of tokens, that are of one sample
    visited: float  # of its causal blocks of attention, that hold such a pair: the kernels visit no others
    samples: float = 1.0  # in a row


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """The attributes of a recipe that the packer reads."""

    id: str
    tokens: range
    frames: int


def packed(config: StageConfig, context: int = 1) -> Packed:
    """The shares of a stage's rows, each of which lies on `context` devices.

    Frames are uniform in the stage's ranges (half of the samples are long ones), text is uniform in TEXT_TOKENS.
    """
    rows, length = _rows(config), config.data.tokens_per_pack
    if not rows:
        return Packed(0.0, 0.0, 0.0, 0.0)
    useful = sum(map(sum, rows)) / (len(rows) * length)
    pairs = sum(size * (size + 1) / 2 for row in rows for size in row) / (len(rows) * length * (length + 1) / 2)
    padded = -(-length // (128 * context)) * 128 * context
    sizes = block_sizes(padded // context, padded, True, True)
    visited = [_visited(row, padded, sizes.block_q, sizes.block_kv) for row in rows]
    samples = sum(map(len, rows)) / len(rows)
    return Packed(round(useful, 3), round(pairs, 4), round(float(np.mean(visited)), 4), round(samples, 2))


def _visited(row: list[int], length: int, queries: int, keys: int) -> float:
    """The share of a row's causal blocks between the first query's segment and the last query."""
    ends = np.cumsum([*row, length - sum(row)])
    first = np.arange(0, length, queries)
    last = (first + queries - 1) // keys
    begins = np.concatenate([[0], ends])[np.searchsorted(ends, first, side="right")]
    return float(np.sum(last - begins // keys + 1) / np.sum(last + 1))


def _rows(config: StageConfig) -> list[list[int]]:
    """Tokens of the samples of each packed row."""
    data, random_ = config.data, random.Random(0)
    group, tokens = frames_per_group(config.model), tokens_per_group(config.model, data.image_size)
    packer = Packer(data.tokens_per_pack, data.frames_per_pack, data.packing_bins)
    rows = []
    for index in range(SAMPLES):
        low, high = (data.min_frames, data.max_frames)
        if index % 2:
            low, high = (data.long_min_frames, data.long_max_frames)
        frames = min(random_.randint(low, high) // group * group or group, data.frames_per_pack)
        vision = frames // group * (tokens + 1) + 2 if frames else 0
        left = min(data.max_sample_tokens, data.tokens_per_pack) - vision
        text = random_.randint(min(TEXT_TOKENS[0], left), max(1, min(TEXT_TOKENS[1], left)))
        closed = packer.add(PackItem((0, index), _Lengths(f"sample {index}", range(vision + text), frames)))  # type: ignore[arg-type]
        if closed is not None:
            rows.append([len(item.recipe.tokens) for item in closed])
    return rows
