"""A few real media files, a tokenizer of their words, and a model with random weights that has seen neither."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.models import kangaroo as models

TEXT = [
    "What moves in the video, and which way?",
    "A red square moves to the left.",
    "视频里有什么?",
    "一个红色的方块。",
]


def write_video(path: Path, seconds: int, level: int) -> None:
    """Four frames a second that grow brighter from `level`."""

    def picture(i: int) -> np.ndarray:
        pixels = np.full((32, 32, 3), (level + 3 * i) % 256, np.uint8)
        pixels[8:16, i % 24 : i % 24 + 8] = (255, 0, 0)
        return pixels

    write_h264(path, map(picture, range(4 * seconds)), 4)


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """Folder with a.mp4 (3 s), b.mp4 (6 s), c.jpg, tokenizer.model, notes.txt."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", 3, 20)
    write_video(folder / "b.mp4", 6, 120)
    Image.fromarray(np.full((40, 24, 3), (0, 90, 200), np.uint8)).save(folder / "c.jpg")
    train_sentencepiece(TEXT, folder / "tokenizer.model", vocab_size=300)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="session")
def random_model(make_micro_config, make_random_model) -> models.KangarooModel:
    """The model of `kangaroo`."""
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    return make_random_model(config.model)


@pytest.fixture
def kangaroo(make_micro_config, media, random_model) -> Iterator[Kangaroo]:
    """Something to talk to, which remembers nothing of other tests."""
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    with Kangaroo(random_model, StageConfig.from_config(config), load_tokenizer(media / "tokenizer.model")) as kangaroo:
        yield kangaroo
