"""The public annotation formats, each read into (and written from) a Conversation.

    llava          {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nQ"}, ...]}
    messages       {"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>\\nQ"}, ...]}
    openai         {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": ...}}, ...]}]}
    hf             {"messages": [{"role": "user", "content": [{"type": "video", "video": ..., "fps": 2}, ...]}]}
    llama_factory  any keys at all, which a row of `dataset_info.json` names

`messages` is ms-swift's and ShareGPT's; a bare list of messages is read as well. Where media are apart from
the text, tags say where each stands, as many as media. Options of a video (`start` and `end` in seconds, `fps`,
`max_frames`, `min_frames`, `nframes`, `sample_fps`) are keys of the record, a value or a list of one a video;
in content parts they are keys of the part (`video_start` and `video_end` there).
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from kangaroo_jax.conventions import UserError
from kangaroo_jax.data.conversation import CLIP_KEYS, TAG, Conversation, Media, Turn, count_tags, spaced
from kangaroo_jax.data.storage import join

FORMATS = {
    "llava": "LLaVA conversations",
    "messages": "messages with images and videos (ShareGPT, ms-swift)",
    "openai": "OpenAI content parts",
    "hf": "Hugging Face content parts",
    "llama_factory": "LLaMA-Factory columns",
    "caption": "media with captions (WebDataset)",
}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_PART_KEYS = {"video_start": "start", "video_end": "end", "num_frames": "nframes"} | {k: k for k in CLIP_KEYS}
_COUNTS = ("max_frames", "min_frames", "nframes")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which keys of a record mean what, as a row of LLaMA-Factory's `dataset_info.json` says."""

    formatting: str = "sharegpt"  # or "alpaca"
    messages: str = "conversations"
    system: str = ""
    images: str = ""
    videos: str = ""
    role: str = "from"
    content: str = "value"
    user: str = "human"
    assistant: str = "gpt"
    system_role: str = "system"
    prompt: str = "instruction"  # alpaca
    query: str = "input"
    response: str = "output"
    history: str = "history"


@dataclasses.dataclass
class Parsed:
    """A conversation, the format it was written in, and keys of it that mean nothing here."""

    conversation: Conversation
    format: str
    ignored: frozenset[str] = frozenset()


def parse_record(item: Any, where: str, root: str, columns: Columns | None = None) -> Parsed:
    """One record of any format.

    Args:
        item: the parsed JSON (or row of a table).
        where: file and line, for messages; also the id of a conversation that has none.
        root: folder or address that relative paths start from.
        columns: what the keys mean, if `dataset_info.json` says so.

    Raises:
        UserError: beginning with `where`.
    """
    if isinstance(item, list):
        item = {"messages": item}
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object with a list 'conversations' or 'messages', found {shown(item)}")
    if columns is not None:
        return _tagged(*_by_columns(item, columns, where), item, where, root, "llama_factory")
    if item.get("messages") is not None:
        messages = item["messages"]
        if isinstance(messages, list) and any(isinstance(m, dict) and _is_parts(m.get("content")) for m in messages):
            return _parts(item, where, root)
        turns = _turns(messages, "messages", "role", "content", where)
        media = _record_media(item, ("image", "images"), ("video", "videos"), where)
        turns = _untagged_first(turns, *media)
        return _tagged(turns, *media, item, where, root, "messages")
    turns = _turns(item.get("conversations"), "conversations", "from", "value", where)
    media = _record_media(item, ("image", "images"), ("video", "videos", "frames"), where)
    return _tagged(turns, *media, item, where, root, "llava")


def caption_record(caption: str, kind: str, path: str, name: str) -> Parsed:
    """The conversation of a medium and its caption."""
    turns = (Turn("user", f"<{kind}>"), Turn("assistant", caption.strip()))
    return Parsed(Conversation(name, turns, (Media(kind, path),)), "caption")


# ------------------------------------------------------------------------------------ turns


