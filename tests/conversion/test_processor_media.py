"""Media in the exported processor: the same frames as our reader's, and nothing that opens other files."""

import os
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.data.video import FramePolicy
from kangaroo_jax.data.video import load_video as ours
from tests.data.media import set_display_matrix, write_video

pytest.importorskip("torch")
from kangaroo_jax.conversion.torch_model import processing_kangaroo as processing  # noqa: E402

SAMPLING = {
    "image_size": 48, "fps": 1.0, "min_frames": 8, "max_frames": 8,
    "long_seconds": 64.0, "long_min_frames": 8, "long_max_frames": 8,
}  # fmt: skip


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0)])
def test_orientations_are_those_of_training(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = write_video(tmp_path / "a: 1.mp4", 16, 8)
    set_display_matrix(path, *matrix)
    frames, times = processing.load_video(path, SAMPLING, 2)
    clip = ours(path, image_size=48, policy=FramePolicy(min_frames=8, max_frames=8))
    np.testing.assert_array_equal(frames, clip.pixels)
    np.testing.assert_array_equal(times, clip.times)


def test_playlists_pipes_and_programs_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 4)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Exception, match="Invalid|nvalid argument"):
        processing.load_video(tmp_path / "list.mp4", SAMPLING, 2)
    with pytest.raises(OSError, match="cannot identify"):
        processing.open_image(tmp_path / "a.jpg")
    for read in (lambda path: processing.load_video(path, SAMPLING, 2), processing.open_image):
        with pytest.raises(ValueError, match="no regular one"):
            read(tmp_path / "pipe")
