"""Fingerprints for near-duplicates: the difference hash of each key frame, and of its mirror image.

The picture is shrunk to `grid` rows of `grid` + 1 grey pixels (8 rows: 64 bits); a bit says whether a pixel is
brighter than its left neighbour by more than `min_step`. Black bars are cut off first (`trim_bars`). A frame with too
little contrast has no hash: its bits would be noise.
"""

from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings
from kangaroo_jax.curation.stages.pictures import key_frames
from kangaroo_jax.errors import UserError

_BAR = 20  # a row or column is part of a bar up to so many grey levels above the darkest
_DARK = 64  # a picture whose darkest grey level is above this has no bars
_WEIGHTS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def fingerprint(row: Row, settings: Settings, root: Path) -> Outcome:
    """`plain` and `mirrored`: the hash of each key frame in hexadecimal, "" for a flat frame.

    Raises UserError: `grid` is not a multiple of 8.
    """
    grid, step = settings["grid"], settings["min_step"]
    if grid < 8 or grid % 8:
        raise UserError(f"config.fingerprint.grid must be 8, 16, 24, ...; it is {grid}")
    plain, mirrored = [], []
    for picture in key_frames(row, root):
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        grey = without_black_bars(grey) if settings["trim_bars"] else grey
        small = cv2.resize(grey, (grid + 1, grid), interpolation=cv2.INTER_AREA).astype(np.int16)
        if small.std() < settings["min_contrast"]:
            plain.append("")
            mirrored.append("")
            continue
        plain.append(difference_hash(small, step))
        mirrored.append(difference_hash(small[:, ::-1], step))
    return Outcome({"plain": plain, "mirrored": mirrored})


def difference_hash(small: np.ndarray, min_step: int = 0) -> str:
    """The difference hash of int16[grid, grid + 1], 16 hexadecimal digits for each 64 bits."""
    bits = (small[:, 1:] > small[:, :-1] + min_step).reshape(-1, 64)
    return "".join(f"{int(_WEIGHTS[word].sum(dtype=np.uint64)):016x}" for word in bits)


def without_black_bars(grey: np.ndarray) -> np.ndarray:
    """The picture without dark rows above and below and dark columns at the sides; at least half of each side stays."""
    height, width = grey.shape
    # Three quarters of a row must be dark, so that a bar with a logo is still a bar.
    darkest = quantiles(grey.reshape(1, -1), 0.01)[0]  # above 0 if the whole picture was brightened
    if darkest > _DARK:
        return grey
    rows = np.flatnonzero(quantiles(grey, 0.75) > darkest + _BAR)
    columns = np.flatnonzero(quantiles(np.ascontiguousarray(grey.T), 0.75) > darkest + _BAR)
    if rows.size and rows[-1] + 1 - rows[0] >= height / 2:
        grey = grey[rows[0] : rows[-1] + 1]
    if columns.size and columns[-1] + 1 - columns[0] >= width / 2:
        grey = grey[:, columns[0] : columns[-1] + 1]
    return grey


def quantiles(grey: np.ndarray, share: float) -> np.ndarray:
    """`np.quantile(grey, share, axis=1)` for uint8[n, m], as float64[n], at a fifth of the cost."""
    place = share * (grey.shape[1] - 1)
    low = int(place)
    high = min(low + 1, grey.shape[1] - 1)
    parts = np.partition(grey, (low, high), axis=1).astype(np.float64)
    return parts[:, low] + (parts[:, high] - parts[:, low]) * (place - low)
