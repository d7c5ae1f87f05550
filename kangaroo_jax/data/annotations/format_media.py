"""The media that a record names, the options of its videos, and which tag means which of them."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from kangaroo_jax.data.annotations.conversation import (
    CLIP_KEYS,
    TAG,
    Conversation,
    Media,
    Turn,
    count_tags,
    escaped,
    spaced,
)
from kangaroo_jax.data.media.storage import join
from kangaroo_jax.errors import UserError

_COUNTS = ("max_frames", "min_frames", "nframes")
_MUCH = 10.0  # frames a second; from here "fps" more likely describes the file than asks for a sampling rate


@dataclasses.dataclass
class Parsed:
    """A conversation, the format it was written in, the keys that were ignored, and notes on what is odd about it."""

    conversation: Conversation
    format: str
    ignored: frozenset[str] = frozenset()
    notes: frozenset[str] = frozenset()


def record_media(
    item: dict[str, Any], images: Sequence[str], videos: Sequence[str], where: str
) -> tuple[list[Any], list[Any]]:
    """The images and the videos under keys of a record. Raises UserError."""
    if item.get("audios") or item.get("audio"):
        raise UserError(f"{where}: sound is not supported; take 'audio' out of the record")
    found = [value for key in images for value in listed(item, key, where)]
    return found, [value for key in videos for value in listed(item, key, where)]


def listed(item: dict[str, Any], key: str, where: str) -> list[Any]:
    """The media under a key, each a path or, for a video, a list of paths. Raises UserError."""
    value = item.get(key)
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    values = [plain_path(v) for v in values]
    lists = not key.startswith("image")
    for one in values:
        paths = one if isinstance(one, list) and lists else [one]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise UserError(f"{where}: '{key}' must be a path or a list of paths, found {shown(value)}")
    return values


def plain_path(value: Any) -> Any:
    """The path in {"path": ...} or {"url": ...}, as tables hold it; other values as they are."""
    if isinstance(value, dict):
        return next((value[key] for key in ("at", "path", "url") if value.get(key)), None)
    return value


def untagged_first(turns: tuple[Turn, ...], images: list[Any], videos: list[Any]) -> tuple[Turn, ...]:
    """The turns with media tags before the first user's text if no turn has a tag, as in ms-swift."""
    if count_tags(turns) or not (images or videos):
        return turns
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    text = spaced("<video>" * len(videos) + "<image>" * len(images) + turns[first].text)
    return (*turns[:first], dataclasses.replace(turns[first], text=text), *turns[first + 1 :])


def tagged(
    turns: tuple[Turn, ...],
    images: list[Any],
    videos: list[Any],
    item: dict[str, Any],
    where: str,
    root: str,
    name: str,
) -> Parsed:
    """The record of turns with tags and a separate list of media. Raises UserError where they do not match."""
    notes = set()
    if videos and not images and count_tags(turns) == ["image"] * len(videos):
        turns = tuple(_of_videos(turn) for turn in turns)  # LLaVA-NeXT writes `<image>` for a video, too
    if not images and not videos and _mentions(turns, item):
        turns = tuple(turn if turn.role == "assistant" else _literal(turn) for turn in turns)
        notes.add("a text without media mentions <image> or <video>, which is read as text")
    wanted = count_tags(turns)
    for kind, files in (("image", images), ("video", videos)):
        if wanted.count(kind) != len(files):
            many = wanted.count(kind) > len(files)
            what_to_do = (
                f"a tag that is only text is written \\<{kind}>" if many else f"write <{kind}> where each stands"
            )
            raise UserError(
                f"{where}: {wanted.count(kind)} <{kind}> tags in the human turns, but {len(files)} files in '{kind}'; "
                f"{what_to_do}"
            )
    clips = iter(option_rows(item, len(videos), where)) if videos else iter(())
    of_kind: dict[str, Iterator[Any]] = {"image": iter(images), "video": iter(videos)}
    media = [medium(kind, next(of_kind[kind]), next(clips) if kind == "video" else {}, root) for kind in wanted]
    return finished(item, turns, media, where, name, notes=notes)


