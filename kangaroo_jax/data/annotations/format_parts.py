"""Messages whose content is a list of parts: OpenAI's, Hugging Face's, and TRL's, whose media are in columns."""

from collections.abc import Iterator
from typing import Any

from kangaroo_jax.data.annotations.conversation import CLIP_KEYS, Media, Turn, escaped, spaced
from kangaroo_jax.data.annotations.format_media import (
    Parsed,
    check_clip,
    finished,
    medium,
    number,
    option_rows,
    plain_path,
    record_media,
    seconds_of,
    shown,
)
from kangaroo_jax.data.annotations.format_turns import Keys, alternate, loss_of, role_of
from kangaroo_jax.errors import UserError

_PART_KEYS = {"video_start": "start", "video_end": "end", "num_frames": "nframes"} | {k: k for k in CLIP_KEYS}
_NAMES = {"type", "image", "video", "url", "path", "image_url", "video_url", "text", "index"}


def is_parts(messages: Any) -> bool:
    """Whether the content of some message is a list of parts."""
    return isinstance(messages, list) and any(
        isinstance(m, dict) and isinstance(m.get("content"), list) for m in messages
    )


def parts_record(item: dict[str, Any], messages: list[Any], where: str, root: str) -> Parsed:
    """The conversation of a record with such messages. Raises UserError."""
    reader = _Parts(item, where, root)
    turns = [reader.turn(number, message) for number, message in enumerate(messages, start=1)]
    return reader.finish(turns)


class _Parts:
    """Parts read in order; one without a medium of its own takes the next of the record's columns."""

    def __init__(self, item: dict[str, Any], where: str, root: str) -> None:
        self._item, self._where, self._root = item, where, root
        images, videos = record_media(item, ("image", "images"), ("video", "videos"), where)
        options = option_rows(item, len(videos), where) if videos else []
        self._counts = {"image": len(images), "video": len(videos)}
        self._waiting: dict[str, Iterator[tuple[Any, dict[str, Any]]]] = {
            "image": iter([(path, {}) for path in images]),
            "video": iter(list(zip(videos, options, strict=True))),
        }
        self._media: list[Media] = []
        self._asked = {"image": 0, "video": 0}  # parts without a medium of their own
        self._ignored: set[str] = set()
        self._name = "hf"

    def turn(self, number: int, message: Any) -> Turn:
        """Turn `number`, from 1."""
        role = role_of(message, Keys(), number, self._where)
        content = message.get("content")
        if not isinstance(content, (str, list)):
            raise UserError(f"{self._where}: turn {number} needs a text or a list of parts 'content'")
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind, value = _part(part, number, self._where)
            if kind == "text":
                text += value if role == "assistant" else escaped(value)
            elif role == "assistant":
                raise UserError(
                    f"{self._where}: turn {number} is the assistant's and holds a {kind}; it may only say text"
                )
            else:
                text += ("\n" if text.endswith("\\") else "") + f"<{kind}>"  # a tag after a backslash would be text
                self._media.append(self._medium(kind, value, part))
        return Turn(role, text if role == "assistant" else spaced(text), loss_of(message, self._where))

    def _medium(self, kind: str, value: Any, part: dict[str, Any]) -> Media:
        clip, unknown = _part_clip(part, kind, self._where)
        self._ignored |= unknown
        if value is None:
            self._asked[kind] += 1
            value, options = next(self._waiting[kind], (None, {}))
            if value is None:
                raise UserError(
                    f"{self._where}: {self._asked[kind]} parts of type {kind!r} name no file, and there are "
                    f"{self._counts[kind]} in '{kind}s'"
                )
            return medium(kind, value, options | clip, self._root)
        if part["type"].endswith("_url"):
            self._name = "openai"
        return medium(kind, value, clip, self._root)

    def finish(self, turns: list[Turn]) -> Parsed:
        """The conversation. Raises UserError where a column holds media that no part takes."""
        found = list(alternate(turns, self._where))
        left = {kind: list(waiting) for kind, waiting in self._waiting.items()}
        if (left["image"] or left["video"]) and not self._media:  # no positions: before the first text, as in TRL
            first = next(i for i, turn in enumerate(found) if turn.role == "user")
            tags = "<video>" * len(left["video"]) + "<image>" * len(left["image"])
            found[first] = Turn("user", spaced(tags + found[first].text))
            for kind in ("video", "image"):
                self._media += [medium(kind, value, options, self._root) for value, options in left[kind]]
            left = {}
        for kind, rest in left.items():
            if rest:
                raise UserError(
                    f"{self._where}: {self._counts[kind]} files in '{kind}s', but {self._asked[kind]} parts of type "
                    f"{kind!r} that name none"
                )
        ignored = frozenset(self._ignored)
        return finished(self._item, found, self._media, self._where, self._name, ignored=ignored)


def _part(part: Any, number: int, where: str) -> tuple[str, Any]:
    """("text", text) or (kind, path or list of paths, None where the part names none)."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    for one in ("image", "video"):
        if kind in (one, f"{one}_url"):
            value = next((part[key] for key in (kind, one, "url", "path") if part.get(key)), None)
            if value is None:
                return one, None
            value = plain_path(value)
            paths = value if isinstance(value, list) and one == "video" else [value]
            if paths and all(isinstance(path, str) and path for path in paths):
                return one, value
            raise UserError(f"{where}: the {one} of turn {number} must be a path or address, found {shown(part)}")
    raise UserError(f"{where}: turn {number} has a part of type {shown(kind)}; there are text, image and video")


def _part_clip(part: dict[str, Any], kind: str, where: str) -> tuple[dict[str, Any], set[str]]:
    """The options of a part, and its keys that mean nothing here (sizes in pixels: frames have the model's)."""
    clip: dict[str, Any] = {}
    for key, value in part.items():
        if kind == "video" and key in _PART_KEYS and value is not None:
            option = _PART_KEYS[key]
            clip[option] = seconds_of(value) if option == "duration" else number(value, option, where)
    check_clip(clip, where)
    known = _NAMES | _PART_KEYS.keys()
    return clip, {str(key) for key, value in part.items() if key not in known and value is not None}
