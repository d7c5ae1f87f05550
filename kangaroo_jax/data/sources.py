"""Annotation files with random access: JSON, JSONL, Parquet, WebDataset tar shards, built datasets.

Records are read and checked when a file is opened, so that a mistake is reported before training begins and not days
into it: all of them, or of a large file CHECKED, evenly chosen. A mistake in one of the others is found as it is drawn.
(Built datasets were checked as they were written.)
"""

import collections
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data.conversation import TAG, Conversation
from kangaroo_jax.data.formats import FORMATS, Columns, Parsed, caption_record, parse_record
from kangaroo_jax.data.storage import MEMBER, is_remote, local, member_suffix, parquet_table, short, tar_members
from kangaroo_jax.data.video import IMAGE_SUFFIXES
from kangaroo_jax.terminal import printable

CHECKED = 20_000  # records of a file that are read when it is opened, at most
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".flv", ".wmv", ".ts", ".mpg", ".mpeg", ".3gp")


def read_conversations(paths: Sequence[str | Path], media_root: str | Path = "") -> Iterator[Conversation]:
    """The conversations of annotation files, one after another.

    Args:
        paths: annotation files, see `AnnotationFile`.
        media_root: folder of the media that they name; "" is each file's own folder.

    Raises:
        UserError: naming file and line (or item), for what is no record of a known format.
    """
    for path in paths:
        source = AnnotationFile(path, media_root)
        for i in range(len(source)):
            yield source[i]


class _Reader(Protocol):
    """Records of one kind of file."""

    files: list[Path]  # that it reads

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Parsed: ...


class AnnotationFile:
    """Conversations of one file by their number: the kind of file and the format are found out.

    `.json`, `.jsonl`, `.parquet`, `.tar` (also `shard-{000..012}.tar` and patterns with `*`), or the folder that
    `kangaroo data build` wrote. Addresses are fetched.
    """

    def __init__(
        self, path: str | Path, media_root: str | Path = "", *, columns: Columns | None = None, check: bool = True
    ) -> None:
        """Open, and read up to CHECKED records once if `check`. Raises UserError naming file and line (or item)."""
        self.path = str(path)
        self.formats: collections.Counter[str] = collections.Counter()
        self.ignored: set[str] = set()
        file = str(local(path))
        root = str(media_root) or (os.path.dirname(self.path) if is_remote(path) else os.path.dirname(file))
        self._reader = _open(self.path, file, root or ".", columns)
        if not len(self._reader):
            raise UserError(f"{path}: no conversations in this file")
        most = CHECKED if check and not isinstance(self._reader, _Built) else 1
        for i in evenly(len(self._reader), most):
            parsed = self._reader[i]
            self.formats[parsed.format] += 1
            self.ignored |= parsed.ignored

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
        """One line: how many records, and of what format."""
        if isinstance(self._reader, _Built):
            return f"{short(self.path)}: {len(self):,} samples, ArrayRecord shards of kangaroo data build"
        kinds = ", ".join(
            FORMATS[name] + (f" ({count:,})" if len(self.formats) > 1 else "")
            for name, count in self.formats.most_common()
        )
        if self.formats.total() < len(self):
            kinds += f" in {self.formats.total():,} of them, which were checked"
        unread = f"; ignored: {printable(', '.join(sorted(self.ignored)))}" if self.ignored else ""
        return (
            f"{short(self.path)}: {len(self):,} samples, {self._reader.__class__.__name__.strip('_')}, {kinds}{unread}"
        )


