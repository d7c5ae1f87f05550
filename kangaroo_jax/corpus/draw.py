"""Drawing scenes of the generated corpus and writing them as JPEG and H.264 MP4.

Handwritten digits are the 8 x 8 scans that scikit-learn bundles (UCI "Optical Recognition of Handwritten
Digits"), enlarged and coloured; shapes are distance functions with soft edges.
"""

import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kangaroo_jax.corpus.scenes import CANVAS, DIGITS, Event, Scene, Thing
from kangaroo_jax.data.media.writing import write_h264

RGB = {
    "red": (235, 45, 45),
    "green": (40, 200, 70),
    "blue": (60, 90, 255),
    "yellow": (245, 220, 40),
    "white": (245, 245, 245),
    "purple": (205, 50, 225),
}
DRIFT_SIZE, DRIFT_LEVEL = 10, 70  # the dim square that wanders through some long videos


@functools.cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's scans: ink float32[n, 8, 8] from 0 to 1, and the digits int[n] that they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.clip(digits.images / 16 * 1.25, 0, 1).astype(np.float32), digits.target


def split_scans(held_share: float = 0.2) -> dict[str, dict[str, list[int]]]:
    """Indices of the scans of each digit, for "train" and "eval": every fifth scan of a digit is held out."""
    _, target = load_scans()
    every = round(1 / held_share)
    split: dict[str, dict[str, list[int]]] = {"train": {}, "eval": {}}
    for digit in DIGITS:
        scans = np.flatnonzero(target == int(digit)).tolist()
        split["eval"][digit] = scans[::every]
        split["train"][digit] = [s for i, s in enumerate(scans) if i % every]
    return split


def _enlarge(centre: np.ndarray | float, size: float, cells: int = 8) -> np.ndarray:
    """Bilinear weights float32[..., CANVAS, cells] that spread `cells` samples over `size` pixels at `centre`[...]."""
    pixels = (np.arange(CANVAS) + 0.5 - np.asarray(centre)[..., None]) / size * cells + cells / 2 - 0.5
    return np.clip(1 - np.abs(pixels[..., None] - np.arange(cells)), 0, 1).astype(np.float32)


def _distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape that spans -1 to 1; negative inside."""
    if name == "circle":
        return np.hypot(x, y) - 0.95
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.23
    if name == "bar":
        return np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.32)
    if name == "triangle":
        return np.maximum(np.abs(x) * 0.872 - (y + 0.9) * 0.490, y - 0.8)  # apex (0, -0.9), base at y = 0.8
    if name == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.maximum(np.minimum(a, b) - 0.28, np.maximum(a, b) - 0.95)
    raise ValueError(f"unknown shape {name!r}")


@dataclasses.dataclass(frozen=True)
class Look:
    """The individual look of a thing, which it keeps for the whole scene."""

    rgb: np.ndarray  # float32[3]
    stretch: tuple[float, float]  # factors of width and height
    turn: float  # a shape's rotation in radians; a digit's slant (pixels right for a pixel up)
    ink: float  # exponent of a digit's ink: below 1 is a broad pen, above 1 a fine one

    @classmethod
    def random(cls, thing: Thing, rng: np.random.Generator) -> "Look":
        """A random look: a darker or paler shade of the colour, slightly stretched and turned, another pen."""
        shade, pale = rng.uniform(0.65, 1.0), rng.uniform(0, 40)
        rgb = np.array(RGB[thing.colour], np.float32) * np.float32(shade)
        stretch = (rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1))
        return cls(rgb + pale * (1 - rgb / 255), stretch, rng.uniform(-0.15, 0.15), rng.uniform(0.7, 1.2))


def _alpha(event: Event, x: float, y: float, look: Look) -> np.ndarray:
    """The coverage of each pixel by the thing, float32[CANVAS, CANVAS], centred on pixel (x, y)."""
    wide, high = (event.size * s for s in look.stretch)
    if event.thing.scan >= 0:
        scan = load_scans()[0][event.thing.scan] ** np.float32(look.ink)
        rows = (np.arange(8) - 3.5) * high / 8  # rows of the scan, in pixels below its middle
        lines = np.einsum("rc,rxc->rx", scan, _enlarge(x - rows * look.turn, wide))
        return _enlarge(y, high) @ lines
    pixels = np.arange(CANVAS, dtype=np.float32) + 0.5
    u, v = ((pixels - x) / (wide / 2))[None, :], ((pixels - y) / (high / 2))[:, None]
    sine, cosine = np.float32(np.sin(look.turn)), np.float32(np.cos(look.turn))
    distance = _distance(event.thing.name, cosine * u + sine * v, cosine * v - sine * u)
    return np.clip(0.5 - distance * (min(wide, high) / 2), 0, 1)


class Painter:
    """Draws frames of one scene. A frame that equals the last one is not drawn again."""

    def __init__(self, scene: Scene):
        self.scene = scene
        rng = np.random.default_rng(scene.seed)
        noise = rng.integers(-4, 5, (CANVAS, CANVAS, 1))
        self.background = np.repeat(np.float32(scene.background) + noise.astype(np.float32), 3, axis=2)
        self.looks = {thing: Look.random(thing, rng) for thing in dict.fromkeys(e.thing for e in scene.events)}
        self._key: object = None
        self._frame = np.zeros(0, np.uint8)

    def frame(self, seconds: float) -> np.ndarray:
        """The frame uint8[CANVAS, CANVAS, 3] at a time in seconds (an image has only time 0)."""
        places = [(event, *event.at(seconds)) for event in self.scene.seen(seconds)]
        drift = self._drift(seconds)
        if (places, drift) == self._key:
            return self._frame
        canvas = self.background.copy()
        if drift:
            left, top = (max(round(v - DRIFT_SIZE / 2), 0) for v in drift)
            canvas[top : top + DRIFT_SIZE, left : left + DRIFT_SIZE] = DRIFT_LEVEL
        for event, x, y in places:
            look = self.looks[event.thing]
            canvas += _alpha(event, x, y, look)[:, :, None] * (look.rgb - canvas)
        self._key, self._frame = (places, drift), np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
        return self._frame

    def _drift(self, seconds: float) -> tuple[float, float] | None:
        if self.scene.drift is None:
            return None
        x0, y0, x1, y1 = self.scene.drift
        share = int(seconds) / max(self.scene.seconds, 1)  # a step a second
        return x0 + share * (x1 - x0), y0 + share * (y1 - y0)


def write_image(scene: Scene, path: Path) -> None:
    """Write an image scene as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(Painter(scene).frame(0)).save(buffer, format="JPEG", quality=92, subsampling=0)
    path.write_bytes(buffer.getvalue())


def write_video(scene: Scene, path: Path, fps: int) -> None:
    """Write a video scene as H.264 MP4 (yuv420p, constant `fps` frames a second)."""
    painter = Painter(scene)
    pictures = (painter.frame(i / fps) for i in range(scene.seconds * fps))
    write_h264(path, pictures, fps, {"preset": "ultrafast", "crf": "20", "g": str(10 * fps)})


def write_media(work: Sequence[tuple[Scene, str, int]]) -> None:
    """Write (scene, path, frames a second) one after another; images ignore the last."""
    for scene, path, fps in work:
        if scene.seconds:
            write_video(scene, Path(path), fps)
        else:
            write_image(scene, Path(path))
