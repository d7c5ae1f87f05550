"""Annotation files with random access: JSON, JSONL, Parquet, WebDataset tar shards, built datasets.

Records are read and checked when a file is opened, so that mistakes are reported before training begins and not days
into it. All are checked, or, in a large file, CHECKED evenly spaced ones; a mistake in another record is found when it
is drawn. (Built datasets were checked when they were written.)
"""

import collections
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.annotations.format_media import Parsed
from kangaroo_jax.data.annotations.formats import FORMATS, Columns
from kangaroo_jax.data.annotations.parquet import ParquetRecords
from kangaroo_jax.data.annotations.readers import text_reader
from kangaroo_jax.data.annotations.webdataset import Unfinished, WebDataset
from kangaroo_jax.data.media.addresses import is_remote, short
from kangaroo_jax.data.media.storage import local
from kangaroo_jax.errors import UserError, printable

CHECKED = 20_000  # records of a file that are read when it is opened, at most


def read_conversations(paths: Sequence[str | Path], media_root: str | Path = "") -> Iterator[Conversation]:
    """The conversations of annotation files, one after another.

    Args:
        paths: annotation files, see `AnnotationFile`.
        media_root: folder of the media that they name; "" is each file's own folder.

    Raises:
        UserError: naming file and line (or item) of a record in no known format.
    """
    for path in paths:
        source = AnnotationFile(path, media_root)
        for i in range(len(source)):
            yield source[i]


class _Reader(Protocol):
    """Records of one kind of file."""

    name: str  # the kind of file
    files: list[Path]  # the files that it reads

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Parsed: ...


class AnnotationFile:
    """Conversations of one file, by index. The kind of file and the record format are detected.

    `.json` and `.jsonl` (also `.gz`), `.csv`, `.tsv`, `.parquet`, `.tar` (also `shard-{000..012}.tar` and patterns with
    `*`), or the folder that `kangaroo data build` wrote. Addresses are fetched.
    """

    def __init__(
        self, path: str | Path, media_root: str | Path = "", *, columns: Columns | None = None, check: bool = True
    ) -> None:
        """Open the file; with `check`, also read up to CHECKED records once.

        Raises:
            UserError: naming file and line (or item) of the first wrong record, and how many there are. Samples that
                a failed download left in a tar (no caption or no medium) count only if there are no others.
        """
        self.path = str(path)
        self.formats: collections.Counter[str] = collections.Counter()
        self.ignored: set[str] = set()
        self.notes: collections.Counter[str] = collections.Counter()
        file = str(local(path))
        root = str(media_root) or (os.path.dirname(self.path) if is_remote(path) else os.path.dirname(file))
        self._reader = _open(self.path, file, root or ".", columns)
        if not len(self._reader):
            raise UserError(f"{path}: no conversations in this file")
        if check:
            self._check(evenly(len(self), 1 if isinstance(self._reader, _Built) else CHECKED))

    def _check(self, numbers: Sequence[int]) -> None:
        found = [error for error in map(self.look_at, numbers) if isinstance(error, UserError)]
        wrong = [error for error in found if not isinstance(error, Unfinished)]
        if wrong or len(found) == len(numbers):
            first, more = (wrong or found)[0], len(wrong or found) - 1
            also = (
                f"; {more:,} more of {len(numbers):,} records are wrong: kangaroo data check lists them" if more else ""
            )
            raise UserError(f"{first}{also}")

    def look_at(self, index: int) -> Conversation | UserError:
        """Conversation `index`, or the error in it. Its format and its notes are counted."""
        try:
            parsed = self._reader[index]
        except UserError as error:
            return error
        self.formats[parsed.format] += 1
        self.ignored |= parsed.ignored
        self.notes.update(parsed.notes)
        return parsed.conversation

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`, parsed anew. Raises UserError."""
        return self._reader[index].conversation

    @property
    def bytes(self) -> int:
        """Size of the annotation files."""
        return sum(file.stat().st_size for file in self._reader.files)

    def describe(self) -> str:
        """One line: the number of records and their formats."""
        if isinstance(self._reader, _Built):
            return f"{short(self.path)}: {len(self):,} samples, ArrayRecord shards of kangaroo data build"
        kinds = ", ".join(
            FORMATS[name] + (f" ({count:,})" if len(self.formats) > 1 else "")
            for name, count in self.formats.most_common()
        )
        if 0 < self.formats.total() < len(self):
            kinds += f" in {self.formats.total():,} of them, which were checked"
        unread = f"; ignored: {printable(', '.join(sorted(self.ignored)))}" if self.ignored else ""
        passed = getattr(self._reader, "passed_over", 0)
        unread += f"; {passed:,} files that belong to no sample are passed over" if passed else ""
        return f"{short(self.path)}: {len(self):,} samples, {self._reader.name}{', ' if kinds else ''}{kinds}{unread}"


def evenly(count: int, most: int) -> list[int]:
    """All of 0..count-1, or `most` of them, evenly chosen, the first and the last among them."""
    if count <= most:
        return list(range(count))
    spread: list[int] = np.linspace(0, count - 1, most).round().astype(int).tolist()
    return spread


def _open(path: str, file: str, root: str, columns: Columns | None) -> _Reader:
    if os.path.isdir(file):
        if os.path.exists(os.path.join(file, "dataset_info.json")) and os.path.exists(
            os.path.join(file, "features.json")
        ):
            return _Built(file, root)
        versions = sorted(glob.glob(os.path.join(glob.escape(file), "*", "dataset_info.json")))
        hint = f"; {os.path.join(path, os.path.basename(os.path.dirname(versions[-1])))} is one" if versions else ""
        raise UserError(f"{path}: a folder is read only if kangaroo data build or curate export wrote it{hint}")
    name = file.lower()
    if name.endswith(".parquet"):
        return ParquetRecords(file, root, columns)
    if name.endswith(".tar"):
        return WebDataset(file, root, columns)
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")):
        raise UserError(
            f"{path}: unpack it first; of archives only .tar is read, without compression, as WebDataset has it"
        )
    return text_reader(path, file, root, columns)


class _Built:
    """ArrayRecord shards that `kangaroo data build` wrote."""

    name = "ArrayRecord"

    def __init__(self, folder: str, root: str) -> None:
        from kangaroo_jax.data.annotations.dataset import BuiltDataset

        self._dataset = BuiltDataset(folder, root)
        self.files = self._dataset.files

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Parsed:
        return Parsed(self._dataset[index], "built")
