"""Fingerprints for near-duplicates: the 64-bit difference hash of each key frame, and of its mirror image.

The picture is shrunk to 9 x 8 grey pixels; a bit says whether a pixel is brighter than its left neighbour. Black
bars are cut off first. A frame with too little contrast has none: its bits would be noise.
"""

from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings
from kangaroo_jax.curation.stages.pictures import key_frames

_BAR = 20  # grey levels above the darkest up to which a row or column is a bar
_DARK = 64  # grey level above which the darkest is no bar
_WEIGHTS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def fingerprint(row: Row, settings: Settings, root: Path) -> Outcome:
    """`plain` and `mirrored`: 16 hexadecimal digits for each key frame, "" for a flat one."""
    plain, mirrored = [], []
    for picture in key_frames(row, root):
        grey = without_black_bars(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
        small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
        if small.std() < settings["min_contrast"]:
            plain.append("")
            mirrored.append("")
            continue
        plain.append(f"{difference_hash(small):016x}")
        mirrored.append(f"{difference_hash(small[:, ::-1]):016x}")
    return Outcome({"plain": plain, "mirrored": mirrored})


def difference_hash(small: np.ndarray) -> int:
    """The 64 bits of int16[8, 9]."""
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int(_WEIGHTS[bits].sum(dtype=np.uint64))


def without_black_bars(grey: np.ndarray) -> np.ndarray:
    """The picture without dark rows above and below and dark columns beside it; never less than half of either."""
    height, width = grey.shape
    # Three quarters of a row: a logo does not make it part of the picture.
    darkest = np.quantile(grey, 0.01)  # not 0 where the whole picture was made brighter
    if darkest > _DARK:
        return grey
    rows = np.flatnonzero(np.quantile(grey, 0.75, axis=1) > darkest + _BAR)
    columns = np.flatnonzero(np.quantile(grey, 0.75, axis=0) > darkest + _BAR)
    if rows.size and rows[-1] + 1 - rows[0] >= height / 2:
        grey = grey[rows[0] : rows[-1] + 1]
    if columns.size and columns[-1] + 1 - columns[0] >= width / 2:
        grey = grey[:, columns[0] : columns[-1] + 1]
    return grey
