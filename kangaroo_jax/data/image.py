"""Pixels of still images, and the letterbox that images and video frames share."""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kangaroo_jax.data.storage import local, member_of, short
from kangaroo_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 178_956_970  # of a still image; PIL's own limit against decompression bombs
_BACKGROUND = (255, 255, 255)  # behind transparent pixels


def letterbox(image: np.ndarray | Image.Image, side: int) -> np.ndarray:
    """Resize the longest side to `side` pixels and centre the image on black: uint8[S, S, 3].

    Bicubic and antialiased (PIL), in uint8, as Kangaroo's inputs are thought to be made (inferred).

    Args:
        image: RGB, uint8[height, width, 3] or a PIL image of mode RGB.
        side: S, pixels.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    size = fitted(image.width / image.height, side)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if size == (side, side):
        return np.array(image)
    canvas = np.zeros((side, side, 3), np.uint8)
    centre(np.asarray(image), canvas)
    return canvas


def fitted(aspect: float, side: int) -> tuple[int, int]:
    """Width and height in pixels of a picture of that aspect (width over height), its longest side `side`."""
    return (side, max(1, round(side / aspect))) if aspect >= 1 else (max(1, round(side * aspect)), side)


def centre(image: np.ndarray, canvas: np.ndarray) -> None:
    """Write uint8[height, width, 3] into the middle of uint8[S, S, 3]."""
    top, left = ((whole - part) // 2 for whole, part in zip(canvas.shape, image.shape[:2], strict=False))
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image


def load_image(path: str | Path, image_size: int) -> np.ndarray:
    """Read a JPEG, PNG, WebP or other still image, letterboxed: uint8[S, S, 3], RGB.

    EXIF orientation is applied, transparency is laid on white, of an animation the first frame is taken.

    Raises:
        UserError: the file is missing, empty, too large or no readable image.
    """
    with opened_image(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{short(path)}: {image.width}x{image.height} pixels is too large an image")
        return letterbox(to_rgb(ImageOps.exif_transpose(image)), image_size)


def image_size_of(path: str | Path) -> tuple[int, int, str]:
    """Width, height and format of an image, from its header. Raises UserError."""
    with opened_image(path) as image:
        return image.width, image.height, (image.format or "").lower()


@contextlib.contextmanager
def opened_image(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file, address or member of a container; what its reader raises becomes a UserError."""
    name = short(path)
    member = member_of(path)
    source: io.BytesIO | Path = local(path) if member is None else io.BytesIO(member.read())
    if isinstance(source, Path):
        check_file(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{name}: too large an image (more than {MAX_PIXELS:,} pixels)") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image that can be read; give a JPEG, PNG or WebP file") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # of damaged files
        raise UserError(f"{name}: cannot read the image ({' '.join(str(error).split())})") from None


def check_file(path: str | Path, name: str = "") -> None:
    """Raise a UserError that says what is wrong if `path` is not a file with something in it.

    `name` is what the message calls it.
    """
    file, path = Path(path), name or path
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(
            f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}"
        ) from None
    if file.is_dir():
        raise UserError(f"{path}: this is a folder, not a media file")
    if size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16-bit greys are scaled, not clipped; transparency is laid on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
