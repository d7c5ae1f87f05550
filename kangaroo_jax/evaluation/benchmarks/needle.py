"""Needles: one coloured thing, shown for a moment of a long video. Was it shown, and was it found?

`needle` asks for its colour, `needle-time` for the second at which it appears, of the same videos.

In `frame` the thing is in one of so many frames, all of which are looked at (V-NIAH, arXiv:2406.16852). In `clip` it is
on screen for some seconds of a film, so that a model which samples frames may never be shown it. In `none` there is
nothing to find: what is right there is luck. Each question is asked in four orders of its options, right only if all
are. Films are drawn, or the files `*.mp4` of the folder, a frame a second; frames are written to `needle_frames/`.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


class _Needle(NamedTuple):
    """A video with a needle at a depth, or without one."""

    unit: str
    media: tuple[Media, ...]
    groups: Mapping[str, tuple[str, ...]]
    colours: tuple[str, ...]  # its own first, then three others
    seconds: tuple[int, ...]  # at which it appears, then three others
    seen: tuple[float, ...]  # the first and the last second that it is on screen


def read(folder: Path) -> Iterator[Question]:
    """All questions about colours; the same folder gives the same ones."""
    for needle in _needles(folder):
        yield from _in_four_orders(needle, needle.colours)


def read_times(folder: Path) -> Iterator[Question]:
    """All questions about seconds; the same folder gives the same ones."""
    for needle in _needles(folder):
        yield from _in_four_orders(needle, tuple(f"{second} seconds" for second in needle.seconds))


def _in_four_orders(needle: _Needle, options: tuple[str, ...]) -> Iterator[Question]:
    for turn in range(4):
        turned, letter = options[turn:] + options[:turn], "ADCB"[turn]
        name = f"{needle.unit}/{turn}"
        row = {"needle": list(needle.seen)}
        yield Question(name, needle.media, "", turned, letter, groups=needle.groups, unit=needle.unit, row=row)


def _needles(folder: Path) -> Iterator[_Needle]:
    target = make_folder(folder / "needle_frames")
    films: list[Path | None] = [*sorted(folder.glob("*.mp4"))] or [None]
    rng, others = random.Random(0), random.Random(1)
    for film in films:
        stills = frames_of_film(film, target)
        name = film.stem if film else "drawn"
        for mode, count in [("frame", count) for count in FRAMES] + [("clip", count) for count in SECONDS]:
            for depth in DEPTHS:
                yield _needle(mode, count, depth, stills, target, rng, others, name)
        for number in range(_CONTROLS):
            yield _needle("none", FRAMES[2], number / _CONTROLS, stills, target, rng, others, name)


def _needle(
    mode: str,
    count: int,
    depth: float,
    stills: Sequence[str],
    target: Path,
    rng: random.Random,
    others: random.Random,
    film: str,
) -> _Needle:
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    colours = (colour, *rng.sample([other for other in COLOURS if other != colour], 3))
    length = CLIP if mode == "clip" else 1
    step = _STEP if mode == "clip" else max(_STEP, _LONG / (count - 1))
    first = round(depth * (count - length))
    frames = [stills[number % len(stills)] for number in range(count)]
    if mode != "none":
        event = Event(Thing(shape, colour), 0, 0, _MIDDLE, _MIDDLE, _MIDDLE, _MIDDLE, 66)
        needle = Painter(Scene("still", 0, (event,), 20, 7)).frame(0)
        frames[first : first + length] = [written(target / f"needle-{colour}-{shape}.png", needle)] * length
    times = tuple(round(number * step, 3) for number in range(count))
    moments = [round(times[round(other * (count - length))]) for other in DEPTHS]
    place = DEPTHS.index(depth) if mode != "none" else others.randrange(len(DEPTHS))
    size = f"{count} frames" if mode != "clip" else f"{count} s"
    return _Needle(
        f"{film}/{mode}/{count}/{depth:g}",
        (Media("video", frames[0], frames=tuple(frames), times=times),),
        {
            "mode": (mode,),
            "length": (size,),
            "depth": (f"{depth:.0%}" if mode != "none" else "none",),
            "film": (film,),
        },
        colours,
        (moments.pop(place), *others.sample(moments, 3)),
        (times[first], times[first + length - 1]) if mode != "none" else (),
    )


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
NEEDLE_TIME = dataclasses.replace(
    NEEDLE,
    name="needle-time",
    title="Needles: when",
    read=read_times,
    wordings=WORDINGS["needle-time"],
    note="a diagnostic of ours; the options are the seconds of four of its depths; right only in all four orders",
)