def _turns(raw: Any, key: str, role_key: str, text_key: str, where: str) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: '{key}' must be a list of turns, found {shown(raw)}")
    turns = []
    for number, turn in enumerate(raw, start=1):
        role = _ROLES.get(str(turn.get(role_key))) if isinstance(turn, dict) else None
        text = turn.get(text_key) if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            names = "human, gpt or system" if role_key == "from" else "user, assistant or system"
            raise UserError(f"{where}: turn {number} needs '{role_key}' ({names}) and a text '{text_key}'")
        turns.append(Turn(role, text if role == "assistant" else spaced(text), _loss(turn, where)))
    return _alternate(turns, where)


def _alternate(turns: Sequence[Turn], where: str) -> tuple[Turn, ...]:
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(talk)) or not talk:
        raise UserError(f"{where}: turns must alternate human, gpt, human... after at most one system turn")
    return tuple(turns)


def _loss(turn: dict, where: str) -> float:
    """ms-swift's `loss` (true or false) and `loss_scale` (a factor)."""
    value = turn.get("loss_scale") if turn.get("loss_scale") is not None else turn.get("loss")
    if value is None:
        return 1.0
    if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{where}: 'loss' of a turn must be true, false or a factor, found {shown(value)}")
    return float(value)


def _untagged_first(turns: tuple[Turn, ...], images: list, videos: list) -> tuple[Turn, ...]:
    """Media of a record without a single tag stand before the first user's text, as ms-swift has it."""
    if count_tags(turns) or not (images or videos):
        return turns
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    text = spaced("<video>" * len(videos) + "<image>" * len(images) + turns[first].text)
    return (*turns[:first], dataclasses.replace(turns[first], text=text), *turns[first + 1 :])


def _by_columns(item: dict, columns: Columns, where: str) -> tuple[tuple[Turn, ...], list, list]:
    images = _listed(item, columns.images, where) if columns.images else []
    videos = _listed(item, columns.videos, where) if columns.videos else []
    system = item.get(columns.system) if columns.system else None
    head = [Turn("system", system)] if isinstance(system, str) and system else []
    if columns.formatting == "alpaca":
        rounds = [tuple(pair) for pair in item.get(columns.history) or []]
        rounds.append((_alpaca_query(item, columns), item.get(columns.response)))
        if any(len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in rounds):
            raise UserError(f"{where}: '{columns.prompt}' and '{columns.response}' must be text")
        body = [Turn(role, text) for pair in rounds for role, text in zip(("user", "assistant"), pair, strict=True)]
        body = [dataclasses.replace(t, text=spaced(t.text)) if t.role == "user" else t for t in body]
        return (*head, *body), images, videos
    names = {columns.user: "user", columns.assistant: "assistant", columns.system_role: "system"}
    raw = item.get(columns.messages)
    if isinstance(raw, list):
        raw = [
            {"role": names.get(str(m.get(columns.role))), "content": m.get(columns.content)}
            if isinstance(m, dict)
            else m
            for m in raw
        ]
    turns = _turns(raw, columns.messages, "role", "content", where)
    return (*([] if turns[0].role == "system" else head), *turns), images, videos


def _alpaca_query(item: dict, columns: Columns) -> Any:
    prompt, query = item.get(columns.prompt), item.get(columns.query)
    return f"{prompt}\n{query}" if isinstance(prompt, str) and query else prompt


# ------------------------------------------------------------------------------------ media


def _record_media(
    item: dict, image_keys: Sequence[str], video_keys: Sequence[str], where: str
) -> tuple[list[Any], list[Any]]:
    if item.get("audios") or item.get("audio"):
        raise UserError(f"{where}: sound is not supported; take 'audio' out of the record")
    images = [value for key in image_keys for value in _listed(item, key, where)]
    return images, [value for key in video_keys for value in _listed(item, key, where)]


def _listed(item: dict, key: str, where: str) -> list[Any]:
    """The media under a key, each a path or, of a video, a list of paths."""
    value = item.get(key)
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    values = [_plain_path(v) for v in values]
    lists = not key.startswith("image")
    for one in values:
        paths = one if isinstance(one, list) and lists else [one]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise UserError(f"{where}: '{key}' must be a path or a list of paths, found {shown(value)}")
    return values


