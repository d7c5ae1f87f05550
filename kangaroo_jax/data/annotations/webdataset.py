"""WebDataset: tar shards whose files of one name are a sample."""

import collections
import contextlib
import glob
import json
import os
import posixpath
import re
import tarfile
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import TAG
from kangaroo_jax.data.annotations.format_media import Parsed
from kangaroo_jax.data.annotations.formats import Columns, caption_record, is_record, parse_record
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES, opened_image
from kangaroo_jax.data.media.kinds import HEAD, kind_of
from kangaroo_jax.data.media.storage import MEMBER, absolute
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.json_text import parse_json

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_STILL = (*IMAGE_SUFFIXES, ".avif", ".heic", ".jfif", ".jp2", ".ppm")
_MOVING = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".flv", ".wmv", ".ts", ".mpg", ".mpeg", ".3gp", ".apng")
_EITHER = (".gif", ".webp", ".png", ".avif")  # a picture or an animation
_MEDIA_KEYS = {"image", "images", "video", "videos"}
_TEXT_KEYS = ("id", "language", "text", "value", "type", "role", "from", "caption", "question", "answer")
_LONGEST_TEXT = 256 << 20  # bytes of a record or caption
Span = tuple[int, int]  # first byte, size; a negative size marks a link that leads out of the archive


class Unfinished(UserError):
    """A sample without a readable caption, record or medium, as failed downloads leave it; the file is still valid."""


class WebDataset:
    """Tar shards: the files that share a name up to its first dot are a sample.

    A `.json` member holds a record of any format, whose media are named by member or by ending; without
    one, or with one that has only a "caption", a `.txt` (or that caption) captions the only medium. Hidden files, files
    without an ending, and samples with neither a record nor a medium are passed over.
    """

    name = "WebDataset"

    def __init__(self, pattern: str, root: str, columns: Columns | None) -> None:
        """Raises UserError."""
        self._root, self._columns = root, columns
        self.files = [Path(file) for file in _shards(pattern)]
        self.passed_over = 0  # files that belong to no sample
        self._samples: list[tuple[int, str, dict[str, Span]]] = []
        for number, file in enumerate(self.files):
            groups: dict[str, dict[str, Span]] = collections.defaultdict(dict)
            for name, span in tar_members(file).items():
                folder, base = os.path.split(name)
                stem, _, ending = base.partition(".")
                if not stem or not ending or folder.startswith("__MACOSX"):
                    self.passed_over += 1
                else:
                    groups[os.path.join(folder, stem)][ending] = span
            for key, members in groups.items():
                if any(ending.lower() == "json" or _is_medium(ending) for ending in members):
                    self._samples.append((number, key, members))
                else:
                    self.passed_over += len(members)
        self._handles = [_opened(str(file)) for file in self.files]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Parsed:
        shard, key, members = self._samples[index]
        file = absolute(self.files[shard])
        where = f"{self.files[shard]}, sample {key}"
        media = {
            ending: f"{file}{MEMBER}{key}.{ending}@{offset}+{size}"
            for ending, (offset, size) in members.items()
            if _is_medium(ending)
        }
        if dead := next((ending for ending, (_, size) in members.items() if size < 0), None):
            raise UserError(f"{where}: {key}.{dead} is a link to what is not in the archive; write it with tar -h")
        item = self._json(shard, members, where)
        if item is None or not is_record(item) and self._columns is None:
            return self._captioned(shard, key, members, media, item or {}, where)
        item.setdefault("id", key)
        if not {"messages", "conversations", "conversation"} & item.keys() and "caption" in item:
            return self._captioned(shard, key, members, media, item, where)
        self._place_media(shard, item, key, members, media)
        return parse_record(item, where, self._root, self._columns)

    def _read(self, shard: int, span: Span) -> bytes:
        """The bytes of a text. Raises UserError if it is larger than any caption or record."""
        if span[1] > _LONGEST_TEXT:
            raise UserError(f"{self.files[shard]}: a text of {span[1]:,} bytes in it is no record and no caption")
        return os.pread(self._handles[shard].fileno(), span[1], span[0])

    def _member(self, members: dict[str, Span], ending: str) -> Span | None:
        """The member with an ending, upper or lower case."""
        return members.get(ending) or next((s for name, s in members.items() if name.lower() == ending), None)

    def _json(self, shard: int, members: dict[str, Span], where: str) -> dict[str, Any] | None:
        span = self._member(members, "json")
        if span is None:
            return None
        item = parse_json(self._read(shard, span), f"{where}, its .json")
        return item if isinstance(item, dict) else {"messages": item}

    def _captioned(
        self,
        shard: int,
        key: str,
        members: dict[str, Span],
        media: dict[str, str],
        item: dict[str, Any],
        where: str,
    ) -> Parsed:
        caption = item.get("caption") or item.get("text")
        if not isinstance(caption, str) and (span := self._member(members, "txt")):
            try:
                caption = self._read(shard, span).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise Unfinished(f"{where}: its caption is not UTF-8 text (byte {error.start})") from None
        if not isinstance(caption, str) or not caption.strip() or len(media) != 1:
            raise Unfinished(
                f"{where}: needs a .json with a conversation, or a caption (.txt) and one medium; "
                f"it has {', '.join(sorted(members))}"
            )
        ending, path = next(iter(media.items()))
        kind = "video" if self._moves(shard, ending, members[ending], path) else "image"
        return caption_record(caption, kind, path, str(item.get("id", key)))

    def _moves(self, shard: int, ending: str, span: Span, path: str) -> bool:
        """Whether a member is a video or an animation; an ambiguous ending is resolved by the contents."""
        suffix = f".{ending}".lower()
        if not suffix.endswith(_EITHER):
            return not suffix.endswith(_STILL)
        offset, size = span
        if kind_of(self._read(shard, (offset, min(size, HEAD)))) == "video":
            return True
        with contextlib.suppress(Exception), opened_image(path) as image:
            return bool(getattr(image, "is_animated", False))
        return False

    def _place_media(
        self, shard: int, item: dict[str, Any], key: str, members: dict[str, Span], media: dict[str, str]
    ) -> None:
        """Replace the names of the sample's members by their paths, in place, anywhere in a record.

        A record with tags that names no media gets all media of its sample, in the order of the archive.
        """
        if not _MEDIA_KEYS & item.keys() and (tags := TAG.findall(json.dumps(item))):
            of_kind: dict[str, list[str]] = {"images": [], "videos": []}
            for ending, path in media.items():
                either = f".{ending}".lower().endswith(_EITHER)
                only = tags[0] if len(set(tags)) == 1 and either else ""
                moves = only == "video" if only else self._moves(shard, ending, members[ending], path)
                of_kind["videos" if moves else "images"].append(path)
            item |= {kind: paths for kind, paths in of_kind.items() if paths}
        names = {name: path for ending, path in media.items() for name in (ending, f"{key}.{ending}")}
        names |= {os.path.basename(name): path for name, path in names.items()}

        def with_paths(value: Any) -> Any:
            if isinstance(value, str):
                return names.get(value, value)
            if isinstance(value, list):
                return [with_paths(one) for one in value]
            if isinstance(value, dict):
                return {k: one if _is_text(k, one) else with_paths(one) for k, one in value.items()}
            return value

        item |= {field: with_paths(value) for field, value in item.items() if not _is_text(field, value)}


