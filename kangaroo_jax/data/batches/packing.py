"""Several samples in one row: joint first-fit of tokens and frames, and the rows of a PackedBatch.

Recipes are packed; pixels are decoded after that. A worked example with T = 12, one frame a group and two vision
tokens (V) a frame; the first sample has one frame, the second none:

    tokens        b V V q a e b q a e . .
    segment_ids   1 1 1 1 1 1 2 2 2 2 0 0
    positions     0 1 2 3 4 5 0 1 2 3 0 0
    targets       V V q a e 0 q a e 0 0 0
    weights       0 0 0 1 1 0 0 1 1 0 0 0     (q the prompt, a e the answer and its end)
    vision_index -1 0 1-1-1-1-1-1-1-1-1-1
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.data.batches.sample import Recipe
from kangaroo_jax.data.media.video import Clip
from kangaroo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shape:
    """The fixed shape of a row: T tokens, F frames of side S, and how frames become vision tokens."""

    tokens: int
    frames: int
    image_size: int
    frames_per_group: int
    tokens_per_group: int


SampleIndex = tuple[int, int]  # the number of a sample's source, and the sample's number in it


@dataclasses.dataclass(frozen=True)
class PackItem:
    """A recipe and where it came from, from which it can be made again."""

    index: SampleIndex
    recipe: Recipe


class Packer:
    """Fills rows from a bounded number of waiting samples; the same samples give the same rows.

    Samples wait until they would fill `bins` rows (by tokens or by frames). Then a row is begun with the
    largest of them, as measured by the share of a row's tokens and of its frames that it takes, and the
    largest that still fit follow; the last two are the pair that fills the row best. The sample that has
    waited for `8 * bins` rows begins the next one, so that none waits without bound. Both budgets are
    respected, and no sample is cut. With `bins=0` every sample has a row of its own.
    """

    def __init__(self, tokens: int, frames: int, bins: int) -> None:
        """`tokens` and `frames` that a row holds; `bins` rows' worth of samples wait."""
        self._limits = np.array([tokens, frames], np.int64)
        self._shares = 1.0 / np.maximum(self._limits, 1)
        self._bins = bins
        self._waiting: list[PackItem] = []
        self._since: list[int] = []  # how many rows had been filled when each began to wait
        self._needs = np.zeros((64, 2), np.int64)  # tokens and frames of the waiting samples, in order
        self._totals = np.zeros(2, np.int64)
        self._rows = 0

    def add(self, item: PackItem) -> list[PackItem] | None:
        """Let a sample wait; returns a row if enough samples wait to fill one.

        Raises:
            UserError: the sample alone is larger than a row.
        """
        need = len(item.recipe.tokens), item.recipe.frames
        if need[0] > self._limits[0] or need[1] > self._limits[1]:
            raise UserError(
                f"sample {item.recipe.id!r}: {need[0]} tokens and {need[1]} frames, "
                f"but a row holds {self._limits[0]} and {self._limits[1]}"
            )
        if self._bins == 0:
            return [item]
        self._append(item, self._rows)
        return self._fill() if self.full else None

    @property
    def full(self) -> bool:
        """Whether enough samples wait for a row to be filled."""
        return bool((self._totals >= self._bins * self._limits)[self._limits > 0].any())

    def _append(self, item: PackItem, since: int) -> None:
        n = len(self._waiting)
        if n == len(self._needs):
            self._needs = np.concatenate([self._needs, np.zeros_like(self._needs)])
        self._needs[n] = len(item.recipe.tokens), item.recipe.frames
        self._totals += self._needs[n]
        self._waiting.append(item)
        self._since.append(since)

    def _fill(self) -> list[PackItem]:
        """Take out a row's samples."""
        needs = self._needs[: len(self._waiting)]
        sizes = (needs * self._shares).sum(1)
        late = self._rows - self._since[0] >= 8 * self._bins
        chosen = fill_row(needs, sizes, self._limits, 0 if late else int(sizes.argmax()))
        row = [self._waiting[i] for i in sorted(chosen)]
        keep = np.ones(len(self._waiting), bool)
        keep[chosen] = False
        self._totals -= needs[~keep].sum(0)
        self._needs[: keep.sum()] = needs[keep]
        kept = np.flatnonzero(keep).tolist()
        self._waiting, self._since = [self._waiting[i] for i in kept], [self._since[i] for i in kept]
        self._rows += 1
        return row

    def state(self) -> list[list[int]]:
        """For each waiting sample, in order: the rows it has waited for, its source, and its number in the source."""
        return [[self._rows - since, *item.index] for since, item in zip(self._since, self._waiting, strict=True)]

    def restore(self, waiting: Sequence[tuple[int, PackItem]]) -> None:
        """Replace the waiting samples by those of a saved `state`, with their recipes made again."""
        self._waiting, self._since, self._rows = [], [], 0
        self._totals[:] = 0
        for waited, item in waiting:
            self._append(item, -waited)


