"""The processor of an exported model opens media as we do: no other file, no address, no other program."""

import os
from pathlib import Path

import pytest

from tests.data.media import write_video
from tests.security.test_decoding import EPS
from tests.security.test_media import CONTAINERS

pytest.importorskip("torch")
pytest.importorskip("transformers")
SAMPLING = {"long_seconds": 64.0, "min_frames": 2, "max_frames": 4, "fps": 1.0, "image_size": 16}


def test_it_opens_a_video_and_an_image(tmp_path: Path) -> None:
    from PIL import Image

    from kangaroo_jax.conversion.torch_model.media_kangaroo import load_video, open_image

    frames, times = load_video(write_video(tmp_path / "a:b%.mp4", 8), SAMPLING, 1)
    assert len(frames) == len(times) == 2
    for ending in ("png", "jpg", "webp", "bmp", "gif", "tiff"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"a.{ending}")
        assert open_image(tmp_path / f"a.{ending}").size == (16, 16)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_playlist_opens_nothing(kind: str, tmp_path: Path) -> None:
    from kangaroo_jax.conversion.torch_model.media_kangaroo import load_video

    other = write_video(tmp_path / "other.mp4", 8)
    path = tmp_path / "clip.mp4"
    path.write_text(CONTAINERS[kind].format(u="http://127.0.0.1:9", p=other.name if kind == "concat" else other))
    with pytest.raises((OSError, ValueError, StopIteration)):
        load_video(path, SAMPLING, 1)


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kangaroo_jax.conversion.torch_model.media_kangaroo import open_image

    (tmp_path / "gs").write_text(f"#!/bin/sh\necho run >{tmp_path}/was_run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(EPS)
    with pytest.raises(OSError):
        open_image(tmp_path / "a.jpg").load()
    assert not (tmp_path / "was_run").exists()