def _plain_path(value: Any) -> Any:
    """{"path": ...} and {"url": ...}, as tables have it, to the path."""
    if isinstance(value, dict):
        return next((value[key] for key in ("at", "path", "url") if value.get(key)), None)
    return value


def _tagged(
    turns: tuple[Turn, ...], images: list[Any], videos: list[Any], item: dict, where: str, root: str, name: str
) -> Parsed:
    """Turns with tags, and media apart from them."""
    wanted = count_tags(turns)
    for kind, files in (("image", images), ("video", videos)):
        if wanted.count(kind) != len(files):
            raise UserError(
                f"{where}: {wanted.count(kind)} <{kind}> tags in the human turns, but {len(files)} files in '{kind}'"
            )
    clips = iter(_clips(item, len(videos), where)) if videos else iter(())
    of_kind: dict[str, Iterator[Any]] = {"image": iter(images), "video": iter(videos)}
    media = [_medium(kind, next(of_kind[kind]), next(clips) if kind == "video" else {}, root) for kind in wanted]
    return Parsed(_conversation(item, turns, media, where), name)


def _conversation(item: dict, turns: Sequence[Turn], media: Sequence[Media], where: str) -> Conversation:
    name = item.get("id")
    language = item.get("language") or item.get("lang")
    language = language if isinstance(language, str) else ""
    return Conversation(where if name is None else str(name), tuple(turns), tuple(media), language)


def _medium(kind: str, value: Any, clip: dict[str, Any], root: str) -> Media:
    if isinstance(value, list):
        frames = tuple(join(root, path) for path in value)
        return Media(kind, frames[0], frames=frames, **clip)
    return Media(kind, join(root, value), **clip)


def _clips(item: dict, count: int, where: str) -> list[dict[str, Any]]:
    """The options of each of `count` videos."""
    clips: list[dict[str, Any]] = [{} for _ in range(count)]
    for key in CLIP_KEYS:
        value = item.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count:
            raise UserError(f"{where}: '{key}' has {len(values)} values for {count} videos")
        for clip, number in zip(clips, values, strict=True):
            clip[key] = None if number is None else _number(number, key, where)
    for clip in clips:
        _check_clip(clip, where)
    return clips


def _check_clip(clip: dict[str, Any], where: str) -> None:
    if clip.get("start") is not None and clip.get("end") is not None and clip["start"] >= clip["end"]:
        raise UserError(f"{where}: 'start' {clip['start']:g} is not before 'end' {clip['end']:g}")
    if (clip.get("min_frames") or 0) > (clip.get("max_frames") or math.inf):
        raise UserError(f"{where}: 'min_frames' {clip['min_frames']} is more than 'max_frames' {clip['max_frames']}")


def _number(value: Any, key: str, where: str) -> float | int:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < 0 or (key != "start" and value == 0) or (key in _COUNTS and value != int(value)):
        raise UserError(f"{where}: '{key}' must be a positive number, found {shown(value)}")
    return int(value) if key in _COUNTS else float(value)


# ------------------------------------------------------------------------------------ parts


def _is_parts(content: Any) -> bool:
    return isinstance(content, list)


def _parts(item: dict, where: str, root: str) -> Parsed:
    """Messages whose content is a list of parts (or plain text), OpenAI's or Hugging Face's."""
    turns, media, ignored, name = [], [], set(), "hf"
    for number, message in enumerate(item["messages"], start=1):
        role = _ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role is None or not isinstance(content, (str, list)):
            raise UserError(f"{where}: turn {number} needs 'role' (user, assistant or system) and 'content'")
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind, value = _part(part, number, where)
            if kind == "text":
                if role != "assistant" and (tag := TAG.search(value)):
                    raise UserError(f"{where}: turn {number} has parts, and the tag {tag[0]} in its text")
                text += value
                continue
            if role == "assistant":
                raise UserError(f"{where}: turn {number} is the assistant's and holds a {kind}; it may only say text")
            name = "openai" if part["type"].endswith("_url") else name
            clip, unknown = _part_clip(part, kind, where)
            ignored |= unknown
            media.append(_medium(kind, value, clip, root))
            text += f"<{kind}>"
        turns.append(Turn(role, text if role == "assistant" else spaced(text), _loss(message, where)))
    return Parsed(_conversation(item, _alternate(turns, where), media, where), name, frozenset(ignored))