def evenly(count: int, most: int) -> list[int]:
    """All of 0..count-1, or `most` of them, evenly chosen, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def _open(path: str, file: str, root: str, columns: Columns | None) -> _Reader:
    if os.path.isdir(file):
        if os.path.exists(os.path.join(file, "dataset_info.json")) and os.path.exists(
            os.path.join(file, "features.json")
        ):
            return _Built(file, root)
        raise UserError(f"{path}: a folder is read only if kangaroo data build wrote it")
    if file.endswith(".parquet"):
        return _Parquet(file, root, columns)
    if file.endswith(".tar"):
        return _WebDataset(file, root, columns)
    with _opened(path, file) as stream:
        head = b""
        for line in stream:
            head = line.strip().removeprefix(b"\xef\xbb\xbf")
            if head:
                break
    whole = head.startswith(b"[") and not _is_messages(head)
    return _Json(path, file, root, columns) if whole else _Jsonl(path, file, root, columns)


def _is_messages(line: bytes) -> bool:
    """Whether a line is a bare list of messages: a record by itself, and not the list of all."""
    try:
        first = json.loads(line)[0]
    except (ValueError, LookupError, TypeError):
        return False
    return isinstance(first, dict) and "role" in first


def _opened(path: str, file: str) -> Any:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read the annotations ({error.strerror or error})") from None


class _Json:
    """A JSON list, held in memory."""

    def __init__(self, path: str, file: str, root: str, columns: Columns | None) -> None:
        self.files, self._path, self._root, self._columns = [Path(file)], path, root, columns
        try:
            with _opened(path, file) as stream:
                self._items = list(json.loads(stream.read().decode("utf-8-sig")))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Parsed:
        return parse_record(self._items[index], f"{self._path}, item {index + 1}", self._root, self._columns)


class _Jsonl:
    """A record a line, of which only the places are held in memory: 8 bytes a record."""

    def __init__(self, path: str, file: str, root: str, columns: Columns | None) -> None:
        self.files, self._path, self._root, self._columns = [Path(file)], path, root, columns
        self._file = _opened(path, file)
        self._begins, self._numbers, self._end = line_places(self._file)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Parsed:
        begin = int(self._begins[index])
        end = int(self._begins[index + 1]) if index + 1 < len(self._begins) else self._end
        line = os.pread(
            self._file.fileno(), end - begin, begin
        ).rstrip()  # safe among threads; with empty lines after it
        where = f"{self._path}, line {index + 1 if self._numbers is None else self._numbers[index]}"
        try:
            item = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text") from None
        return parse_record(item, where, self._root, self._columns)


def line_places(file: BinaryIO) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Where the lines of a file lie, but those of white space alone, without reading what is in them.

    Returns:
        The first byte of each, int64[n]; their numbers from 1, int64[n], None where no line is left out; the file's
        size in bytes.
    """
    found, size = [np.zeros(1, np.int64)], 0
    while block := file.read(_BLOCK):
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size + 1)
        size += len(block)
    begins = np.concatenate(found)
    begins = begins[begins < size]
    if not size:
        return begins, None, 0
    heads = np.memmap(file, np.uint8, "r")[begins]
    ends = np.append(begins[1:], size)
    blank = [
        i
        for i in np.flatnonzero(np.isin(heads, np.frombuffer(b" \t\r\n\v\f", np.uint8)))
        if not os.pread(file.fileno(), int(ends[i] - begins[i]), int(begins[i])).strip()
    ]
    if not blank:
        return begins, None, size
    numbers = np.delete(np.arange(1, len(begins) + 1), blank)
    return begins[numbers - 1], numbers, size


_BLOCK = 1 << 24  # bytes


class _Parquet:
    """A record a row. Media may be in the table ({"bytes", "path"}): they are not read with the record."""

    def __init__(self, file: str, root: str, columns: Columns | None) -> None:
        self.files, self._root, self._columns = [Path(file)], root, columns
        self._path, self._table = file, parquet_table(file)
        leaves = self._table.leaves()
        self._embedded = {leaf.split(".")[0] for leaf in leaves if leaf.endswith(".bytes")}
        self._leaves = [leaf for leaf in leaves if not leaf.endswith(".bytes")]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Parsed:
        item = self._table.row(index, self._leaves)
        for column in self._embedded & item.keys():
            item[column] = self._in_table(index, column, item[column])
        where = f"{self._path}, row {index + 1}"
        item = {key: _from_json(value) for key, value in item.items()}
        return parse_record(item, where, self._root, self._columns)

    def _in_table(self, row: int, column: str, value: Any) -> Any:
        """Values of a column with bytes become the place of those bytes."""
        here = os.path.abspath(self._path)
        if isinstance(value, list):
            return [{"at": f"{here}{MEMBER}{row}/{column}/{i}"} for i in range(len(value))]
        return None if value is None else {"at": f"{here}{MEMBER}{row}/{column}/0"}


