"""The letters used everywhere, and the one batch format.

Letters, the same in annotations, einsum strings, logical axis names and docstrings:

    B  packs in a batch           D  model width
    T  tokens in a pack           N  query heads        K  key-value heads     H  head width
    F  frames in a pack           I  MLP width          L  layers              V  vocabulary
    P  patches of a frame (a grid of H_p x W_p)         S  side of a frame in pixels
    G  temporal groups in a pack (F / frames a group)   R  vision rows of a pack (G * tokens a group)
"""

import dataclasses
from typing import Any

import jax

Array = Any  # np.ndarray on the host, jax.Array on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Fixed-shape arrays between the loader and the step. Several samples share a row ("pack").

    Group g of a row holds frames g*k .. g*k+k-1, where k is the number of frames that the patchify
    joins (2), or 1 where it is bypassed. A video always begins at a multiple of k, so that a group
    never spans two videos. Vision row r = g * (tokens a group) + p, in raster order p of the group.
    """

    tokens: Array  # int32[B, T]; the placeholder id where a vision token stands
    segment_ids: Array  # int32[B, T]; 0 is padding, samples count from 1; attention never crosses
    positions: Array  # int32[B, T]; restart at 0 in each segment
    targets: Array  # int32[B, T]; the next token
    weights: Array  # float32[B, T]; what that target counts in the loss
    frames: Array  # uint8[B, F, S, S, 3]; RGB as decoded, padded square
    frame_times: Array  # float32[B, F]; seconds; 0 for images and padding
    frame_groups: Array  # int32[B, F]; 1 + the group of the frame, 0 for padding
    vision_index: Array  # int32[B, T]; the vision row that stands here, -1 for text

    def replace(self, **changes: Array) -> "PackedBatch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


FIELDS = tuple(field.name for field in dataclasses.fields(PackedBatch))