def fill_row(needs: np.ndarray, sizes: np.ndarray, limits: np.ndarray, first: int) -> list[int]:
    """Which samples share a row with sample `first`.

    Args:
        needs: int64[n, 2], tokens and frames of each sample.
        sizes: float64[n], the share of a row that each takes, tokens' and frames' added.
        limits: int64[2], what a row holds.
        first: the sample that begins the row.

    Returns:
        Their indices, with `first`; the sum of their needs is within `limits`.
    """
    order = np.argsort(-sizes, kind="stable").tolist()
    order.remove(first)
    tokens, frames = needs[:, 0].tolist(), needs[:, 1].tolist()
    chosen = [first]
    room = [int(limits[0]) - tokens[first], int(limits[1]) - frames[first]]

    def take(i: int) -> None:
        chosen.append(i)
        order.remove(i)
        room[0] -= tokens[i]
        room[1] -= frames[i]

    while True:
        order = [i for i in order if tokens[i] <= room[0] and frames[i] <= room[1]]
        if not order:
            return chosen
        a = order[0]
        if _REACH * tokens[a] <= room[0] and _REACH * frames[a] <= room[1]:
            take(a)
            continue
        pair = _best_pair(order, needs, sizes, room)
        rest = [room[0] - sum(tokens[i] for i in pair), room[1] - sum(frames[i] for i in pair)]
        full = any(rest[k] < _FULL * limits[k] for k in (0, 1))
        for i in pair if full or len(pair) == 1 else [a]:
            take(i)


def _best_pair(order: list[int], needs: np.ndarray, sizes: np.ndarray, room: list[int]) -> list[int]:
    """One or two of the samples `order` (all of which fit alone) that fill the room best."""
    half = _PAIRED // 2
    some = np.array(order if len(order) <= _PAIRED else order[:half] + order[-half:])
    tokens, frames, size = needs[some, 0], needs[some, 1], sizes[some]
    fits = (np.add.outer(tokens, tokens) <= room[0]) & (np.add.outer(frames, frames) <= room[1])
    total = np.where(fits, np.add.outer(size, size), -1.0)
    np.fill_diagonal(total, size)
    a, b = divmod(int(total.argmax()), len(some))
    return [int(some[a])] if a == b else [int(some[a]), int(some[b])]


_PAIRED = 40  # samples among which the last pair of a row is sought
_REACH = 4  # a row with room for more than so many of the largest sample takes it without a search
_FULL = 0.02  # a row counts as full if this share of its tokens or frames is left


# ---------------------------------------------------------------------------- rows to arrays


def empty_batch(rows: int, shape: Shape) -> PackedBatch:
    """A batch of padding: B = `rows`."""
    sizes = {"B": rows, "T": shape.tokens, "F": shape.frames, "S": shape.image_size}
    arrays = {name: np.zeros(field.shape(sizes), field.dtype) for name, field in FIELDS.items()}
    for name, array in arrays.items():
        if FIELDS[name].padding:  # zeros alone cost no memory until they are written
            array.fill(FIELDS[name].padding)
    return PackedBatch(**arrays)


def first_frames(row: Sequence[Recipe]) -> list[int]:
    """The frame of the row with which each of its samples begins."""
    return [0, *itertools.accumulate(recipe.frames for recipe in row)][: len(row)]


def write_sample(
    batch: PackedBatch,
    row: int,
    segment: int,
    first_token: int,
    first_frame: int,
    recipe: Recipe,
    clips: Sequence[Clip],
    shape: Shape,
) -> None:
    """Write one sample into a row, in place.

    Raises:
        UserError: frames decoded, frames promised and vision rows referenced are not the same number, or
            the sample begins inside a group of frames; the message names the sample.
    """
    decoded = sum(len(clip.times) - int(np.isnan(clip.times).sum()) for clip in clips)
    groups, odd = divmod(recipe.frames, shape.frames_per_group)
    referenced = int(recipe.is_vision.sum())
    if decoded != recipe.frames or odd or referenced != groups * shape.tokens_per_group:
        raise UserError(
            f"sample {recipe.id!r}: {decoded} frames decoded, {recipe.frames} promised, {referenced} vision tokens "
            f"for groups of {shape.frames_per_group} frames and {shape.tokens_per_group} tokens"
        )
    first_group, odd = divmod(first_frame, shape.frames_per_group)
    if odd:
        raise UserError(f"sample {recipe.id!r}: its frames begin at {first_frame}, inside a group")
    n = len(recipe.tokens)
    at = slice(first_token, first_token + n)
    batch.tokens[row, at] = recipe.tokens
    batch.segment_ids[row, at] = segment
    batch.positions[row, at] = np.arange(n)
    batch.targets[row, at][:-1] = recipe.tokens[1:]
    batch.weights[row, at][:-1] = recipe.weights[1:]
    first_row = first_group * shape.tokens_per_group
    batch.vision_index[row, at][recipe.is_vision] = np.arange(first_row, first_row + referenced)
    frame = first_frame
    for clip in clips:
        end = frame + len(clip.times)
        if clip.moments is None:
            batch.frames[row, frame:end] = clip.pixels
        else:
            batch.frames[row, frame + np.array(clip.moments, np.int64)] = clip.pixels
        batch.frame_times[row, frame:end] = clip.times
        frame = end
    batch.frame_groups[row, first_frame:frame] = 1 + np.arange(first_frame, frame) // shape.frames_per_group


def assemble(
    rows: Sequence[Sequence[Recipe]], clips: Sequence[Sequence[Sequence[Clip] | None]], shape: Shape
) -> PackedBatch:
    """Rows of recipes and their decoded clips to arrays; frames whose pixels other hosts have stay black.

    Args:
        rows: the samples of each row, in order.
        clips: clips[b][i] are those of sample i of row b; None blanks the sample: its positions stay padding
            (segment 0, weight 0, no frames), and its neighbours do not move.

    Raises:
        UserError: see `write_sample`.
    """
    batch = empty_batch(len(rows), shape)
    for b, row in enumerate(rows):
        token = frame = 0
        for i, recipe in enumerate(row):
            decoded = clips[b][i]
            if decoded is not None:
                write_sample(batch, b, i + 1, token, frame, recipe, decoded, shape)
            token += len(recipe.tokens)
            frame += recipe.frames
    return batch
