"""Media in the exported processor: the same frames as our reader's, and nothing that opens other files."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.video import FramePolicy
from kangaroo_jax.data.media.video import load_video as ours
from tests.data.media import numbered_frame, read_number, set_display_matrix, write_video

pytest.importorskip("torch")
from kangaroo_jax.conversion.torch_model import media_kangaroo as processing  # noqa: E402

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


def test_transparent_frames_lie_on_white(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=8)
        stream.width = stream.height = 96
        stream.pix_fmt = "argb"
        for i in range(8):
            rgba = np.dstack([numbered_frame(i), np.full((96, 96), 255 * (i % 2), np.uint8)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode(None))
    frames, _ = processing.load_video(path, SAMPLING, 2)
    assert (frames[0] == 255).all()
    np.testing.assert_array_equal(
        frames, ours(path, image_size=48, policy=FramePolicy(min_frames=8, max_frames=8)).pixels
    )


RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)


@pytest.mark.parametrize(
    "top, kind", [(65535, np.uint16), (1, np.float32), (255, np.float32), (255, np.int32), (2e9, np.int32)]
)
def test_deep_greys_are_those_of_training(tmp_path: Path, top: float, kind: type) -> None:
    Image.fromarray((RAMP * top).astype(kind)).save(tmp_path / "a.tiff")
    found = processing.letterbox(processing.open_image(tmp_path / "a.tiff"), 48)
    assert found.max() > 250
    np.testing.assert_array_equal(found, load_image(tmp_path / "a.tiff", 48))


def test_a_frame_with_side_data_of_a_new_kind_is_shown(tmp_path: Path) -> None:
    Image.fromarray(numbered_frame(5)).save(tmp_path / "a.tiff")  # FFmpeg hands its EXIF on with the frame
    with av.open(str(tmp_path / "a.tiff")) as container:
        frame = next(container.decode(video=0))
        shown = processing._pixels(frame, VideoReformatter(), VideoReformatter(), 1.0, 48)
    assert read_number(shown) == 5


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
