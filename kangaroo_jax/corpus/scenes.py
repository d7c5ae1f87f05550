"""The content of generated images and videos, before anything is drawn or written about it.

A `Scene` is plain data: things, and when and where they are visible. Pixels (`draw`) and words (`text`) are both
functions of it. Coordinates are pixels of the 96 x 96 canvas, times are seconds.

Held out from training are scans of handwritten digits (the caller passes disjoint pools), one colour of every thing,
and one direction of motion of every thing. In evaluation every digit is a held-out scan, and half of the things have
their held-out colour.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

CANVAS = 96
COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
DIGITS = tuple("0234567")  # 8 x 8 scans of 1, 8 and 9 look too much like each other and like 5 and 7
SHAPES = ("circle", "triangle", "cross", "ring", "bar")
THINGS = DIGITS + SHAPES
DIRECTIONS = ("left", "right", "up", "down")
PLACES = ("left", "right", "top", "bottom")
SHORT_SECONDS = (2, 4, 6, 8, 10, 12, 14, 16)
LONG_SECONDS = (70, 90, 110, 130, 150)
MARK = 10  # things of a long video are on screen around a multiple of this many seconds
BEFORE_MARK = (2, 3, 4)  # seconds from which they appear before it
HELD_SHARE = 0.5  # share of things in evaluation scenes with their held-out colour, and of held-out moves
SPLITS = ("train", "eval", "any")


@dataclasses.dataclass(frozen=True)
class Thing:
    """A digit or a shape in a colour; `scan` numbers the handwritten scan (-1 for a shape)."""

    name: str
    colour: str
    scan: int = -1


@dataclasses.dataclass(frozen=True)
class Event:
    """A thing on screen from `start` to `end` seconds; its centre moves in a line from (x0, y0) to (x1, y1)."""

    thing: Thing
    start: float
    end: float
    x0: float
    y0: float
    x1: float
    y1: float
    size: float

    def at(self, seconds: float) -> tuple[float, float]:
        """Centre of the thing at a time inside the event, in pixels."""
        share = (seconds - self.start) / max(self.end - self.start, 1e-6)
        return self.x0 + share * (self.x1 - self.x0), self.y0 + share * (self.y1 - self.y0)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image (`seconds` 0) or video.

    `kind` is still, aside, move, count, order, recolour, transform, appear, disappear or long. `background` is the
    grey level behind everything, `drift` the start and end centre of the dim square that wanders through
    some long videos, `seed` that of the static noise.
    """

    kind: str
    seconds: int
    events: tuple[Event, ...]
    background: int
    seed: int
    direction: str = ""
    drift: tuple[float, float, float, float] | None = None

    def seen(self, seconds: float) -> tuple[Event, ...]:
        """The events on screen at a time."""
        if not self.seconds:
            return self.events
        return tuple(e for e in self.events if e.start <= seconds < e.end)


def held_colour(name: str) -> str:
    """The colour that a thing never has in training."""
    return COLOURS[-THINGS.index(name) % len(COLOURS)]


def held_direction(name: str) -> str:
    """The direction in which a thing is never seen moving in training."""
    return DIRECTIONS[THINGS.index(name) % len(DIRECTIONS)]


def has_held_combination(scene: Scene) -> bool:
    """Whether a scene shows a thing in a colour, or in a direction of motion, that it never has in training."""
    names = [event.thing.name for event in scene.events]
    coloured = any(event.thing.colour == held_colour(event.thing.name) for event in scene.events)
    return coloured or (scene.kind == "move" and scene.direction == held_direction(names[0]))