def _from_json(value: Any) -> Any:
    """Tables often hold conversations as JSON text."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


class _WebDataset:
    """Tar shards: the files that share a name up to its first dot are a sample.

    A `.json` member holds a record of any format, whose media are named by member or by ending; without
    one, or with one that has only a "caption", a `.txt` (or that caption) captions the only medium.
    """

    def __init__(self, pattern: str, root: str, columns: Columns | None) -> None:
        self._root, self._columns = root, columns
        self.files = [Path(file) for file in _shards(pattern)]
        self._samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, file in enumerate(self.files):
            groups: dict[str, dict[str, tuple[int, int]]] = {}
            for name, offset, size in tar_members(file):
                folder, base = os.path.split(name)
                stem, _, ending = base.partition(".")
                groups.setdefault(os.path.join(folder, stem), {})[ending] = (offset, size)
            self._samples += [(number, key, members) for key, members in groups.items()]
        self._handles = [_opened(str(file), str(file)) for file in self.files]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Parsed:
        shard, key, members = self._samples[index]
        file = os.path.abspath(self.files[shard])
        where = f"{self.files[shard]}, sample {key}"
        media = {
            ending: f"{file}{MEMBER}{key}.{ending}@{offset}+{size}"
            for ending, (offset, size) in members.items()
            if f".{ending}".lower().endswith((*IMAGE_SUFFIXES, *_VIDEO_SUFFIXES))
        }
        item = self._json(shard, members, where)
        if item is None or not {"messages", "conversations"} & item.keys() and self._columns is None:
            return self._captioned(shard, key, members, media, item or {}, where)
        item.setdefault("id", key)
        _place_media(item, key, media)
        return parse_record(item, where, self._root, self._columns)

    def _read(self, shard: int, span: tuple[int, int]) -> bytes:
        return os.pread(self._handles[shard].fileno(), span[1], span[0])

    def _json(self, shard: int, members: dict[str, tuple[int, int]], where: str) -> dict[str, Any] | None:
        if "json" not in members:
            return None
        try:
            item = json.loads(self._read(shard, members["json"]))
        except ValueError as error:
            raise UserError(f"{where}: its .json is not JSON ({error})") from None
        return item if isinstance(item, dict) else {"messages": item}

    def _captioned(
        self,
        shard: int,
        key: str,
        members: dict[str, tuple[int, int]],
        media: dict[str, str],
        item: dict[str, Any],
        where: str,
    ) -> Parsed:
        caption = item.get("caption") or item.get("text")
        if not isinstance(caption, str) and "txt" in members:
            caption = self._read(shard, members["txt"]).decode("utf-8", errors="replace")
        if not isinstance(caption, str) or not caption.strip() or len(media) != 1:
            raise UserError(
                f"{where}: needs a .json with a conversation, or a caption (.txt) and one medium; "
                f"it has {', '.join(sorted(members))}"
            )
        path = next(iter(media.values()))
        kind = "image" if member_suffix(path) in IMAGE_SUFFIXES else "video"
        return caption_record(caption, kind, path, str(item.get("id", key)))


_TEXT_KEYS = ("id", "language", "text", "value", "type", "role", "from")


def _place_media(item: dict[str, Any], key: str, media: dict[str, str]) -> None:
    """Replace, anywhere in a record, the names of members of its sample by their places, in place.

    A record that has tags and names no media means its sample's, in the order of the archive.
    """
    if not {"image", "images", "video", "videos"} & item.keys() and TAG.search(json.dumps(item)):
        of_kind: dict[str, list[str]] = {"images": [], "videos": []}
        for path in media.values():
            of_kind["images" if member_suffix(path) in IMAGE_SUFFIXES else "videos"].append(path)
        item |= {kind: paths for kind, paths in of_kind.items() if paths}
    names = {name: path for ending, path in media.items() for name in (ending, f"{key}.{ending}")}
    names |= {os.path.basename(name): path for name, path in names.items()}

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, list):
            return [placed(one) for one in value]
        if isinstance(value, dict):
            return {k: one if _is_text(k, one) else placed(one) for k, one in value.items()}
        return value

    item |= {field: placed(value) for field, value in item.items() if not _is_text(field, value)}


def _is_text(key: str, value: Any) -> bool:
    return key in _TEXT_KEYS or (key == "content" and isinstance(value, str))


def _shards(pattern: str) -> list[str]:
    """`shard-{000..012}.tar` and `*` to names, in order. Raises UserError where there is none."""
    match = _BRACES.search(pattern)
    if match:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        return [
            name
            for i in range(first, last + 1)
            for name in _shards(f"{pattern[: match.start()]}{i:0{width}d}{pattern[match.end() :]}")
        ]
    names = sorted(glob.glob(pattern)) if "*" in pattern and not os.path.exists(pattern) else [pattern]
    missing = [name for name in names if not os.path.isfile(name)]
    if missing or not names:
        raise UserError(f"{missing[0] if missing else pattern}: no such tar shard")
    return names


class _Built:
    """ArrayRecord shards that `kangaroo data build` wrote."""

    def __init__(self, folder: str, root: str) -> None:
        from kangaroo_jax.data.dataset import BuiltDataset

        self._dataset = BuiltDataset(folder, root)
        self.files = self._dataset.files

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Parsed:
        return Parsed(self._dataset[index], "built")
