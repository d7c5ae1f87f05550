"""For smoke.sh: a video, decoded and checked; annotations and a tokenizer for `kangaroo train`, in the folder given."""

import json
import sys
from pathlib import Path

import numpy as np

from kangaroo_jax import load_video
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.data.tokenizer import train_sentencepiece

RATE, SECONDS, SIDE = 4, 4, 64


def write_video(path: Path) -> None:
    """Frames that grow brighter by a step each."""
    write_h264(path, (np.full((SIDE, SIDE, 3), 40 + 10 * i, np.uint8) for i in range(RATE * SECONDS)), RATE)


def check_video(path: Path) -> None:
    """Raises AssertionError where a frame is not the one that was asked for."""
    times = [0.0, 1.0, 2.5, 3.75]
    video = load_video(str(path), image_size=32, times=times)
    np.testing.assert_allclose(video.times, times, atol=1e-6)
    brightness = video.pixels.reshape(len(times), -1).mean(axis=1)
    np.testing.assert_allclose(brightness, [40 + 10 * RATE * t for t in times], atol=4)


def main(folder: Path) -> None:
    """What the smoke test trains on."""
    folder.mkdir()
    write_video(folder / "clip.mp4")
    check_video(folder / "clip.mp4")
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A grey square."}]
    record = {"id": "clip", "video": "clip.mp4", "conversations": turns}
    (folder / "train.jsonl").write_text(f"{json.dumps(record)}\n" * 8, encoding="utf-8")
    train_sentencepiece([turn["value"] for turn in turns], folder / "tokenizer.model", vocab_size=300)
    print("smoke: a video is decoded as it was written")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