class SceneMaker:
    """Makes random scenes of one split; the split "any" holds nothing out and favours nothing.

    `scans` maps each digit to the indices of the scans that this split may use; all randomness comes from `rng`.
    """

    def __init__(self, split: str, scans: Mapping[str, Sequence[int]], rng: random.Random):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
        self.split, self.scans, self.rng = split, scans, rng

    def make(self, kind: str) -> Scene:
        """A random scene of a kind; `image`, `image_aside` and `image_count` are stills of 0 seconds."""
        maker: dict[str, Callable[[], Scene]] = {
            "image": lambda: self._still(0),
            "image_aside": self._aside,
            "image_count": lambda: self._count(0),
            "still": lambda: self._still(self.rng.choice(SHORT_SECONDS)),
            "count": lambda: self._count(self.rng.choice(SHORT_SECONDS)),
            "move": self._move,
            "order": self._order,
            "recolour": self._change,
            "transform": lambda: self._change(colour=False),
            "appear": self._appear,
            "disappear": lambda: self._appear(backwards=True),
            "long": self._long,
        }
        if kind not in maker:
            raise ValueError(f"unknown kind of scene {kind!r}: one of {', '.join(maker)}")
        return maker[kind]()

    def colour(self, name: str, avoid: Sequence[str] = ()) -> str:
        """A colour that the split may show this thing in."""
        held = held_colour(name)
        if self.split == "eval" and self.rng.random() < HELD_SHARE and held not in avoid:
            return held
        return self.rng.choice([c for c in COLOURS if c not in avoid and (self.split != "train" or c != held)])

    def thing(self, avoid: Sequence[Thing] = (), digits: float = 0.5) -> Thing:
        """A random thing whose name and colour differ from those of `avoid`; a digit with probability `digits`."""
        taken = {t.name for t in avoid}
        pool = DIGITS if self.rng.random() < digits else SHAPES
        name = self.rng.choice([n for n in pool if n not in taken])
        colour = self.colour(name, [t.colour for t in avoid])
        return Thing(name, colour, self.rng.choice(self.scans[name]) if name in DIGITS else -1)

    def _scene(self, kind: str, seconds: int, events: Sequence[Event], direction: str = "") -> Scene:
        return Scene(kind, seconds, tuple(events), self.rng.randint(10, 34), self.rng.getrandbits(31), direction)

    def _event(self, thing: Thing, start: float, end: float, spread: float = 4) -> Event:
        """A large thing that stays near the middle."""
        x, y = (CANVAS / 2 + self.rng.uniform(-spread, spread) for _ in range(2))
        return Event(thing, start, end, x, y, x, y, self.rng.uniform(62, 70))

    def _cuts(self, seconds: int, parts: int) -> list[int]:
        """The times at which a clip's parts begin and the last ends: whole seconds, even ones from 8 seconds up."""
        step = 2 if seconds >= 8 else 1
        shift = step * self.rng.randint(-(seconds // 16), seconds // 16)
        return [0, *(step * round(seconds * i / parts / step) + shift for i in range(1, parts)), seconds]

    def _still(self, seconds: int) -> Scene:
        return self._scene("still", seconds, [self._event(self.thing(), 0, seconds)])

    def _aside(self) -> Scene:
        """An image with a thing at a position where a moving one begins or ends."""
        thing, place = self.thing(), self.rng.choice(PLACES)
        near, far, across = self.rng.uniform(22, 27), self.rng.uniform(69, 74), CANVAS / 2 + self.rng.uniform(-6, 6)
        along = near if place in ("left", "top") else far
        x, y = (along, across) if place in ("left", "right") else (across, along)
        return self._scene("aside", 0, [Event(thing, 0, 0, x, y, x, y, self.rng.uniform(48, 54))], direction=place)

    def _count(self, seconds: int) -> Scene:
        """One to four equal things, each in its own quarter."""
        thing, size = self.thing(digits=0), self.rng.uniform(30, 36)  # digits would be too small to read
        quarters = self.rng.sample(range(4), self.rng.randint(1, 4))
        events = []
        for quarter in sorted(quarters):
            x, y = (48 * place + 24 + self.rng.uniform(-4, 4) for place in (quarter % 2, quarter // 2))
            events.append(Event(thing, 0, seconds, x, y, x, y, size))
        return self._scene("count", seconds, events)

    def _move(self) -> Scene:
        thing, seconds = self.thing(), self.rng.choice(SHORT_SECONDS)
        held = held_direction(thing.name)
        if self.split == "eval" and self.rng.random() < HELD_SHARE:
            direction = held
        else:
            direction = self.rng.choice([d for d in DIRECTIONS if self.split != "train" or d != held])
        near, far = self.rng.uniform(22, 27), self.rng.uniform(69, 74)
        start, end = (near, far) if direction in ("right", "down") else (far, near)
        across = CANVAS / 2 + self.rng.uniform(-6, 6)
        path = (start, across, end, across) if direction in ("left", "right") else (across, start, across, end)
        event = Event(thing, 0, seconds, *path, self.rng.uniform(48, 54))
        return self._scene("move", seconds, [event], direction=direction)

    def _order(self) -> Scene:
        seconds = self.rng.choice(SHORT_SECONDS[1:])
        things: list[Thing] = []
        for _ in range(3 if seconds >= 8 and self.rng.random() < 0.3 else 2):
            things.append(self.thing(avoid=things))
        cuts = self._cuts(seconds, len(things))
        events = [self._event(t, cuts[i], cuts[i + 1]) for i, t in enumerate(things)]
        return self._scene("order", seconds, events)

    def _change(self, colour: bool = True) -> Scene:
        seconds, before = self.rng.choice(SHORT_SECONDS), self.thing()
        cut = self._cuts(seconds, 2)[1]
        if colour:
            after = dataclasses.replace(before, colour=self.colour(before.name, [before.colour]))
        else:
            after = self.thing(avoid=[before])
        first = self._event(before, 0, cut)
        return self._scene(
            "recolour" if colour else "transform",
            seconds,
            [first, dataclasses.replace(first, thing=after, start=cut, end=seconds)],
        )

    def _appear(self, backwards: bool = False) -> Scene:
        seconds = self.rng.choice(SHORT_SECONDS)
        cut = self._cuts(seconds, 2)[1]
        span = (0, cut) if backwards else (cut, seconds)
        return self._scene("disappear" if backwards else "appear", seconds, [self._event(self.thing(), *span)])

    def _long(self) -> Scene:
        seconds = self.rng.choice(LONG_SECONDS)
        count = self.rng.randint(1, 3)
        while True:  # marks at least two apart, so that no two things are on screen together
            marks = sorted(self.rng.sample(range(1, seconds // MARK), count))
            if all(b - a >= 2 for a, b in zip(marks, marks[1:], strict=False)):
                break
        things: list[Thing] = []
        events = []
        for mark in marks:
            things.append(self.thing(avoid=things))
            length, before = self.rng.randint(6, 8), self.rng.choice(BEFORE_MARK)
            start = mark * MARK - before
            events.append(self._event(things[-1], start, start + length))
        scene = self._scene("long", seconds, events)
        if self.rng.random() < 0.5:
            x0, y0, x1, y1 = (self.rng.uniform(8, CANVAS - 8) for _ in range(4))
            scene = dataclasses.replace(scene, drift=(x0, y0, x1, y1))
        return scene