def _is_medium(ending: str) -> bool:
    return f".{ending}".lower().endswith((*_STILL, *_MOVING))


def _is_text(key: str, value: Any) -> bool:
    return key in _TEXT_KEYS or (key == "content" and isinstance(value, str))


def _opened(file: str) -> Any:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: cannot read the annotations ({error.strerror or error})") from None


def tar_members(path: str | Path) -> dict[str, Span]:
    """Name -> first byte and size of every file in an uncompressed tar archive, from its headers.

    A link to a file of the archive is resolved; a link that leads elsewhere has size -1.

    Raises:
        UserError: the file is not such an archive, or its members are larger than the archive.
    """
    members: dict[str, Span] = {}
    links: dict[str, str] = {}
    try:
        whole = os.path.getsize(path)
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg():
                    if member.issparse() or member.offset_data + member.size > whole:
                        raise UserError(f"{short(path)}: its member {short(member.name)!r} is sparse, or cut short")
                    members[member.name] = member.offset_data, member.size
                elif member.issym():
                    links[member.name] = posixpath.normpath(
                        posixpath.join(posixpath.dirname(member.name), member.linkname)
                    )
                elif member.islnk():
                    links[member.name] = member.linkname
    except (OSError, tarfile.TarError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        reason = one_line(error) or "a header claims more than the memory holds"
        raise UserError(f"{path}: not a readable tar archive, without compression ({reason})") from None
    return members | {name: members.get(target, (0, -1)) for name, target in links.items()}


def _shards(pattern: str) -> list[str]:
    """The names that `shard-{000..012}.tar` or `*` stands for, in order. Raises UserError where there is none."""
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
