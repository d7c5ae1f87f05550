"""Key frames: one of each of five equal parts of a clip, the sharpest near its middle, none at a cut."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import frames_at, times_within
from kangaroo_jax.errors import UserError

_SHARP_SIDE = 256  # pixels; sharpness is compared at this size


def keyframes(row: Row, settings: Settings, root: Path) -> Outcome:
    """JPEG files, with seconds from the clip's start and the variance of the Laplacian of each."""
    if row["kind"] == "image":
        wanted = np.zeros((1, 1))
    else:
        cuts, keys = times_within(row, row["cuts"]["times"]), times_within(row, row["probe"].get("keys", []))
        wanted = candidate_times(row["end"] - row["start"], cuts, keys, settings)
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


def candidate_times(seconds: float, cuts: Sequence[float], keys: Sequence[float], settings: Settings) -> np.ndarray:
    """Seconds to look at, float64[count, candidates], ascending in rows and from row to row.

    Candidates lie around the middle of each part of the clip; or after the frame nearest to it, within a quarter of
    the part, from which decoding can begin. One nearer to a cut than the margin is replaced by the nearest time of its
    part that is not.
    """
    count = settings["count"]
    part = seconds / count
    reach, margin = (min(settings[key], part / 4) for key in ("reach_seconds", "cut_margin_seconds"))
    offsets = np.linspace(0.0, reach, settings["candidates"])
    times = np.empty((count, settings["candidates"]))
    for k in range(count):
        middle = (k + 0.5) * part - reach / 2
        near = [key + margin for key in keys if abs(key + margin - middle) <= part / 4]
        times[k] = min(near, key=lambda time: abs(time - middle), default=middle) + offsets  # noqa: B023
        grid = np.linspace(k * part, (k + 1) * part, 41)[1:-1]
        clear = grid[[all(abs(time - cut) >= margin for cut in cuts) for time in grid]]
        for i, time in enumerate(times[k]):
            if clear.size and any(abs(time - cut) < margin * 0.99 for cut in cuts):
                times[k, i] = clear[np.abs(clear - time).argmin()]
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
