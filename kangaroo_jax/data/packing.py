"""Several samples in one row: joint first-fit of tokens and frames, and the rows of a PackedBatch.

Recipes are packed; pixels are decoded after that. A worked example, T = 12, one frame a group, two vision
tokens a frame (V), two samples of one frame and of none:

    tokens        b V V q a e b q a e . .
    segment_ids   1 1 1 1 1 1 2 2 2 2 0 0
    positions     0 1 2 3 4 5 0 1 2 3 0 0
    targets       V V q a e 0 q a e 0 0 0
    weights       0 0 0 1 1 0 0 1 1 0 0 0     (q the prompt, a e the answer and its end)
    vision_index -1 0 1-1-1-1-1-1-1-1-1-1
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kangaroo_jax.conventions import PackedBatch, UserError
from kangaroo_jax.data.sample import Recipe
from kangaroo_jax.data.video import Clip


@dataclasses.dataclass(frozen=True)
class Shape:
    """The fixed shape of a row: T tokens, F frames of side S, and how frames become vision tokens."""

    tokens: int
    frames: int
    image_size: int
    frames_per_group: int
    tokens_per_group: int


@dataclasses.dataclass(frozen=True)
class Placed:
    """A recipe and its place in the stream of samples, from which it can be made again."""

    place: int
    recipe: Recipe


class Packer:
    """First-fit with a bounded number of open rows; the same samples give the same rows.

    A sample goes into the oldest open row that has room for its tokens and its frames. Where none has, it
    opens a new row; with `bins` rows open already, the fullest of them (by tokens or frames, whichever is
    fuller) is closed first. A row that has seen `8 * bins` others close is closed before them, so that no
    sample waits without bound. With `bins=0` every sample has a row of its own.
    """

    def __init__(self, tokens: int, frames: int, bins: int) -> None:
        """`tokens` and `frames` that a row holds; `bins` rows open at a time."""
        self._tokens, self._frames, self._bins = tokens, frames, bins
        self._open: list[_Bin] = []

    def add(self, item: Placed) -> list[Placed] | None:
        """Place a sample; the row that was closed to make room for it, if one was.

        Raises:
            UserError: the sample alone is larger than a row.
        """
        need = len(item.recipe.tokens), item.recipe.frames
        if need[0] > self._tokens or need[1] > self._frames:
            raise UserError(
                f"sample {item.recipe.id!r}: {need[0]} tokens and {need[1]} frames, "
                f"but a row holds {self._tokens} and {self._frames}"
            )
        if self._bins == 0:
            return [item]
        for row in self._open:
            if row.tokens + need[0] <= self._tokens and row.frames + need[1] <= self._frames:
                row.add(item)
                return None
        closed = None
        if len(self._open) == self._bins:
            closed = self._close()
        row = _Bin()
        row.add(item)
        self._open.append(row)
        return closed

    def _close(self) -> list[Placed]:
        """Take out the fullest row, the oldest of equals, or the oldest of all if it has waited too long."""
        fullest = max(self._open, key=self._fullness)
        if self._open[0].waited >= 8 * self._bins:
            fullest = self._open[0]
        self._open.remove(fullest)
        for row in self._open:
            row.waited += 1
        return fullest.items

    def _fullness(self, row: "_Bin") -> float:
        return max(row.tokens / self._tokens, row.frames / self._frames if self._frames else 0.0)

    def state(self) -> list[list[int]]:
        """The open rows, oldest first: how long each has waited, then its samples' places."""
        return [[row.waited, *(item.place for item in row.items)] for row in self._open]

    def restore(self, rows: Sequence[tuple[int, Sequence[Placed]]]) -> None:
        """Open rows as `state` gave them, with the samples made again."""
        self._open = []
        for waited, items in rows:
            row = _Bin(waited)
            for item in items:
                row.add(item)
            self._open.append(row)


class _Bin:
    """An open row."""

    def __init__(self, waited: int = 0) -> None:
        self.items: list[Placed] = []
        self.tokens = self.frames = 0
        self.waited = waited  # rows closed since this one was opened

    def add(self, item: Placed) -> None:
        self.items.append(item)
        self.tokens += len(item.recipe.tokens)
        self.frames += item.recipe.frames


# ---------------------------------------------------------------------------- rows to arrays


def empty_batch(rows: int, shape: Shape) -> PackedBatch:
    """A batch of padding: B = `rows`."""
    side = shape.image_size
    return PackedBatch(
        tokens=np.zeros((rows, shape.tokens), np.int32),
        segment_ids=np.zeros((rows, shape.tokens), np.int32),
        positions=np.zeros((rows, shape.tokens), np.int32),
        targets=np.zeros((rows, shape.tokens), np.int32),
        weights=np.zeros((rows, shape.tokens), np.float32),
        frames=np.zeros((rows, shape.frames, side, side, 3), np.uint8),
        frame_times=np.zeros((rows, shape.frames), np.float32),
        frame_groups=np.zeros((rows, shape.frames), np.int32),
        vision_index=np.full((rows, shape.tokens), -1, np.int32),
    )


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
    decoded = sum(len(clip.pixels) for clip in clips)
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
        end = frame + len(clip.pixels)
        batch.frames[row, frame:end] = clip.pixels
        batch.frame_times[row, frame:end] = clip.times
        frame = end
    batch.frame_groups[row, first_frame:frame] = 1 + np.arange(first_frame, frame) // shape.frames_per_group


def assemble(
    rows: Sequence[Sequence[Recipe]], clips: Sequence[Sequence[Sequence[Clip] | None]], shape: Shape
) -> PackedBatch:
    """Rows of recipes and their decoded clips to arrays.

    Args:
        rows: the samples of each row, in order.
        clips: clips[b][i] are those of sample i of row b; None blanks the sample: its places stay padding
            (segment 0, weight 0, no frames), and nothing of its neighbours moves.

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
