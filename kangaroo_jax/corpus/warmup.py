"""Lessons of the text warm-up, from simple to hard: they replace the pretraining of a decoder of a million weights.

Multiple choice on a video needs two skills: finding the answer in the given content, and the link between a letter and
its option. A decoder of this size hardly ever learns the second from scenes at the start. It learns both in minutes if
few words come first (six colours, two options, one language) and both skills are taught side by side. Then come more
options, all words, the other language, longer notes, and multiple choice on notes.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

from kangaroo_jax.corpus.scenes import COLOURS, SceneMaker
from kangaroo_jax.corpus.text import LANGUAGES, Turn, ask, describe, drill, note, some_facts

IMAGE = (("image", 1.0),)
IMAGES = (("image", 1.0), ("image_aside", 1.0), ("image_count", 1.0))
SHORT: tuple[tuple[str, float], ...] = ()  # a placeholder for the corpus's kinds of short clips
ORDER = (("order", 1.0),)
EN, ZH = ("en",), ("zh",)


@dataclasses.dataclass(frozen=True)
class Drill:
    """Questions on 2 to 4 options alone, with words from `pool` (empty: words of any sort).

    A share `every` of them asks for all options (`Name them.`), the others for one (`Which is red?`).
    """

    options: tuple[int, ...] = (2, 3, 4, 4)
    pool: tuple[str | int, ...] = ()
    languages: tuple[str, ...] = LANGUAGES
    every: float = 0.5

    def turns(self, maker: SceneMaker, rng: random.Random, short_kinds: Sequence[tuple[str, float]]) -> list[Turn]:
        """One question and its letter."""
        del maker, short_kinds
        language, every = rng.choice(self.languages), rng.random() < self.every
        return [drill(language, rng, self.pool, rng.choice(self.options), every)]


@dataclasses.dataclass(frozen=True)
class Note:
    """A scene written out, and up to `rounds` questions on it, of which a share `multiple_choice` has options.

    `scenes` are kinds and weights; None means all: images, short clips and long videos. With `describe` a share
    of the conversations also has a description.
    """

    scenes: tuple[tuple[str, float], ...] | None = None
    rounds: int = 1
    multiple_choice: float = 0.0
    describe: float = 0.3
    languages: tuple[str, ...] = LANGUAGES

    def turns(self, maker: SceneMaker, rng: random.Random, short_kinds: Sequence[tuple[str, float]]) -> list[Turn]:
        """Rounds in random order, the first of which begins with the note."""
        language = rng.choice(self.languages)
        everything: list[Sequence[tuple[str, float]]] = [IMAGES, short_kinds, (("long", 1.0),)]
        scenes = rng.choices(everything, weights=(0.3, 0.5, 0.2))[0] if self.scenes is None else self.scenes
        names, weights = zip(*(scenes or short_kinds), strict=True)
        scene = maker.make(rng.choices(names, weights)[0])
        chosen = some_facts(scene, self.rounds, rng)
        asked = [ask(fact, language, rng, "?" if rng.random() < self.multiple_choice else "") for fact in chosen]
        turns = [(question.text, question.told) for question in asked]
        if rng.random() < self.describe:
            turns.append(describe(scene, language, bool(scene.seconds) and rng.random() < 0.5))
        rng.shuffle(turns)
        return [(note(scene, language) + "\n" + turns[0][0], turns[0][1]), *turns[1:]]


Mix = tuple[tuple[float, Drill | Note], ...]
# (records at scale 1, the sources that they are drawn from with weights)
LESSONS: tuple[tuple[int, Mix], ...] = (
    (2_500, ((1, Drill((2,), COLOURS, EN)),)),
    (4_000, ((1, Drill((2, 3, 4, 4), COLOURS, EN)),)),
    (7_000, ((1, Drill((2, 3, 4, 4), COLOURS, EN)), (2, Drill(languages=EN)), (1, Note(IMAGE, 2, languages=EN)))),
    (3_000, ((2, Drill((2, 3, 4, 4), COLOURS, ZH)), (1, Drill(languages=EN)))),
    (12_000, ((1, Drill(every=0.7)),)),
    (14_000, ((2, Drill((3, 4, 4), every=0.7)), (1, Note(IMAGES, 3, 0.6)))),
    (35_500, ((1, Drill()), (0.6, Note(IMAGES, 3, 0.6)), (2, Note(None, 4, 0.5)), (1, Note(ORDER, 4, 0.4)))),
)


def warmup_turns(
    maker: SceneMaker,
    rng: random.Random,
    short_kinds: Sequence[tuple[str, float]],
    records: Callable[[int], int] = lambda count: count,
) -> Iterator[tuple[str, list[Turn]]]:
    """(name, turns) of each conversation, in order; `records` changes the number of each lesson."""
    for number, (count, _) in enumerate(LESSONS):
        for i, turns in enumerate(lesson(number, records(count), maker, rng, short_kinds)):
            yield f"warmup-{number}-{i:06d}", turns


def lesson(
    number: int, count: int, maker: SceneMaker, rng: random.Random, short_kinds: Sequence[tuple[str, float]]
) -> Iterator[list[Turn]]:
    """`count` conversations of lesson `number` (-1 is the last)."""
    weights, sources = zip(*LESSONS[number][1], strict=True)
    for source in rng.choices(sources, weights, k=count):
        yield source.turns(maker, rng, short_kinds)
