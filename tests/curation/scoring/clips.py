"""Clips for the tests, made on the spot, and stages that break on purpose."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kangaroo_jax.curation.stages import run_stage
from kangaroo_jax.data.media.writing import write_h264


def scene(seed: int, width: int = 240, height: int = 180) -> np.ndarray:
    """A picture like no other: coloured shapes on coloured clouds, uint8[height, width, 3]."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)
    picture = cv2.resize(ground, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(14):
        corner = rng.integers(0, (width, height))
        size = rng.integers(10, 60, 2)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        cv2.rectangle(picture, corner.tolist(), (corner + size).tolist(), colour, -1)
    return picture


def write_clip(path: Path, pictures: list[np.ndarray], rate: int = 8, **options: Any) -> Path:
    """An H.264 video of RGB pictures."""
    return write_h264(path, pictures, rate, {"crf": "23", "preset": "ultrafast", **options})


def moving(seed: int, frames: int = 20, step: int = 3, **size: int) -> list[np.ndarray]:
    """A scene that a camera pans over."""
    picture = scene(seed, **size)
    return [np.roll(picture, step * i, axis=1) for i in range(frames)]


def breaking_job(name: str, row: dict[str, Any], settings: Any, root: str) -> Any:
    """What a process runs, but that it dies, hangs or takes all memory at files so named: real faults of it."""
    kind = Path(row["path"]).stem.partition("_")[0]
    if name == "cuts" and kind == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "cuts" and kind == "hang":
        time.sleep(3600)
    if name == "cuts" and kind == "eats":
        return np.ones(10 << 27).sum()  # 10 GiB
    return run_stage(name, row, settings, root)


def breaking_batch_job(name: str, row: Any, settings: Any, root: str) -> Any:
    """Dies at the embedding of files so named, in whatever batch they are."""
    rows = row if isinstance(row, list) else [row]
    if name == "embedding" and any(Path(one["path"]).stem.startswith("segv") for one in rows):
        os.kill(os.getpid(), signal.SIGSEGV)
    return run_stage(name, row, settings, root)
