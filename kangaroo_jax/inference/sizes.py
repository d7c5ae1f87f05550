"""The shapes that the engine's programs are compiled for, from which their number is known."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

TAIL = 64  # tokens of a conversation that a step may write; the others it only reads

Key = tuple[Any, ...]  # a program's name and sizes
Rows = tuple[tuple[int, int], ...]  # of a decode step: (tokens of their large parts, how many), ascending

_PADDED = 4  # times as many rows as there are conversations, in smaller classes beside a larger one


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes that programs are compiled for.

    `classes`: (tokens of a slot's large part, slots) of each class, ascending; of these tokens `spare` are never
    relied on, so that every write fits. Raises ValueError where a class has more slots than a step has rows.
    """

    classes: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...] = (128, 512)  # tokens of a prompt read at a time, ascending
    visible: tuple[int, ...] = (512, 2048, 4096, 8192, 16_384)  # how far a chunk looks back, beside all and none
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)  # conversations of a decode step
    frames: int = 16  # that the ViT sees at a time

    def __post_init__(self) -> None:
        most = max(count for _, count in self.classes)
        if most > self.rows[-1]:
            raise ValueError(f"{most} slots of one class, but a step has {self.rows[-1]} rows")

    @classmethod
    def for_context(cls, tokens: int, slots: int = 4) -> "Sizes":
        """Slots for `slots` conversations of `tokens` tokens, and as many of an eighth of that where it is long."""
        spare, large = 128, -(-tokens // 128) * 128
        classes = [(large + spare, slots)]
        if large >= 4096:
            classes.insert(0, (-(-large // 1024) * 128 + spare, slots))
        return cls(tuple(classes))

    @property
    def spare(self) -> int:
        """Tokens at the end of a large part that are only written."""
        return max(self.chunks[0], TAIL)

    def lookbacks(self, capacity: int) -> list[int]:
        """How far a chunk may look back in a class."""
        return [0, *(length for length in self.visible if length < capacity), capacity]

    def chunk(self, rest: int, start: int, capacity: int) -> int:
        """The size of the chunk to read next, where `rest` tokens are left and `start` are there."""
        fitting = [size for size in self.chunks if size <= rest and start + size <= capacity]
        return fitting[-1] if fitting else self.chunks[0]

    @property
    def most_rows(self) -> int:
        """That a decode step may have, of all classes together."""
        return sum(self._row_counts(count)[-1] for _, count in self.classes)

    def step(self, conversations: Mapping[int, int]) -> Rows:
        """The rows of a step for so many conversations of each class; classes without any are left out."""
        there = [(capacity, count, conversations[capacity]) for capacity, count in self.classes]
        present = [one for one in there if one[2]]
        return tuple(
            (capacity, next(rows for rows in self._choices(count, capacity == present[-1][0]) if rows >= wanted))
            for capacity, count, wanted in present
        )

    def steps(self) -> list[Rows]:
        """The rows of every step that there may be.

        Beside rows of a larger class those of smaller ones, which cost little, come in few numbers.
        """
        found: list[Rows] = []
        for last, (capacity, count) in enumerate(self.classes):
            smaller = [
                [(), *((other, rows) for rows in self._choices(others, False))] for other, others in self.classes[:last]
            ]
            for most in self._choices(count, True):
                for before in itertools.product(*smaller):
                    found.append((*(one for one in before if one), (capacity, most)))  # type: ignore[arg-type]
        return found

    def _choices(self, count: int, largest: bool) -> list[int]:
        """Numbers of rows of a class with so many slots, ascending; `largest`: no larger class is in the step."""
        every = self._row_counts(count)
        chosen = every if largest else every[-1:]
        while not largest and (fewer := [rows for rows in every if rows * _PADDED <= chosen[0]]):
            chosen = [fewer[-1], *chosen]
        return chosen

    def _row_counts(self, count: int) -> list[int]:
        most = next(rows for rows in self.rows if rows >= count)
        return [rows for rows in self.rows if rows <= most]

    def keys(self, image_size: int) -> list[Key]:
        """Every program's name and sizes, for frames of so many pixels a side."""
        keys: list[Key] = [("encode", image_size)]
        keys += [("decode", *itertools.chain(*rows)) for rows in self.steps()]
        for capacity, _ in self.classes:
            fitting = [size for size in self.chunks if size <= capacity]  # `chunk` gives no other
            keys += [("extend", capacity, size, far) for size in fitting for far in self.lookbacks(capacity)]
            keys += [("flush", capacity), ("score", capacity)]
            keys += [("copy", capacity, other) for other, _ in self.classes]
        return keys
