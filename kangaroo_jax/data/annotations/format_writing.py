"""Conversations as records of the public annotation formats, as `formats` reads them."""

from collections.abc import Iterator
from typing import Any

from kangaroo_jax.data.annotations.conversation import CLIP_KEYS, TAG, Conversation, Media, Turn, literal


def to_record(conversation: Conversation, name: str) -> dict[str, Any]:
    """The conversation in a format of `FORMATS` (`llama_factory` with the default `Columns` and "images", "videos").

    Raises ValueError where the format cannot express it.
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
        raise ValueError(f"{name} cannot express the loss of a turn")
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
            parts.append({"type": "text", "text": literal(piece)})
    message["content"] = parts
    return message
