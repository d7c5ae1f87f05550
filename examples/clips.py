"""For the other examples: small H.264 clips of a square that moves, and a JSONL of questions about them."""

import json
from pathlib import Path

import numpy as np

from kangaroo_jax.data.media.writing import write_h264

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (230, 200, 40)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIDE, RATE, SECONDS = 96, 8, 4


def write_clip(path: Path, colour: str, way: str = "", seed: int | None = None) -> None:
    """A square of a colour crosses a picture for 4 seconds, or stands still without a `way`.

    The picture is grey, or with a `seed` made of blocks of its own, by which curation tells one clip from another.
    """
    ground = np.full((SIDE, SIDE, 3), 110, np.uint8)
    if seed is not None:
        blocks = np.random.default_rng(seed).integers(40, 180, (8, 8, 3), dtype=np.uint8)
        ground = np.kron(blocks, np.ones((SIDE // 8, SIDE // 8, 1), np.uint8))
    pictures = []
    for i in range(RATE * SECONDS):
        moved = 48 * (i / (RATE * SECONDS - 1) - 0.5)
        x, y = (int(36 + moved * step) for step in WAYS.get(way, (0, 0)))
        picture = ground.copy()
        picture[y : y + 24, x : x + 24] = COLOURS[colour]
        pictures.append(picture)
    write_h264(path, pictures, RATE, {"preset": "veryfast"})


def write_clips(folder: Path) -> Path:
    """Sixteen clips in `folder`; returns the path of clips.jsonl beside them, in LLaVA's format."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for colour in COLOURS:
        for way in WAYS:
            name = f"{colour}_{way}.mp4"
            write_clip(folder / name, colour, way)
            turns = [
                {"from": "human", "value": "<video>\nWhat colour is it?"},
                {"from": "gpt", "value": colour},
                {"from": "human", "value": "Which way does it move?"},
                {"from": "gpt", "value": way},
            ]
            lines.append(json.dumps({"id": name, "video": name, "conversations": turns}))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.jsonl"
