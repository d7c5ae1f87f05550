"""The frames that were seen, small, as JPEGs in addresses that a page holds itself."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from kangaroo_jax.data.media.decode import Decoder
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.web.asking import Medium

_SIDE, _SMALL_SIDE = 176, 112  # pixels before the bars at two sides are cut off
_MANY = 64  # frames above which they are small
_QUALITY = 82


def thumbnails(decoder: Decoder, medium: Medium, seconds: Sequence[float]) -> tuple[str, ...]:
    """`data:` addresses of the frames on display at these seconds (of an image: of it). Raises UserError."""
    times = tuple(seconds) if medium.kind == "video" else (0.0,)
    side = _SIDE if len(times) <= _MANY else _SMALL_SIDE
    outcome = decoder.submit(MediaRef(medium.kind, str(medium.path), times), side).result()
    if isinstance(outcome, UserError):
        raise outcome
    return tuple(_address(frame) for frame in _without_bars(outcome.pixels))


def _without_bars(pixels: np.ndarray) -> np.ndarray:
    """Frames uint8[n, S, S, 3] without the black bars at two sides that made them square."""
    lit = pixels.max(axis=(0, 3)) > 0
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return pixels
    side = len(lit)
    top, left = (min(int(cut[0]), side - 1 - int(cut[-1])) for cut in (rows, columns))
    if top >= left:
        return pixels[:, top : side - top]
    return pixels[:, :, left : side - left]


def _address(pixels: np.ndarray) -> str:
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(written, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"