def _of_videos(turn: Turn) -> Turn:
    return turn if turn.role == "assistant" else dataclasses.replace(turn, text=TAG.sub("<video>", turn.text))


def _literal(turn: Turn) -> Turn:
    return dataclasses.replace(turn, text=escaped(turn.text))


def _mentions(turns: Sequence[Turn], item: dict[str, Any]) -> bool:
    """Whether a record without media keys only mentions tags within its sentences."""
    texts = [turn.text.strip() for turn in turns if turn.role != "assistant" and TAG.search(turn.text)]
    standing = any(TAG.match(text) or text.endswith(("<image>", "<video>")) for text in texts)
    return bool(texts) and not standing and not {"image", "images", "video", "videos"} & item.keys()


def finished(
    item: dict[str, Any],
    turns: Sequence[Turn],
    media: Sequence[Media],
    where: str,
    name: str,
    *,
    ignored: frozenset[str] = frozenset(),
    notes: set[str] | None = None,
) -> Parsed:
    """The conversation of a record, and what is odd about it."""
    notes = set(notes or ())
    if any(turn.role == "assistant" and not turn.text.strip() for turn in turns):
        notes.add("an answer is empty: only its end is learnt")
    if any((medium.fps or 0) >= _MUCH for medium in media):
        notes.add(
            f"'fps' of {_MUCH:g} or more asks for so many frames of each second; "
            "if it is a fact about the file, take it out of the record"
        )
    number, language = item.get("id"), item.get("language") or item.get("lang")
    language = language if isinstance(language, str) else ""
    name_of = where if number is None else str(number)
    return Parsed(
        Conversation(name_of, tuple(turns), tuple(media), language), name, frozenset(ignored), frozenset(notes)
    )


def medium(kind: str, value: Any, clip: dict[str, Any], root: str) -> Media:
    """A path, or a list of them, from the root."""
    if isinstance(value, list):
        frames = tuple(join(root, path) for path in value)
        return Media(kind, frames[0], frames=frames, **clip)
    return Media(kind, join(root, value), **clip)


# ---------------------------------------------------------------------------------- options


def option_rows(item: dict[str, Any], count: int, where: str) -> list[dict[str, Any]]:
    """The options of each of `count` videos."""
    clips: list[dict[str, Any]] = [{} for _ in range(count)]
    for key in CLIP_KEYS:
        value = item.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value] * count
        if key == "duration":  # data sets state it in many forms: values that are no number of seconds are ignored
            values = [seconds_of(one) for one in values] if len(values) == count else [None] * count
        elif len(values) != count:
            raise UserError(f"{where}: '{key}' has {len(values)} values for {count} videos")
        for clip, wanted in zip(clips, values, strict=True):
            clip[key] = None if wanted is None else number(wanted, key, where)
    for clip in clips:
        check_clip(clip, where)
    return clips


def seconds_of(value: Any) -> float | None:
    """A duration in seconds, None where the value is no such number."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e15
    return float(value) if right else None


def check_clip(clip: dict[str, Any], where: str) -> None:
    """Raise a UserError where options contradict each other."""
    if clip.get("start") is not None and clip.get("end") is not None and clip["start"] >= clip["end"]:
        raise UserError(f"{where}: 'start' {clip['start']:g} is not before 'end' {clip['end']:g}")
    if (clip.get("min_frames") or 0) > (clip.get("max_frames") or math.inf):
        raise UserError(f"{where}: 'min_frames' {clip['min_frames']} is more than 'max_frames' {clip['max_frames']}")


def number(value: Any, key: str, where: str) -> float | int:
    """An option's value. Raises UserError."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e15 < value < 1e15
    if not right or value < 0 or (key != "start" and value == 0) or (key in _COUNTS and value != int(value)):
        raise UserError(f"{where}: '{key}' must be a positive number, found {shown(value)}")
    return int(value) if key in _COUNTS else float(value)


def shown(value: Any) -> str:
    """A value as JSON, cut to 40 characters, for messages."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda one: type(one).__name__)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 40 else text[:37] + "..."
