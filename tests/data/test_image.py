"""Still images: orientation, transparency, unusual modes, letterbox."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.media.image import letterbox, load_image
from kangaroo_jax.data.media.video import load_media, probe
from tests.data.media import numbered_frame, read_number


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(numbered_frame(1234)).save(path)
    pixels = load_image(path, 48)
    assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8 and read_number(pixels) == 1234
    assert probe(path).kind == "image" and probe(path).width == 96


@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 1), (8, 3)])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(numbered_frame(77), turns))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    assert read_number(load_image(tmp_path / "a.jpg", 48)) == 77


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 32)
    assert (loaded[:, :15] == 255).all() and (loaded[:, 17:] == (255, 0, 0)).all()
    Image.fromarray(pixels[..., :3]).quantize(4).save(tmp_path / "b.png", transparency=0)
    assert load_image(tmp_path / "b.png", 32).max() == 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA"])
def test_modes(tmp_path: Path, mode: str) -> None:
    grey = np.full((32, 32), 128, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    loaded = load_image(path, 32)
    assert loaded.shape == (32, 32, 3)
    assert abs(float(loaded.mean()) - 128) < 10


def test_letterbox_is_centred_and_black_outside() -> None:
    wide = letterbox(np.full((30, 60, 3), 200, np.uint8), 60)
    assert (wide[15:45] == 200).all() and (wide[:15] == 0).all() and (wide[45:] == 0).all()
    assert (letterbox(np.full((10, 10, 3), 9, np.uint8), 40) == 9).all()
    thin = letterbox(np.full((1000, 1, 3), 200, np.uint8), 50)
    assert (thin.max(axis=(0, 2)) > 0).sum() == 1


def test_downscaling_is_antialiased() -> None:
    lines = np.zeros((96, 96, 3), np.uint8)
    lines[::2] = 255
    small = letterbox(lines, 24)
    assert small[4:-4].std() < 8 and abs(float(small.mean()) - 127.5) < 4


def test_an_image_fills_its_group(tmp_path: Path) -> None:
    Image.fromarray(numbered_frame(5)).save(tmp_path / "a.png")
    clip = load_media(tmp_path / "a.png", "image", image_size=48, times=[0.0, 0.0], start=None)
    assert [read_number(frame) for frame in clip.pixels] == [5, 5] and clip.times.tolist() == [0, 0]
