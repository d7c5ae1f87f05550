"""JSONL files of clips and captions. A file is written whole or not at all."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.data.media import storage
from kangaroo_jax.data.media.addresses import is_remote, short
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import json_line, read_lines

_LONGEST = 1e9  # seconds, the longest accepted time: some thirty years


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """An image file and its time in the medium (seconds)."""

    path: str
    time: float


@dataclasses.dataclass(frozen=True)
class ClipRecord:
    """A part of a video, or an image. Paths are absolute or addresses; `start` and `end` are in seconds.

    `row` is the JSON object it was read from.
    """

    id: str
    media: str
    keyframes: tuple[KeyFrame, ...]
    start: float | None = None
    end: float | None = None
    category: str = ""
    language: str = ""
    caption: str = ""
    source: str = ""
    licence: str = ""
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def kind(self) -> str:
        """ "image" or "video"."""
        from kangaroo_jax.data.media.image import IMAGE_SUFFIXES  # slow, and a run with nothing to do needs no image

        return "image" if self.media.lower().endswith(IMAGE_SUFFIXES) else "video"

    @property
    def seconds(self) -> float:
        """The length as far as it is known; a clip without an end is taken up to its last key frame."""
        first, last = self.start or 0.0, max((frame.time for frame in self.keyframes), default=0.0)
        return max((self.end if self.end is not None else last) - first, 0.0)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write objects as lines under a temporary name, then rename. Returns their number. Raises UserError."""
    temporary, count = path.with_name(path.name + ".tmp"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for row in rows:
                file.write(json_line(row))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return count


def read_clips(path: Path) -> list[ClipRecord]:
    """The clips that curation selected. Paths are relative to the file's folder.

    Raises:
        UserError: the file cannot be read, is empty, a line is no clip, or two have one id.
    """
    clips, seen = [], dict[str, str]()
    for where, row in read_lines(path):
        clip = _clip(row, where, path.parent)
        if clip.id in seen:
            raise UserError(f"{where}: the id {clip.id!r} is taken by {seen[clip.id].rpartition(', ')[2]}")
        seen[clip.id] = where
        clips.append(clip)
    if not clips:
        raise UserError(f"{path}: no clips in it; `kangaroo curate select` writes them")
    return clips


def absolute(path: str, folder: Path) -> str:
    """The absolute form of a path that is relative to `folder`; addresses stay."""
    return path if is_remote(path) else storage.absolute(path, folder.resolve())


def relative(path: str, folder: Path) -> str:
    """An absolute path made relative to `folder`, so that data can be moved as a whole; addresses stay."""
    return path if is_remote(path) else os.path.relpath(path, folder.resolve())


def _clip(row: dict[str, Any], where: str, folder: Path) -> ClipRecord:
    texts = {}
    for key in ("id", "media", "category", "language", "caption", "source", "licence"):
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key!r} must be text, found {value!r}")
        texts[key] = value or ""
    if not texts["id"] or not texts["media"]:
        raise UserError(f"{where}: a clip needs 'id' and 'media'")
    texts["media"] = absolute(texts["media"], folder)
    frames = row.get("keyframes")
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{where}: 'keyframes' must be a list of at least one {{'path', 'time'}}")
    start, end = (_seconds(row.get(key), key, where) for key in ("start", "end"))
    if start is not None and end is not None and start >= end:
        raise UserError(f"{where}: 'start' {start:g} is not before 'end' {end:g}")
    return ClipRecord(
        keyframes=tuple(_keyframe(frame, where, folder) for frame in frames), start=start, end=end, row=row, **texts
    )


def _keyframe(value: Any, where: str, folder: Path) -> KeyFrame:
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise UserError(f"{where}: a key frame needs 'path' and 'time', found {value!r}")
    return KeyFrame(absolute(value["path"], folder), _seconds(value.get("time"), "time", where) or 0.0)


def _seconds(value: Any, key: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LONGEST:
        raise UserError(f"{where}: {key!r} must be seconds, found {short(repr(value), 40)}")
    return float(value)
