"""Videos and images for the tests, made on the spot; every video frame carries its own number.

A frame is a grid of 4 x 4 blocks. The corners say which way up it is (white top left, black elsewhere);
the other twelve are the bits of the frame's number.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CORNERS = {0: 1, 3: 0, 12: 0, 15: 0}
BITS = [cell for cell in range(16) if cell not in CORNERS]


def numbered_frame(number: int, width: int = 96, height: int = 96) -> np.ndarray:
    """uint8[height, width, 3] that shows `number` (below 4096)."""
    cells = np.zeros(16, np.uint8)
    for cell, value in CORNERS.items():
        cells[cell] = value
    for bit, cell in enumerate(BITS):
        cells[cell] = number >> bit & 1
    grid = (cells.reshape(4, 4) * 215 + 20).repeat(height // 4, 0).repeat(width // 4, 1)
    return np.repeat(grid[:, :, None], 3, axis=2)


def read_number(pixels: np.ndarray) -> int:
    """The number that a frame shows, whatever its size; -1 if it is not the right way up."""
    side = pixels.shape[0]
    middles = (np.arange(4) * 2 + 1) * side // 8
    cells = (pixels[middles][:, middles].mean(-1) > 127).reshape(-1)
    if any(cells[cell] != value for cell, value in CORNERS.items()):
        return -1
    return sum(int(cells[cell]) << bit for bit, cell in enumerate(BITS))


def write_video(
    path: Path,
    frames: int = 16,
    rate: Fraction | int = 8,
    *,
    stamps: Sequence[float] | None = None,
    start: float = 0.0,
    rotation: int = 0,
    size: tuple[int, int] = (96, 96),
    gop: int = 12,
    codec: str = "libx264",
    audio: bool = False,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Write a numbered video: `frames` at `rate` a second, or one at each of `stamps` (seconds)."""
    rate = Fraction(rate)
    tick = Fraction(1, 90_000)
    if stamps is None:
        stamps = [float(i / rate) for i in range(frames)]
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = tick
        stream.codec_context.gop_size = gop
        stream.options = codec_options or {}
        if audio:
            _add_silence(container, seconds=stamps[-1] + 2.0)
        for number, stamp in enumerate(stamps):
            image = numbered_frame(number, *size)
            if rotation:  # stored turned, so that it is upright once the file's rotation is applied
                image = np.ascontiguousarray(np.rot90(image, -rotation // 90))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round((start + stamp) / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation:
        cos, sin = round(np.cos(np.radians(rotation))), round(np.sin(np.radians(rotation)))
        set_display_matrix(path, cos, -sin, sin, cos)
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Have an MP4's first track say how it is shown: (a, b) is where its x axis points, (c, d) its y axis."""
    plain, said = (struct.pack(">9i", *row) for row in (_matrix(1, 0, 0, 1), _matrix(a, b, c, d)))
    data = path.read_bytes()
    place = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:place] + said + data[place + len(said) :])


def _matrix(a: int, b: int, c: int, d: int) -> tuple[int, ...]:
    one = 1 << 16
    return a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """A sound file with no picture."""
    with av.open(str(path), "w") as container:
        _add_silence(container, seconds)
    return path


def _add_silence(container: av.container.OutputContainer, seconds: float) -> None:
    stream = container.add_stream("aac", rate=16_000, layout="mono")
    for i in range(int(seconds * 16_000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, i * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
