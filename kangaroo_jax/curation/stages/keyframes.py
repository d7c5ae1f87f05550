"""Key frames: the sharpest frame near the middle of each of five equal parts of a clip, away from cuts."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kangaroo_jax.curation.stages.base import Outcome, Row, Settings, rounded
from kangaroo_jax.curation.stages.pictures import Picture, pictures_at, places, remember_greys, times_within
from kangaroo_jax.errors import UserError


def keyframes(row: Row, settings: Settings, root: Path) -> Outcome:
    """JPEG files, each with its seconds from the clip's start and its variance of the Laplacian."""
    if row["kind"] == "image":
        wanted = np.zeros((1, 1))
    else:
        cuts, keys = times_within(row, row["cuts"]["times"]), times_within(row, row["probe"].get("keys", []))
        wanted = candidate_times(row["end"] - row["start"], cuts, keys, settings)
    pictures = pictures_at(row, wanted.ravel(), settings["side"])
    greys: dict[float, np.ndarray] = {}
    files, seen, sharp = list[bytes](), list[float](), list[float]()
    for times in wanted.tolist():
        picture, sharpest = _sharpest([(time, next(pictures)) for time in times], settings["sharp_side"], greys)
        files.append(_jpeg(picture.colour(settings["side"]), settings["quality"]))
        seen.append(rounded(picture.time, 3))
        sharp.append(rounded(sharpest, 1))
    pictures.close()
    remember_greys(row, settings["sharp_side"], greys)
    digest = hashlib.sha256(b"".join(files)).hexdigest()[:16]
    return Outcome({"times": seen, "sharpness": sharp, "digest": digest}, files=tuple(files))


def _sharpest(
    candidates: Sequence[tuple[float, Picture]], short_side: int, greys: dict[float, np.ndarray]
) -> tuple[Picture, float]:
    """The sharpest picture and its sharpness; the luma of each candidate is added to `greys` by its requested time."""
    best, most = candidates[0][1], -1.0
    for time, picture in candidates:
        greys[time] = picture.grey(short_side)
        if (sharp := sharpness(greys[time])) > most:
            best, most = picture, sharp
    return best, most


def candidate_times(seconds: float, cuts: Sequence[float], keys: Sequence[float], settings: Settings) -> np.ndarray:
    """The candidate times in seconds, float64[count, candidates], ascending within and across rows.

    Candidates begin at `places`. A candidate within the margin of a cut is replaced by the nearest time in its part
    outside of it.
    """
    count = settings["count"]
    part = seconds / count
    reach, margin = min(settings["reach_seconds"], part / 2), min(settings["cut_margin_seconds"], part / 4)
    offsets = np.linspace(0.0, reach, settings["candidates"])
    times = places(seconds, count, reach, keys)[:, None] + offsets
    for k in range(count):
        grid = np.linspace(k * part, (k + 1) * part, 41)[1:-1]
        clear = grid[[all(abs(time - cut) >= margin for cut in cuts) for time in grid]]
        for i, time in enumerate(times[k]):
            if clear.size and any(abs(time - cut) < margin * 0.99 for cut in cuts):
                times[k, i] = clear[np.abs(clear - time).argmin()]
        times[k].sort()
    return times.round(6)


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of luma, uint8[height, width]; comparable between pictures of one size."""
    return float(cv2.Laplacian(grey, cv2.CV_16S).var())


def _jpeg(picture: np.ndarray, quality: int) -> bytes:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise UserError("OpenCV cannot write JPEG here; see kangaroo curate doctor")
    return data.tobytes()
