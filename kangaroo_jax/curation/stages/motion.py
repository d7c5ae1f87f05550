"""Motion: optical flow between frames a fifth of a second apart, in percent of the picture's diagonal.

The score is the median (or another quantile) over the pairs, because a cut between two still pictures distorts the
mean; pairs across a known cut are left out. It is relative to the diagonal, because flow in pixels grows with the size
of the picture.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import after_key, greys_at, places, times_within

_AFTER_KEY = 0.04  # seconds after a key frame, so that a pair is not across a cut there


def motion(row: Row, settings: Settings, root: Path) -> Outcome:
    """`score` (`quantile` over the pairs of the mean length of the flow), `pairs` (each), `moving` (share of pixels
    that move by more than one).
    """
    seconds, probed = row["end"] - row["start"], row["probe"]
    interval = probed["seconds"] / max(1, probed["frames"])
    times = pair_times(seconds, interval, times_within(row, probed.get("keys", [])), settings)
    greys = greys_at(row, times.ravel(), settings["short_side"])
    cuts = times_within(row, row["cuts"]["times"])
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths, moving = [], []
    for k in range(len(times)):
        if any(times[k, 0] < cut <= times[k, 1] + 1e-3 for cut in cuts) and len(times) > 1:
            continue
        one, two = greys[2 * k : 2 * k + 2]
        length = np.linalg.norm(flow.calc(one, two, np.empty(0, np.float32)), axis=2)
        lengths.append(100 * float(length.mean()) / math.hypot(*one.shape))
        moving.append(float((length > 1).mean()))
    scores = {
        "score": rounded(np.quantile(lengths, settings["quantile"])) if lengths else None,
        "pairs": [rounded(x) for x in lengths],
        "moving": rounded(np.median(moving)) if moving else None,
    }
    return Outcome(scores)


def pair_times(seconds: float, interval: float, keys: Sequence[float], settings: Settings) -> np.ndarray:
    """The times of the pairs in seconds, float64[pairs, 2], ascending: `pairs` consecutive ones at each of `places`.

    A clip too short for that gets evenly spaced single pairs, fewer if necessary; each begins after a key frame if one
    is near. In a clip with a lower frame rate than `gap_seconds` implies, pairs are adjacent frames.
    """
    count, in_row = settings["places"], settings["pairs"]
    gap = min(max(settings["gap_seconds"], 1.05 * interval), seconds / 2)
    if gap * in_row <= seconds / count / 2:
        first = places(seconds, count, gap * in_row, keys)[:, None] + gap * np.arange(in_row)
        return np.stack([first, first + gap], axis=-1).reshape(-1, 2).round(6)
    last = max(0.0, seconds - gap - 1.5 * interval)  # the last frame's own time is before the end
    pairs = max(1, min(count * in_row, int(last / gap)))
    room = last / pairs
    starts = (np.arange(pairs) + 0.5) * room
    starts = np.array([after_key(middle, keys, _AFTER_KEY, room / 2 - gap / 2) for middle in starts.tolist()])
    return np.stack([starts, starts + gap], axis=1)
