"""Decides by hashes which caption becomes which kind of conversation, independently of the results."""

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.config_files import nearest
from kangaroo_jax.curation.instruct.taxonomy import CAPTION_TASKS, TASKS, TYPES
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.text import LANGUAGES

CaptionRow = Mapping[str, Any]  # an object of captions.jsonl
Cell = tuple[str, str]  # task, language


@dataclasses.dataclass(frozen=True)
class PlannedConversation:
    """A conversation to be made: `number` counts those of its task and language, `types` are keys of `TYPES`."""

    task: str
    language: str
    number: int
    row: CaptionRow = dataclasses.field(hash=False)
    types: tuple[str, ...] = ()
    seed: int = 0

    @property
    def id(self) -> str:
        """The id of the record."""
        return f"{self.row['clip']}-{self.task}-{self.language}-{self.number}"


def cells_of(config: ConfigDict) -> dict[Cell, float]:
    """Shares by task and language, without those that are 0. Raises UserError for an unknown or negative one."""
    known = {f"{task}_{language}": (task, language) for task in TASKS for language in LANGUAGES}
    cells = {}
    for name, share in config.shares.items():
        if name not in known:
            raise UserError(f"config.shares: no task {name!r}{nearest(name, known)}; there are {', '.join(known)}")
        if share < 0:
            raise UserError(f"config.shares.{name} is {share:g}: a share is not negative")
        if share:
            cells[known[name]] = float(share)
    if not cells:
        raise UserError("config.shares: all are 0")
    return cells


def targets(cells: Mapping[Cell, float], samples: int) -> dict[Cell, int]:
    """The number of conversations of each cell, `samples` in total, by largest remainder."""
    total = sum(cells.values())
    exact = {cell: samples * share / total for cell, share in cells.items()}
    counts = {cell: int(value) for cell, value in exact.items()}
    rest = sorted(exact, key=lambda cell: (counts[cell] - exact[cell], cell))
    for cell in rest[: samples - sum(counts.values())]:
        counts[cell] += 1
    return counts


def types_of(config: ConfigDict) -> tuple[str, ...]:
    """The question types of a config. Raises UserError for an unknown one."""
    for key in config.types:
        if key not in TYPES:
            raise UserError(f"config.types: no type {key!r}{nearest(key, TYPES)}; there are {', '.join(TYPES)}")
    return tuple(config.types) or tuple(TYPES)


def slots(cell: Cell, rows: Sequence[CaptionRow], config: ConfigDict) -> Iterator[PlannedConversation]:
    """All conversations that can be made from the captions of one language, in the order in which they are tried.

    Every caption is used once before any is used again, then with another question type; the types take turns.
    A caption serves as an answer only once.
    """
    task, language = cell
    keyed = ((_hash(f"{config.seed}/{task}/{row['id']}"), row) for row in rows if row["language"] == language)
    ordered = [row for _, row in sorted(keyed, key=lambda pair: (pair[0], pair[1]["id"]))]
    types = types_of(config)
    for turn in range(1 if task in CAPTION_TASKS else len(types)):
        for place, row in enumerate(ordered):
            number = turn * len(ordered) + place
            seed = _hash(f"{config.seed}/{task}/{language}/{row['id']}/{turn}")
            asked: tuple[str, ...] = ()
            if task not in CAPTION_TASKS:
                count = 1
                if task == "multi":
                    count = random.Random(seed).randint(config.min_rounds, config.max_rounds)
                asked = tuple(types[(place + turn + i) % len(types)] for i in range(min(count, len(types))))
            yield PlannedConversation(task, language, number, row, asked, seed)


def letters(count: int, options: int, seed: int) -> list[str]:
    """Answer letters for `count` questions: every run of `options` holds each letter once, in random order."""
    rng, found = random.Random(seed), list[str]()
    while len(found) < count:
        found += rng.sample("ABCDEFGH"[:options], options)
    return found[:count]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
