"""A small tokenizer and a folder of media that several tests share."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kangaroo_jax.config import DataConfig, stage_config
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.data.media import numbered_frame, write_video


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["user assistant system What moves first? The red circle moves left. 红色的圆形向左移动。 0123456789"] * 40
    return load_tokenizer(train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 330))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2s.mp4, 5s.mp4, 20s.mp4 (4 frames a second, numbered), photo.jpg."""
    folder = tmp_path_factory.mktemp("media")
    for seconds in (2, 5, 20):
        write_video(folder / f"{seconds}s.mp4", 4 * seconds, 4)
    Image.fromarray(numbered_frame(9)).save(folder / "photo.jpg")
    return folder


@pytest.fixture
def data_config() -> DataConfig:
    """`config.data` of the tiny preset, with 4 to 8 frames, 12 to 16 of videos over 10 s."""
    config = DataConfig.from_config(stage_config("tiny").data)
    config = replace(config, min_frames=4, max_frames=8, long_seconds=10.0, long_min_frames=12, long_max_frames=16)
    config = replace(config, tokens_per_pack=256, frames_per_pack=24, packs_per_batch=2, packing_bins=3, cache_mib=0)
    return config
