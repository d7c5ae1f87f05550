"""Pixels of still images, and the letterbox that images and video frames share."""

import contextlib
import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.storage import check_file, local
from kangaroo_jax.errors import UserError, one_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
MAX_PIXELS = 178_956_970  # pixels of a still image; PIL's own limit against decompression bombs
_BACKGROUND = (255, 255, 255)  # behind transparent pixels
# Formats that Pillow may read: its others run programs (EPS), fetch files, or are for printers.
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_WHOLE = MAX_PIXELS // 2  # pixels, above which an image is made smaller before its colours are converted
_STRIP = 1 << 22  # pixels converted at a time
_MOST_TEXT = 1 << 20  # bytes of text in all chunks of a PNG that Pillow accepts
_FRAMES = (b"acTL", b"fcTL", b"fdAT")  # chunks of an animated PNG
_SIZES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}  # bytes of chunks with a fixed size
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow warns from half of the pixels at which it refuses an image; we refuse at the same number, without a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def letterbox(image: np.ndarray | Image.Image, side: int) -> np.ndarray:
    """Resize the longest side to `side` pixels and centre the image on black: uint8[S, S, 3].

    Bicubic and antialiased (PIL), in uint8, as Kangaroo's inputs are probably made (inferred).

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

    EXIF orientation is applied, transparency becomes white, and an animation gives its first frame.

    Raises:
        UserError: the file is missing, empty, too large or no readable image.
    """
    with opened_image(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{short(path)}: {image.width}x{image.height} pixels is too large an image")
        shrink = 1
        if image.width * image.height > _WHOLE:
            shrink = max(1, min(8, max(image.size) // (4 * image_size)))
            image.draft("RGB", (image.width // shrink, image.height // shrink))  # decodes a JPEG at a smaller size
            shrink = max(1, min(shrink, max(image.size) // (4 * image_size)))
        image.load()
        rgb, turn = to_rgb(image, shrink), _TURNS.get(_orientation(image))
        return letterbox(rgb if turn is None else rgb.transpose(turn), image_size)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1


def image_size_of(path: str | Path) -> tuple[int, int, str]:
    """Width, height and format of an image, from its header. Raises UserError."""
    with opened_image(path) as image:
        return image.width, image.height, (image.format or "").lower()


@contextlib.contextmanager
def opened_image(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file, address or member of a container; what its reader raises becomes a UserError."""
    name = short(path)
    member = member_of(path)
    file = local(path) if member is None else member.file
    check_file(file, name)
    source: io.BytesIO | Path = file if member is None else io.BytesIO(member.read())
    try:
        with Image.open(_without_bad_asides(source), formats=_formats()) as image:
            yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{name}: too large an image (more than {MAX_PIXELS:,} pixels)") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image that can be read; give a JPEG, PNG or WebP file") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # raised for damaged files
        raise UserError(f"{name}: cannot read the image ({one_line(error)})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _without_bad_asides(source: io.BytesIO | Path) -> io.BytesIO | Path:
    """The same file; a PNG loses ancillary chunks (texts, profile and others) that are too large or damaged."""
    with contextlib.ExitStack() as stack:
        file = source if isinstance(source, io.BytesIO) else stack.enter_context(source.open("rb"))
        bad = _bad_asides(file)
        if not bad:
            file.seek(0)
            return source
        data, kept, end = memoryview(file.getbuffer() if isinstance(file, io.BytesIO) else _whole(file)), [], 0
        for begin, size in bad:
            kept.append(data[end:begin])
            end = begin + size
        return io.BytesIO(b"".join([*kept, data[end:]]))


def _whole(file: io.BufferedReader) -> bytes:
    file.seek(0)
    return file.read()


def _bad_asides(file: io.BytesIO | io.BufferedReader) -> list[tuple[int, int]]:
    """(first byte, size) of a PNG's ancillary chunks on which Pillow would fail; empty for any other file."""
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return []
    place, bad, total = 8, [], 0
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        if name[0] & 0x20 and name not in _FRAMES:  # lower case marks an ancillary chunk, which a reader may skip
            body = file.read(size) if size <= _MOST_TEXT else b""
            check = file.read(4) if body or not size else b""
            length = _unpacked(name, body)
            whole = check == struct.pack(">I", zlib.crc32(name + body)) and _SIZES.get(name, size) == size
            if not whole or total + length > _MOST_TEXT:
                bad.append((place, size + 12))
            else:
                total += length
        place += size + 12
        file.seek(place)
    return bad


def _unpacked(name: bytes, body: bytes) -> int:
    """The size in bytes of a chunk's decompressed text, counted up to just above _MOST_TEXT."""
    key, _, rest = body.partition(b"\0")
    packed = rest[1:] if name in (b"zTXt", b"iCCP") else b""
    if name == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    if not packed:
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(packed, _MOST_TEXT + 1))
    except zlib.error:
        return _MOST_TEXT + 1


def to_rgb(image: Image.Image, shrink: int = 1) -> Image.Image:
    """An image of any mode as RGB; greys of more than 8 bits are scaled, not clipped; transparency becomes white.

    Conversion goes strip by strip, so that a large image is not in memory several times over. `shrink` is the factor
    by which both sides are reduced.
    """
    if image.mode == "RGB" and not image.has_transparency_data and shrink == 1:
        return image
    convert = _converter(image)
    width, height = (math.ceil(side / shrink) for side in image.size)
    rows = max(1, _STRIP // (image.width * shrink)) * shrink
    if rows >= image.height:
        return _reduced(convert(image), shrink)
    whole = Image.new("RGB", (width, height))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if "transparency" in image.info:
            strip.info["transparency"] = image.info["transparency"]
        whole.paste(_reduced(convert(strip), shrink), (0, top // shrink))
    return whole


def _reduced(image: Image.Image, shrink: int) -> Image.Image:
    return image.reduce(shrink) if shrink > 1 else image


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The function that converts a strip of this image to RGB."""
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        return functools.partial(_grey_to_rgb, scale=_grey_scale(image))
    return _on_white if image.has_transparency_data else lambda strip: strip.convert("RGB")


def _grey_scale(image: Image.Image) -> tuple[float, float]:
    """(divisor, factor) that scale a deep grey to 0..255, by its mode and, for 32 bits, its brightest pixel."""
    if image.mode.startswith("I;16"):
        return 257.0, 1.0
    top = 0.0
    for row in range(0, image.height, max(1, _STRIP // image.width)):
        strip = np.asarray(image.crop((0, row, image.width, min(row + max(1, _STRIP // image.width), image.height))))
        top = max(top, float(np.max(strip, where=np.isfinite(strip), initial=0.0)))
    if image.mode == "F" and top <= 1.0:
        return 1.0, 255.0
    if top <= 255:
        return 1.0, 1.0
    return (257.0, 1.0) if top <= 65_535 else (top, 255.0)


def _grey_to_rgb(strip: Image.Image, scale: tuple[float, float]) -> Image.Image:
    grey = np.nan_to_num(np.asarray(strip).astype(np.float64), posinf=np.inf, neginf=0.0)
    return Image.fromarray((grey / scale[0] * scale[1]).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(strip: Image.Image) -> Image.Image:
    strip = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", strip.size, (*_BACKGROUND, 255)), strip).convert("RGB")
