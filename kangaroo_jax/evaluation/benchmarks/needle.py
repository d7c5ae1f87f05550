"""Needles: one coloured thing, shown for a moment of a long video. Was it shown, and was it found?

In `frame` the thing is in one of so many frames, all of which are looked at (V-NIAH, arXiv:2406.16852). In `clip` it is
on screen for some seconds of a film, so that a model which samples frames may never be shown it. In `none` there is
nothing to find: what is right there is luck. Each question is asked in four orders of its options, right only if all
are. Films are drawn, or the files `*.mp4` of the folder, a frame a second; frames are written to `needle_frames/`.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from kangaroo_jax.corpus.draw import Painter
from kangaroo_jax.corpus.scenes import CANVAS, COLOURS, SHAPES, Event, Scene, Thing
from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.evaluation.benchmarks.film import frames_of_film, written
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.system.files import make_folder

FRAMES = (16, 32, 64, 128, 160)  # that are looked at in `frame`
SECONDS = (60, 300, 1200, 3600)  # of a film in `clip`
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CLIP = 8  # seconds that the needle is on screen in `clip`
_STEP, _LONG = 1.0, 65.0  # seconds between frames; a video longer than this may have the most frames
_MIDDLE = CANVAS / 2
_CONTROLS = 24  # questions about a video without a needle


def read(folder: Path) -> Iterator[Question]:
    """All questions; the same folder gives the same ones."""
    target = make_folder(folder / "needle_frames")
    films: list[Path | None] = [*sorted(folder.glob("*.mp4"))] or [None]
    rng = random.Random(0)
    for film in films:
        stills = frames_of_film(film, target)
        name = film.stem if film else "drawn"
        for mode, count in [("frame", count) for count in FRAMES] + [("clip", count) for count in SECONDS]:
            for depth in DEPTHS:
                yield from _asked(mode, count, depth, stills, target, rng, name)
        for number in range(_CONTROLS):
            yield from _asked("none", FRAMES[2], number / _CONTROLS, stills, target, rng, name)


def _asked(
    mode: str, count: int, depth: float, stills: Sequence[str], target: Path, rng: random.Random, film: str
) -> Iterator[Question]:
    """A needle at a depth, in four orders of its options."""
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    options = [colour, *rng.sample([other for other in COLOURS if other != colour], 3)]
    length = CLIP if mode == "clip" else 1
    first = round(depth * (count - length))
    step = _STEP if mode == "clip" else max(_STEP, _LONG / (count - 1))
    frames = [stills[number % len(stills)] for number in range(count)]
    if mode != "none":
        event = Event(Thing(shape, colour), 0, 0, _MIDDLE, _MIDDLE, _MIDDLE, _MIDDLE, 66)
        needle = Painter(Scene("still", 0, (event,), 20, 7)).frame(0)
        frames[first : first + length] = [written(target / f"needle-{colour}-{shape}.png", needle)] * length
    times = tuple(round(number * step, 3) for number in range(count))
    media = (Media("video", frames[0], frames=tuple(frames), times=times),)
    unit = f"{film}/{mode}/{count}/{depth:g}"
    size = f"{count} frames" if mode != "clip" else f"{count} s"
    groups = {
        "mode": (mode,),
        "length": (size,),
        "depth": (f"{depth:.0%}" if mode != "none" else "none",),
        "film": (film,),
    }
    seen = [times[first], times[first + length - 1]] if mode != "none" else []
    for turn in range(4):
        turned = tuple(options[turn:] + options[:turn])
        letter = "ABCD"[turned.index(colour)]
        yield Question(f"{unit}/{turn}", media, "", turned, letter, groups=groups, unit=unit, row={"needle": seen})


NEEDLE = Benchmark(
    name="needle",
    title="Needles",
    read=read,
    fetch="nothing, or films of yours as DATA/needle/*.mp4; frames are written beside them",
    licence="generated",
    size="some MB",
    questions=0,
    wordings=WORDINGS["needle"],
    readings={},
    note="a diagnostic of ours; a question is right only if it is in all four orders of its options",
)
