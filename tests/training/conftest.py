"""A handful of real media files, a real SentencePiece model and annotations for every stage."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.data.tokenizer import train_sentencepiece

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}


def write_video(path: Path, colour: tuple[int, int, int], seconds: int, fps: int = 4, side: int = 64) -> None:
    """A square of `colour` that drifts to the right."""

    def picture(i: int) -> np.ndarray:
        pixels = np.full((side, side, 3), 16, np.uint8)
        left = i * (side // 2) // (seconds * fps)
        pixels[16:48, left : left + 24] = colour
        return pixels

    write_h264(path, map(picture, range(seconds * fps)), fps)


def record(name: str, medium: str, tag: str, turns: list[tuple[str, str]]) -> dict:
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": f"<{tag}>\n{question}" if i == 0 else question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, tag: medium, "conversations": conversations}


@pytest.fixture(scope="module")
def one_device():
    """The meshes of a module's tests are of one device."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Folder with stage1.jsonl ... stage5.jsonl, their media and tokenizer.model."""
    folder = tmp_path_factory.mktemp("corpus")
    images, videos, longs = [], [], []
    for name, colour in COLOURS.items():
        for i in range(4):
            pixels = np.full((48, 48, 3), 10 * i, np.uint8)
            pixels[8 + i : 40, 8:40] = colour
            Image.fromarray(pixels).save(folder / f"{name}{i}.jpg", quality=95)
            images.append(record(f"{name}{i}", f"{name}{i}.jpg", "image", [("What colour?", f"a {name} square")]))
        for seconds in (2, 5):
            write_video(folder / f"{name}_{seconds}s.mp4", colour, seconds)
            turns = [("What colour is it?", name), ("How long?", f"{seconds} seconds")]
            videos.append(record(f"{name}_{seconds}s", f"{name}_{seconds}s.mp4", "video", turns))
        write_video(folder / f"{name}_long.mp4", colour, 70, fps=2)
        longs.append(record(f"{name}_long", f"{name}_long.mp4", "video", [("What colour is it?", name)]))
    for stage, records in ((1, images), (2, videos), (3, videos), (4, images + videos), (5, longs + videos)):
        (folder / f"stage{stage}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    texts = [turn["value"] for r in images + videos for turn in r["conversations"]]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=320)
    return folder
