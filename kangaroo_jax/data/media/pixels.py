"""From a decoder's frame to RGB in a square: scaled, rotated as the file states, tone-mapped to standard range."""

import functools
import struct
from typing import Any

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from kangaroo_jax.data.media.image import centre, fitted

_LEAST_SIDE, _MOST_SHRINKING = 16, 32  # pixels, factor: beyond these PIL scales a picture, not FFmpeg
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics (H.273) with a high dynamic range
_WHITE, _PEAK = 203.0, 1000.0  # nits of graphics white (ITU-R BT.2408) and of the brightest pictures
_GAMMA = 2.2
# Linear light: BT.2020 primaries to BT.709 primaries (ITU-R BT.2087).
_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)


class FrameScaler:
    """Writes frames of one video; its reformatters keep their set-up between frames."""

    def __init__(self, side: int, ratio: float) -> None:
        """`side` of the square in pixels, `ratio` of a pixel's width to its height."""
        self._side, self._ratio = side, ratio
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()

    def write(self, frame: Any, canvas: np.ndarray) -> None:
        """Write RGB into a black uint8[S, S, 3]: rotated as the file states, longest side S, centred."""
        aspect = frame.width * self._ratio / frame.height
        matrix = display_matrix(frame)
        if is_turned(matrix):
            height, width = fitted(1 / aspect, self._side)
        else:
            width, height = fitted(aspect, self._side)
        centre(upright(self._scaled(frame, width, height), matrix), canvas)

    def _scaled(self, frame: Any, width: int, height: int) -> np.ndarray:
        """uint8[height, width, 3], RGB; bicubic, antialiased.

        Luma and chroma are scaled before conversion to RGB. That is a sixth of the work of scaling RGB, and more exact,
        because chroma is stored at half the size and conversion would double it pixel by pixel.
        """
        form = frame.format
        if has_alpha(form):
            return _resized(
                _on_white(self._converter.reformat(frame, format="rgba", threads=1).to_ndarray()), width, height
            )
        bright = HDR.get(int(frame.color_trc))
        shrink = max(frame.width / width, frame.height / height)
        if form.is_rgb or len(form.components) != 3 or min(width, height) < _LEAST_SIDE or shrink > _MOST_SHRINKING:
            rgb = self._converter.reformat(frame, format="rgb48le" if bright else "rgb24", threads=1).to_ndarray()
            return _resized(_tone_mapped(rgb, bright) if bright else rgb, width, height)
        full = "yuvj444p" if form.name.startswith("yuvj") else "yuv444p"  # the j: luma from 0 to 255
        small = self._scaler.reformat(
            frame,
            width=width,
            height=height,
            format="yuv444p10le" if bright else full,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        rgb = self._converter.reformat(small, format="rgb48le" if bright else "rgb24", threads=1).to_ndarray()
        return _tone_mapped(rgb, bright) if bright else np.asarray(rgb)


def has_alpha(form: Any) -> bool:
    """Whether a pixel format has an alpha channel."""
    return any(component.is_alpha for component in form.components)


def _resized(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8[height, width, 4] -> uint8[height, width, 3]; transparency becomes white, as in images."""
    picture = Image.fromarray(rgba)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture))[..., :3]


# ------------------------------------------------------------------------------- orientation


def display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Where a frame's x axis and y axis point on display, (x, y) each; None if the file does not state it."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame has side data unknown to PyAV, such as EXIF
        return (None, (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
    if data is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    return a, b, c, d


def is_turned(matrix: tuple[int, int, int, int] | None) -> bool:
    """Whether width and height are swapped on display."""
    return matrix is not None and abs(matrix[1]) > abs(matrix[0])


def upright(picture: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """[height, width, 3] as it is displayed: the nearest of the eight rotations and reflections."""
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if is_turned(matrix):
        picture, right, down = picture.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


# ------------------------------------------------------------------------------ high dynamic range


def _tone_mapped(rgb: np.ndarray, transfer: str) -> np.ndarray:
    """uint16[height, width, 3] in PQ or HLG -> uint8 in standard dynamic range, with 203-nit white near the top.

    The curve of ITU-R BT.2390 maps 1,000 to 203 nits; then the colours are converted to BT.709.
    """
    codes: np.ndarray = rgb >> 4
    if transfer == "HLG":
        scene = _light("HLG")[codes]
        luma = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        nits = _PEAK * scene * np.maximum(luma, 1e-6)[..., None] ** 0.2  # the display's gamma: 1.2 overall
        codes = np.round(_to_pq(nits) * 4095).astype(np.uint16)
    linear = _light("PQ")[codes] @ _TO_709.T
    pixels: np.ndarray = (np.clip(linear, 0, 1) ** (1 / _GAMMA) * 255).round().astype(np.uint8)
    return pixels


@functools.cache
def _light(transfer: str) -> np.ndarray:
    """float32[4096]: the light that each 12-bit code stands for; for PQ after the curve, where white is 1."""
    code = np.linspace(0, 1, 4096)
    if transfer == "HLG":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    top = _to_pq(np.array(_PEAK))
    most, share = _to_pq(np.array(_WHITE)) / top, np.minimum(code / top, 1)
    knee = 1.5 * most - 0.5
    t = np.clip((share - knee) / (1 - knee), 0, 1)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return (_from_pq(np.where(share < knee, share, bent) * top) / _WHITE).astype(np.float32)


_M1, _M2, _C1, _C2, _C3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875  # SMPTE ST 2084


def _to_pq(nits: np.ndarray) -> np.ndarray:
    power = (nits / 10_000) ** _M1
    return np.asarray(((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2)


def _from_pq(code: np.ndarray) -> np.ndarray:
    power = code ** (1 / _M2)
    return np.asarray(10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1))
