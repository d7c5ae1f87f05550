"""Clips of the quickstart's small world, made on the spot: no file of the repository, and no two alike."""

import importlib.util
import random
from pathlib import Path

from kangaroo_jax.corpus.draw import split_scans, write_video
from kangaroo_jax.corpus.scenes import Scene, SceneMaker

KINDS = {"order": 4, "count": 4, "move": 4, "long": 2}  # frames a second of each kind of scene
_TRIES = 40
_SHORTEST = 6  # seconds: one that is over at once shows little


def make_scene(kind: str, seed: int) -> Scene:
    """A scene as the quickstart's held-out ones; digits take part where scikit-learn, which has them, is there."""
    rng = random.Random(f"{kind}/{seed}")
    has_digits = importlib.util.find_spec("sklearn") is not None
    maker = SceneMaker("eval", split_scans()["eval"] if has_digits else {}, rng)
    for _ in range(_TRIES):
        try:
            scene = maker.make(kind)
        except KeyError:  # a digit that nobody can draw
            continue
        if scene.seconds >= _SHORTEST:
            return scene
    raise RuntimeError(f"no scene of kind {kind} in {_TRIES} tries")


def make_clip(kind: str, seed: int, path: Path) -> Scene:
    """Write a clip of a kind; what is true of it."""
    scene = make_scene(kind, seed)
    write_video(scene, path, KINDS[kind])
    return scene
