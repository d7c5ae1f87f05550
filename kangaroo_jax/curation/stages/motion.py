"""Motion: optical flow between frames a fifth of a second apart, in percent of the picture's diagonal.

The median over the pairs, because the mean is fooled by a cut between two still pictures; pairs across a known
cut are not looked at. Of the diagonal, because flow in pixels grows with the size of the picture.
"""

import math
from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import frames_at


def motion(row: Row, settings: Settings, root: Path) -> Outcome:
    """`score` (median of the mean length of the flow), `pairs` (each), `moving` (share of pixels over one pixel)."""
    times = pair_times(row["end"] - row["start"], row["probe"]["fps"], settings)
    width, height = row["probe"]["width"], row["probe"]["height"]
    side = math.ceil(settings["short_side"] * max(width, height) / min(width, height))
    pictures, seen = frames_at(row, times.ravel(), side)
    cuts = [time - row["start"] for time in row["cuts"]["times"]]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths, moving = [], []
    for k in range(len(times)):
        if any(times[k, 0] < cut <= times[k, 1] + 1e-3 for cut in cuts) and len(times) > 1:
            continue
        one, two = (cv2.cvtColor(pictures[2 * k + i], cv2.COLOR_RGB2GRAY) for i in (0, 1))
        length = np.linalg.norm(flow.calc(one, two, None), axis=2)
        lengths.append(100 * float(length.mean()) / math.hypot(*one.shape))
        moving.append(float((length > 1).mean()))
    scores = {
        "score": rounded(np.median(lengths)) if lengths else None,
        "pairs": [rounded(x) for x in lengths],
        "moving": rounded(np.median(moving)) if moving else None,
    }
    return Outcome(scores)


def pair_times(seconds: float, fps: float, settings: Settings) -> np.ndarray:
    """Seconds of the pairs, float64[pairs, 2], ascending; fewer where the clip has no room for all."""
    gap = min(settings["gap_seconds"], seconds / 2)
    last = max(0.0, seconds - gap - 1.5 / max(fps, 1.0))  # the last frame's own time is before the end
    pairs = max(1, min(settings["pairs"], int(last / gap))) if gap > 0 else 1
    first = (np.arange(pairs) + 0.5) * last / pairs
    return np.stack([first, first + gap], axis=1)
