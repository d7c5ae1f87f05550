"""Raw clips for the quickstart: good clips of its corpus, and bad ones of each kind that curation should drop.

    FOLDER/media/text_0.mp4 ...    the bad clips, real files of other sizes than the corpus's own
    FOLDER/manifest.jsonl          path and caption of every raw clip, good and bad mixed; the input of `curate`
    FOLDER/planted.json            {path: the rule that should drop it}; curation does not read it

Faces come from photographs in packages (matplotlib's Grace Hopper; scikit-image's astronaut if that is installed).
Stills are parts of scikit-learn's photographs. Copies are smaller, coarser and sometimes brighter clips of the corpus.
Broken files are truncated, overwritten, web pages or empty.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kangaroo_jax.corpus.scenes import Scene
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.system.files import write_json, write_text

SIZE = (320, 240)  # pixels of the bad clips, width and height
FPS = 8
SECONDS = 4
COPY_SIDE = 80  # pixels of a copy: fewer than the original's, so that the original is kept
_LINES = (
    "Terms and conditions apply to all offers shown",
    "Call now and save up to forty percent today",
    "Subscribe for new lessons every single week",
    "Chapter seven: the history of printed letters",
    "All prices include tax, delivery is extra",
    "Questions and answers follow after the break",
    "Please read the safety notice on the package",
)
ALT_TEXT = "Watch this video now"  # the caption of a bad clip, typical of web pages


@dataclasses.dataclass(frozen=True)
class RawClips:
    """The written files: the manifest, good clips, and bad clips with the rule that should drop each."""

    manifest: Path
    good: tuple[Path, ...]
    planted: dict[Path, str]


def write_raw_clips(folder: Path, good: Sequence[tuple[Path, Scene]], bad: int, seed: int) -> RawClips:
    """Write `bad` bad clips and the manifest of all into a folder.

    Args:
        folder: receives the files named at the top of this module.
        good: clips of the corpus and their scenes; copies are made of the first ones.
        bad: the number of bad clips; their kinds take turns.
        seed: determines their pixels and the order of the manifest.
    """
    (folder / "media").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/raw")
    makers = {name: maker for name, (_, maker) in KINDS.items() if name != "face" or _portraits()}
    planted: dict[Path, str] = {}
    for i, name in zip(range(bad), itertools.cycle(makers), strict=False):
        path = folder / "media" / f"{name}_{i // len(makers)}.mp4"
        makers[name](path, i // len(makers), [clip for clip, _ in good], rng)
        planted[path] = KINDS[name][0]
    rows = [{"path": str(path), "caption": f"{scene.kind}, {scene.seconds} s"} for path, scene in good]
    rows += [{"path": str(path), "caption": ALT_TEXT} for path in planted]
    rng.shuffle(rows)
    write_text(folder / "manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "planted.json", {str(path): rule for path, rule in planted.items()})
    return RawClips(folder / "manifest.jsonl", tuple(clip for clip, _ in good), planted)


def write_clip(path: Path, pictures: Sequence[np.ndarray], fps: int, crf: int = 20) -> None:
    """Write an H.264 MP4 of uint8[height, width, 3] pictures with even sides."""
    options = {"preset": "veryfast", "mbtree": "0", "crf": str(crf)}  # mbtree differs from run to run
    write_h264(path, pictures, fps, options)


# ----------------------------------------------------------------------------------------- kinds


def _write_text_heavy(path: Path, number: int, clips: Sequence[Path], rng: random.Random) -> None:
    """Lines of text that scroll, over a page or over a clip of the corpus."""
    behind, _ = read_clip(clips[number % len(clips)])
    font = ImageFont.load_default(26)
    lines, pictures = rng.sample(_LINES, 5), []
    for i in range(FPS * SECONDS):
        page = Image.new("RGB", SIZE, (245, 245, 240))
        ink = (20, 20, 60)
        if number % 2:
            page, ink = Image.fromarray(behind[i % len(behind)]).resize(SIZE), (255, 255, 255)
        draw = ImageDraw.Draw(page)
        for k, line in enumerate(lines):
            draw.text((6, 6 + 48 * k - i // 2), line[:24], ink, font)
        pictures.append(np.asarray(page))
    write_clip(path, pictures, FPS)


def _write_still(path: Path, number: int, clips: Sequence[Path], rng: random.Random) -> None:
    """A part of a photograph, for seconds."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    picture = _crop(images[number % len(images)], rng.uniform(0.5, 0.9), rng)
    write_clip(path, [picture] * (FPS * SECONDS), FPS, crf=12)  # a coarser encoding sharpens a still over time


