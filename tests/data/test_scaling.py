"""Pixels of a video against PIL's bicubic resizing of the picture that was encoded."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image

from kangaroo_jax.data.media.video import load_video

ROWS, COLUMNS = np.mgrid[0:240, 0:320]
SMOOTH = np.stack([COLUMNS * 255 / 319, ROWS * 255 / 239, (COLUMNS + ROWS) * 255 / 558], -1).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, SMOOTH.shape, np.uint8)


def write(path: Path, image: np.ndarray, form: str, colours: Colorspace = Colorspace.ITU601, ratio: int = 1) -> Path:
    """Two frames of the picture: FFV1, motion JPEG for the formats of full range, H.264 in an MP4."""
    with av.open(str(path), "w") as container:
        codec = "libx264" if path.suffix == ".mp4" else "mjpeg" if form.startswith("yuvj") else "ffv1"
        stream = container.add_stream(codec, rate=2)
        stream.width, stream.height, stream.pix_fmt = image.shape[1], image.shape[0], form
        stream.codec_context.sample_aspect_ratio = Fraction(ratio)
        stream.codec_context.colorspace = colours
        if form.startswith("yuvj"):
            stream.codec_context.qmin = stream.codec_context.qmax = 1
            stream.codec_context.color_range = 2
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = VideoReformatter().reformat(frame, format=form, dst_colorspace=colours)
        for i in range(2):
            frame.pts, frame.time_base = i, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def pixels(path: Path, side: int) -> np.ndarray:
    return load_video(path, image_size=side, times=[0.0]).pixels[0].astype(int)


def wanted(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)).astype(int)


FORMS = ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuva420p", "bgr0"]


@pytest.mark.parametrize(
    "form, colours",
    [(form, colours) for form in FORMS for colours in (Colorspace.ITU601, Colorspace.ITU709)]
    + [("yuvj420p", Colorspace.ITU601)],  # JPEG knows no other
)
def test_every_format_gives_the_colours_that_were_encoded(tmp_path: Path, form: str, colours: Colorspace) -> None:
    path = write(tmp_path / "a.mkv", SMOOTH, form, colours)
    for side, height in ((160, 120), (448, 336)):
        difference = np.abs(pixels(path, side)[(side - height) // 2 :][:height] - wanted(SMOOTH, side, height))
        assert difference.mean() < 1.5 and difference.max() <= 8, (side, difference.mean(), difference.max())


@pytest.mark.parametrize("side", [64, 100, 224])
def test_detail_is_averaged_as_by_pil(tmp_path: Path, side: int) -> None:
    path = write(tmp_path / "a.mkv", NOISE, "yuv444p")
    height = round(side * 3 / 4)
    got, expected = pixels(path, side)[(side - height) // 2 :][:height], wanted(NOISE, side, height)
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.1 * expected.std()
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.99


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", np.full((64, 64, 3), 200, np.uint8), "yuv420p", ratio=2)
    shown = pixels(path, 64)
    assert (abs(shown[16:48] - 200) <= 3).all() and (shown[:16] == 0).all() and (shown[48:] == 0).all()


@pytest.mark.parametrize("size", [(8, 640), (640, 8), (6, 6), (2400, 2400)])
def test_sizes_at_which_pictures_are_scaled_in_rgb(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write(tmp_path / "a.mkv", np.full((size[1], size[0], 3), 120, np.uint8), "yuv420p")
    shown = pixels(path, 64)
    assert abs(shown[shown > 0].mean() - 120) <= 3
