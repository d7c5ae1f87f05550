"""Conversations about images and videos, read from annotation files.

The format is LLaVA's, the most wide-spread: a JSON list, or JSONL with one object a line,

    {"id": "0007", "video": "clips/0007.mp4", "start": 3.5, "end": 9.0,
     "conversations": [{"from": "human", "value": "<video>\\nWhat moves?"}, {"from": "gpt", "value": "A cat."}]}

`image` and `video` are a path or a list of paths, and `<image>` and `<video>` in the human turns say
where each stands: as many tags as media. Optional keys for videos, a number or a list of one a video:
`start` and `end` (seconds), `fps` and `max_frames` (in place of the stage's, within its range).
"""

import array
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.conventions import UserError

TAG = re.compile(r"<(image|video)>")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_CLIP_KEYS = ("start", "end", "fps", "max_frames")


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says; a user's text holds the tags `<image>` and `<video>` where its media stand."""

    role: str  # "system", "user" or "assistant"
    text: str


@dataclasses.dataclass(frozen=True)
class Media:
    """A file that a conversation is about, and which part of it to look at how closely (videos)."""

    kind: str  # "image" or "video"
    path: str
    start: float | None = None  # seconds
    end: float | None = None  # seconds
    fps: float | None = None  # frames to sample a second
    max_frames: int | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns and the media that their tags stand for, in the order of the tags."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...] = ()

    def split_answer(self) -> tuple["Conversation", str]:
        """The conversation up to its last answer, and that answer's text. Raises ValueError if there is none."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise ValueError(f"conversation {self.id!r} does not end with an assistant's turn")
        return dataclasses.replace(self, turns=self.turns[:-1]), self.turns[-1].text


def count_tags(turns: Sequence[Turn]) -> list[str]:
    """The kinds ("image", "video") that the user's and system's turns ask for, in order."""
    return [kind for turn in turns if turn.role != "assistant" for kind in TAG.findall(turn.text)]


def read_conversations(paths: Sequence[str | Path], media_root: str | Path = "") -> Iterator[Conversation]:
    """The conversations of JSON and JSONL files, one after another; JSONL is streamed.

    Args:
        paths: annotation files.
        media_root: folder of the media that they name; "" is each file's own folder.

    Raises:
        UserError: naming file and line (or item), for what is no JSON or no conversation.
    """
    for path in paths:
        source = AnnotationFile(path, media_root)
        for i in range(len(source)):
            yield source[i]


class AnnotationFile:
    """Random access to one JSON or JSONL file: of JSONL only the lines' offsets are kept in memory.

    Every line is read and checked once when the file is opened, so that a mistake in it is reported
    before training begins and not days into it.
    """

    def __init__(self, path: str | Path, media_root: str | Path = "") -> None:
        """Open and check the file. Raises UserError naming file and line (or item)."""
        self.path = Path(path)
        self._root = Path(media_root) if str(media_root) else self.path.parent
        self._items: list[Any] | None = None
        self._offsets = array.array("Q")
        self._lengths = array.array("Q")
        self._numbers = array.array("Q")  # line numbers, for messages
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot read the annotations ({error.strerror or error})") from None
        if self._is_list():
            self._items = self._read_list()
            for i in range(len(self._items)):
                self[i]
        else:
            self._index_lines()
        if not len(self):
            raise UserError(f"{path}: no conversations in this file")

    def __len__(self) -> int:
        return len(self._offsets) if self._items is None else len(self._items)

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`, parsed anew. Raises UserError."""
        if self._items is not None:
            return parse_conversation(self._items[index], f"{self.path}, item {index + 1}", self._root)
        line = os.pread(self._file.fileno(), self._lengths[index], self._offsets[index])  # safe among threads
        return self._parse_line(line, self._numbers[index])

    def _is_list(self) -> bool:
        head = b""
        for line in self._file:
            head = line.strip().removeprefix(b"\xef\xbb\xbf")
            if head:
                break
        self._file.seek(0)
        return head.startswith(b"[")

    def _read_list(self) -> list[Any]:
        try:
            return list(json.loads(self._file.read().decode("utf-8-sig")))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path}, line {error.lineno}: not JSON ({error.msg})") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: not UTF-8 text") from None

    def _index_lines(self) -> None:
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                self._parse_line(line, number)
                self._offsets.append(offset)
                self._lengths.append(len(line))
                self._numbers.append(number)
            offset += len(line)

    def _parse_line(self, line: bytes, number: int) -> Conversation:
        where = f"{self.path}, line {number}"
        try:
            item = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text") from None
        return parse_conversation(item, where, self._root)


def parse_conversation(item: Any, where: str, media_root: Path) -> Conversation:
    """One LLaVA object to a Conversation.

    Args:
        item: the parsed JSON.
        where: file and line, for messages; also the id of a conversation that has none.
        media_root: folder that relative paths start from.

    Raises:
        UserError: beginning with `where`.
    """
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object with a list 'conversations', found {type(item).__name__}")
    turns = _parse_turns(item.get("conversations"), where)
    media = {kind: _paths(item, kind, where, media_root) for kind in ("image", "video")}
    wanted = count_tags(turns)
    for kind, files in media.items():
        if wanted.count(kind) != len(files):
            raise UserError(
                f"{where}: {wanted.count(kind)} <{kind}> tags in the human turns, but {len(files)} files in '{kind}'"
            )
    clips = _parse_clips(item, len(media["video"]), where)
    videos = iter([Media("video", path, **clip) for path, clip in zip(media["video"], clips, strict=True)])
    images = iter([Media("image", path) for path in media["image"]])
    ordered = tuple(next(images if kind == "image" else videos) for kind in wanted)
    return Conversation(str(item.get("id", where)), turns, ordered)


def _parse_turns(raw: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: 'conversations' must be a list of turns, found {_shown(raw)}")
    turns = []
    for number, turn in enumerate(raw, start=1):
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise UserError(f"{where}: turn {number} needs 'from' (human, gpt or system) and a text 'value'")
        turns.append(Turn(role, text))
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(talk)) or not talk:
        raise UserError(f"{where}: turns must alternate human, gpt, human... after at most one system turn")
    return tuple(turns)


def _paths(item: dict, kind: str, where: str, media_root: Path) -> list[str]:
    value = item.get(kind)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in values):
        raise UserError(f"{where}: '{kind}' must be a path or a list of paths, found {_shown(value)}")
    return [str(media_root / path) for path in values]


def _parse_clips(item: dict, count: int, where: str) -> list[dict[str, Any]]:
    """`start`, `end`, `fps` and `max_frames` of each of `count` videos."""
    clips: list[dict[str, Any]] = [{} for _ in range(count)]
    for key in _CLIP_KEYS:
        value = item.get(key)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count:
            raise UserError(f"{where}: '{key}' has {len(values)} values for {count} videos")
        for clip, number in zip(clips, values, strict=True):
            clip[key] = None if number is None else _number(number, key, where)
    for clip in clips:
        if clip["start"] is not None and clip["end"] is not None and clip["start"] >= clip["end"]:
            raise UserError(f"{where}: 'start' {clip['start']:g} is not before 'end' {clip['end']:g}")
    return clips


def _number(value: Any, key: str, where: str) -> float | int:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < 0 or (key != "start" and value == 0) or (key == "max_frames" and value != int(value)):
        raise UserError(f"{where}: '{key}' must be a positive number, found {_shown(value)}")
    return int(value) if key == "max_frames" else float(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