def _write_faces(path: Path, number: int, clips: Sequence[Path], rng: random.Random) -> None:
    """A face that fills the picture while the camera moves."""
    photos = _portraits()
    photo, (left, top, right, bottom) = photos[number % len(photos)]
    wide = (right - left) * rng.uniform(1.2, 1.5)
    high = wide * SIZE[1] / SIZE[0]
    x, y = (left + right - wide) / 2, (top + bottom - high) / 2
    pictures = []
    for i in range(FPS * SECONDS):
        shift = wide * 0.15 * np.sin(i / 5 + number)
        box = (x + shift, y + shift / 3, x + shift + wide, y + shift / 3 + high)
        pictures.append(np.asarray(Image.fromarray(photo).resize(SIZE, Image.Resampling.BILINEAR, box)))
    write_clip(path, pictures, FPS)


def _write_copy(path: Path, number: int, clips: Sequence[Path], rng: random.Random) -> None:
    """A clip of the corpus, smaller, coarser and sometimes brighter."""
    pictures, fps = read_clip(clips[number % len(clips)])
    gain = 20 * (number % 2)
    small = [np.asarray(Image.fromarray(one).resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX)) for one in pictures]
    write_clip(path, [np.minimum(one.astype(int) + gain, 255).astype(np.uint8) for one in small], fps, crf=26)


def _write_broken(path: Path, number: int, clips: Sequence[Path], rng: random.Random) -> None:
    """A truncated clip, one with overwritten pictures, a web page, and an empty file, in turn."""
    data = bytearray(clips[number % len(clips)].read_bytes())
    pictures = data.index(b"mdat") + 4
    page = b"<!doctype html><title>404</title><p>This video is no longer available.</p>"
    noise = data[:pictures] + rng.randbytes(data.index(b"moov") - 4 - pictures) + data[data.index(b"moov") - 4 :]
    path.write_bytes((data[: len(data) * 2 // 5], noise, page, b"")[number % 4])


# Kinds in the order in which they take turns: the rule that should drop each, and its writer.
KINDS: dict[str, tuple[str, Callable[[Path, int, Sequence[Path], random.Random], None]]] = {
    "text": ("text", _write_text_heavy),
    "still": ("motion", _write_still),
    "face": ("face", _write_faces),
    "copy": ("duplicate", _write_copy),
    "broken": ("broken", _write_broken),
}


# -------------------------------------------------------------------------------------- pictures


def read_clip(path: Path) -> tuple[list[np.ndarray], int]:
    """All frames, uint8[height, width, 3], and frames a second."""
    import av

    with av.open(str(path)) as container:
        fps = round(float(container.streams.video[0].average_rate or FPS))
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], fps


def _crop(picture: np.ndarray, share: float, rng: random.Random) -> np.ndarray:
    """A random part of a picture, `share` of its width, resized to the size of the bad clips."""
    height, width = picture.shape[:2]
    wide = width * share
    high = wide * SIZE[1] / SIZE[0]
    left, top = rng.uniform(0, width - wide), rng.uniform(0, max(height - high, 0))
    box = (left, top, left + wide, min(top + high, height))
    return np.asarray(Image.fromarray(picture).resize(SIZE, Image.Resampling.BILINEAR, box))


@functools.cache
def _portraits() -> list[tuple[np.ndarray, tuple[int, int, int, int]]]:
    """Photographs of people in installed packages, and the boxes of their faces (left, top, right, bottom)."""
    places = (
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", (161, 124, 362, 333)),
        ("skimage", "data/astronaut.png", (180, 70, 270, 195)),
    )
    found = []
    for package, name, face in places:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
        if path is not None and path.is_file():
            found.append((np.asarray(Image.open(path).convert("RGB")), face))
    return found
