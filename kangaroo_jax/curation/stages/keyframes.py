"""Key frames: one of each of five equal parts of a clip, the sharpest near its middle, none at a cut."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import frames_at
from kangaroo_jax.errors import UserError

_SHARP_SIDE = 256  # pixels; sharpness is compared at this size


def keyframes(row: Row, settings: Settings, root: Path) -> Outcome:
    """JPEG files, with seconds from the clip's start and the variance of the Laplacian of each."""
    if row["kind"] == "image":
        wanted = np.zeros((1, 1))
    else:
        wanted = candidate_times(row["end"] - row["start"], _cuts(row), settings)
    pictures, seen = frames_at(row, wanted.ravel(), settings["side"])
    sharp = np.array([sharpness(picture) for picture in pictures]).reshape(wanted.shape)
    best = sharp.argmax(1)
    chosen = [k * wanted.shape[1] + int(i) for k, i in enumerate(best)]
    files = tuple(_jpeg(pictures[i], settings["quality"]) for i in chosen)
    scores = {
        "times": [rounded(seen[i], 3) for i in chosen],
        "sharpness": [rounded(sharp.ravel()[i], 1) for i in chosen],
        "digest": hashlib.sha256(b"".join(files)).hexdigest()[:16],
    }
    return Outcome(scores, files=files)


def _cuts(row: Row) -> list[float]:
    return [time - row["start"] for time in row["cuts"]["times"] if row["start"] < time < row["end"]]


def candidate_times(seconds: float, cuts: Sequence[float], settings: Settings) -> np.ndarray:
    """Seconds to look at, float64[count, candidates], ascending in rows and from row to row.

    Candidates lie around the middle of each part, within a quarter of it; one nearer to a cut than the margin is
    replaced by the nearest of its part that is not.
    """
    count, candidates = settings["count"], settings["candidates"]
    part = seconds / count
    reach = min(settings["reach_seconds"], part / 4)
    offsets = np.linspace(-reach, reach, candidates) if candidates > 1 else np.zeros(1)
    times = (np.arange(count)[:, None] + 0.5) * part + offsets
    margin = min(settings["cut_margin_seconds"], part / 4)
    for k in range(count):
        grid = np.linspace(k * part, (k + 1) * part, 41)[1:-1]
        clear = np.array([all(abs(t - cut) >= margin for cut in cuts) for t in grid])
        for i, time in enumerate(times[k]):
            if clear.any() and any(abs(time - cut) < margin for cut in cuts):
                times[k, i] = grid[clear][np.abs(grid[clear] - time).argmin()]
        times[k].sort()
    return times


def sharpness(picture: np.ndarray) -> float:
    """Variance of the Laplacian of the luma, at one size for all."""
    scale = _SHARP_SIDE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    grey = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def _jpeg(picture: np.ndarray, quality: int) -> bytes:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise UserError("OpenCV cannot write JPEG here; see kangaroo curate doctor")
    return data.tobytes()
