"""The letters used everywhere, and the one batch format.

Letters, the same in annotations, einsum strings, logical axis names and docstrings:

    B  packs in a batch           D  model width
    T  tokens in a pack           N  query heads        K  key-value heads     H  head width
    F  frames in a pack           I  MLP width          L  layers              V  vocabulary
    P  patches of a frame (a grid of H_p x W_p)         S  side of a frame in pixels
    G  temporal groups in a pack (F / frames a group)   R  vision rows of a pack (G * tokens a group)
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

AnyArray = Any  # np.ndarray on the host, jax.Array on the device
if TYPE_CHECKING:
    from jax import Array as Array
else:
    Array = jax.Array | np.ndarray  # of signatures, which tests check: JAX takes NumPy's arrays in place of its own


@dataclasses.dataclass(frozen=True)
class Field:
    """What an array of the batch is: shape by letters, dtype, logical axes (`sharding.RULES`), value of padding."""

    letters: str
    dtype: str
    axes: tuple[str | None, ...]
    padding: int

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the letters have these sizes."""
        return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in self.letters.split())


def _array(letters: str, dtype: str, *, axes: tuple[str, ...] = ("batch",), padding: int = 0) -> Any:
    """A field of PackedBatch; `axes` are the logical axes of its first letters, the others stay whole."""
    whole = (None,) * (len(letters.split()) - len(axes))
    return dataclasses.field(metadata={"field": Field(letters, dtype, (*axes, *whole), padding)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Fixed-shape arrays between the loader and the step. Several samples share a row ("pack").

    Group g of a row holds frames g*k .. g*k+k-1, where k is the number of frames that the patchify
    joins (2), or 1 where it is bypassed. A video always begins at a multiple of k, so that a group
    never spans two videos. Vision row r = g * (tokens a group) + p, in raster order p of the group.
    """

    tokens: AnyArray = _array("B T", "int32")  # the placeholder id where a vision token stands
    segment_ids: AnyArray = _array("B T", "int32")  # 0 is padding, samples count from 1; attention never crosses
    positions: AnyArray = _array("B T", "int32")  # restart at 0 in each segment
    targets: AnyArray = _array("B T", "int32")  # the next token
    weights: AnyArray = _array("B T", "float32")  # what that target counts in the loss
    # RGB as decoded, padded square; by far the largest, and so cut by frames too.
    frames: AnyArray = _array("B F S S 3", "uint8", axes=("batch", "pack_frames"))
    frame_times: AnyArray = _array("B F", "float32")  # seconds; 0 for images and padding
    frame_groups: AnyArray = _array("B F", "int32")  # 1 + the group of the frame, 0 for padding
    vision_index: AnyArray = _array("B T", "int32", padding=-1)  # the vision row that stands here, -1 for text

    def replace(self, **changes: AnyArray) -> "PackedBatch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


FIELDS: dict[str, Field] = {field.name: field.metadata["field"] for field in dataclasses.fields(PackedBatch)}
