"""Checks records: each is read; unreadable ones are errors, odd ones are notes."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.batches.mixture import Source
from kangaroo_jax.data.batches.sample import annotated_seconds
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.video import clip_range
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_objects
from kangaroo_jax.system.progress import Tell

_WRONG_DURATION = 0.1  # share of a file's length
SHOWN = 20  # wrong records that are printed, of each kind of mistake


@dataclasses.dataclass(frozen=True)
class _Clip:
    """A stretch of a video that a record asks for, in seconds."""

    where: str
    path: str
    start: float | None
    end: float | None
    duration: float | None  # the whole file's stated length, if training relies on it


class Records:
    """The conversations of all sources; wrong records are printed (the first SHOWN), counted, and left out."""

    def __init__(self, sources: Sequence[Source], tell: Tell = print) -> None:
        self._sources, self._tell = sources, tell
        self._clips: list[_Clip] = []
        self.wrong = 0

    def __iter__(self) -> Iterator[Conversation]:
        """Every readable conversation, once; the files then know their formats."""
        for source in self._sources:
            for i in range(len(source.file)):
                found = source.file.look_at(i)
                if isinstance(found, UserError):
                    self._bad(str(found))
                    continue
                for medium in found.media:
                    duration = annotated_seconds(medium)
                    if medium.kind == "video" and not medium.frames and (medium.start or medium.end or duration):
                        where = f"{short(source.file.path)}, sample {found.id!r}"
                        self._clips.append(_Clip(where, medium.path, medium.start, medium.end, duration))
                yield found

    def _bad(self, reason: str) -> None:
        self.wrong += 1
        if self.wrong <= SHOWN:
            self._tell(f"BAD {reason}")

    def check_clips(self, report: Path) -> None:
        """Count the records whose `start` and `end` leave nothing of a video, or whose `duration` isn't the file's.

        The lengths come from the report of `check_media`.
        """
        if not self._clips:
            return
        seconds = {}
        for row in read_objects(report):
            if not row["problems"]:
                seconds[row["path"]] = row["stated_seconds"] or row["seconds"]
        for clip in self._clips:
            if clip.path in seconds:
                true = seconds[clip.path]
                if clip.duration is not None and abs(clip.duration - true) > _WRONG_DURATION * true:
                    name = short(clip.path)
                    self._bad(f"{clip.where}: 'duration' is {clip.duration:g} s, but {name} is {true:g} s long")
                try:
                    clip_range(short(clip.path), seconds[clip.path], clip.start, clip.end)
                except UserError as error:
                    self._bad(f"{clip.where}: {error}")

    def summary(self) -> None:
        """Print a line for each source, what is odd about its records, and how many were wrong."""
        notes: collections.Counter[str] = collections.Counter()
        for source in self._sources:
            self._tell(source.file.describe())
            notes.update(source.file.notes)
        for note, count in notes.most_common():
            self._tell(f"note: {count:,} records: {note}")
        if self.wrong:
            total = sum(len(source.file) for source in self._sources)
            unseen = f", the first {SHOWN} are above" if self.wrong > SHOWN else ""
            self._tell(f"{self.wrong:,} of {total:,} records are wrong{unseen}")