def _part(part: Any, number: int, where: str) -> tuple[str, Any]:
    """("text", text) or (kind, path or list of paths)."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    for medium in ("image", "video"):
        if kind in (medium, f"{medium}_url"):
            value = next((part[key] for key in (kind, medium, "url", "path") if part.get(key)), None)
            value = _plain_path(value)
            paths = value if isinstance(value, list) and medium == "video" else [value]
            if paths and all(isinstance(path, str) and path for path in paths):
                return medium, value
            raise UserError(f"{where}: the {medium} of turn {number} must be a path or address, found {shown(part)}")
    raise UserError(f"{where}: turn {number} has a part of type {shown(kind)}; there are text, image and video")


def _part_clip(part: dict, kind: str, where: str) -> tuple[dict[str, Any], set[str]]:
    """The options of a part, and its keys that mean nothing here (sizes in pixels: frames have the model's)."""
    names = {"type", "image", "video", "url", "path", "image_url", "video_url"}
    clip: dict[str, Any] = {}
    for key, value in part.items():
        if kind == "video" and key in _PART_KEYS and value is not None:
            clip[_PART_KEYS[key]] = _number(value, _PART_KEYS[key], where)
    _check_clip(clip, where)
    unknown = {key for key, value in part.items() if key not in names and key not in _PART_KEYS and value is not None}
    return clip, unknown


# ---------------------------------------------------------------------------------- writing


def to_record(conversation: Conversation, name: str) -> dict[str, Any]:
    """The conversation in a format of `FORMATS` (`llama_factory` with the default `Columns` and "images", "videos").

    Raises ValueError where the format cannot say it.
    """
    record: dict[str, Any] = {"id": conversation.id}
    if conversation.language:
        record["language"] = conversation.language
    if name in ("openai", "hf"):
        media = iter(conversation.media)
        record["messages"] = [_part_message(turn, media, name) for turn in conversation.turns]
        return record
    if name not in ("llava", "messages", "llama_factory"):
        raise ValueError(f"no conversation is written as {name!r}")
    losses = any(turn.loss != 1 for turn in conversation.turns)
    if losses and name != "messages":
        raise ValueError(f"{name} has no loss of a turn")
    for kind, key in (("image", "image"), ("video", "video")):
        files = [list(m.frames) if m.frames else m.path for m in conversation.media if m.kind == kind]
        if files:
            record[key if name == "llava" else f"{key}s"] = files
    videos = [m for m in conversation.media if m.kind == "video"]
    for key in CLIP_KEYS:
        values = [getattr(medium, key) for medium in videos]
        if any(value is not None for value in values):
            record[key] = values
    if name == "messages":
        record["messages"] = [
            {"role": turn.role, "content": turn.text} | ({"loss_scale": turn.loss} if losses else {})
            for turn in conversation.turns
        ]
    else:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        record["conversations"] = [{"from": names[turn.role], "value": turn.text} for turn in conversation.turns]
    return record


def _part_message(turn: Turn, media: Iterator[Media], name: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.loss != 1:
        message["loss_scale"] = turn.loss
    if turn.role == "assistant":
        message["content"] = [{"type": "text", "text": turn.text}]
        return message
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(TAG.split(turn.text)):
        if i % 2:
            medium = next(media)
            value: Any = list(medium.frames) if medium.frames else medium.path
            kind = f"{medium.kind}_url" if name == "openai" else medium.kind
            part = {"type": kind, kind: {"url": value} if name == "openai" else value}
            for key in CLIP_KEYS:
                if getattr(medium, key) is not None:
                    part[f"video_{key}" if key in ("start", "end") else key] = getattr(medium, key)
            parts.append(part)
        elif piece:
            parts.append({"type": "text", "text": piece})
    message["content"] = parts
    return message


def shown(value: Any) -> str:
    """A value as JSON, cut to 40 characters, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
