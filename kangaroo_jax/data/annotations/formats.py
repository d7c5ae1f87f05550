"""The public annotation formats, each read into a Conversation.

    llava          {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nQ"}, ...]}
    messages       {"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>\\nQ"}, ...]}
    openai         {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": ...}}, ...]}]}
    hf             {"messages": [{"role": "user", "content": [{"type": "video", "video": ..., "fps": 2}, ...]}]}
    query          {"query": "<video>Q", "response": "A", "history": [["Q", "A"]], "videos": ["a.mp4"]}
    alpaca         {"instruction": "Q", "input": "", "output": "A"}
    question       {"video": "a.mp4", "question": "Q", "answer": "A"}
    caption        {"video": "a.mp4", "caption": "A dog runs."}
    llama_factory  any keys at all, which a row of `dataset_info.json` names

`messages` is ms-swift's and ShareGPT's; the list may be called `conversations` or `conversation` too, and a bare list
of messages is read as well. Where media are apart from the text, tags say where each stands, as many as media; a tag
that is only text is written `\\<video>`. Options of a video (`start` and `end` in seconds, `fps`, `max_frames`,
`min_frames`, `nframes`, `sample_fps`) are keys of the record, a value or a list of one a video; in content parts they
are keys of the part (`video_start` and `video_end` there).
"""

import dataclasses
import os
from typing import Any

from kangaroo_jax.data.annotations.conversation import CLIP_KEYS, Conversation, Media, Turn
from kangaroo_jax.data.annotations.format_media import Parsed, listed, record_media, shown, tagged, untagged_first
from kangaroo_jax.data.annotations.format_parts import is_parts, parts_record
from kangaroo_jax.data.annotations.format_turns import Keys, keys_of, read_turns, rounds_of
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES
from kangaroo_jax.data.media.tables import IMAGE_KEYS, MEDIA_KEYS, VIDEO_KEYS
from kangaroo_jax.errors import UserError

__all__ = [
    "FORMATS",
    "MEDIA_KEYS",
    "RECORD_KEYS",
    "Columns",
    "Parsed",
    "caption_record",
    "is_record",
    "parse_record",
    "shown",
]

FORMATS = {
    "llava": "LLaVA conversations",
    "messages": "messages with images and videos (ShareGPT, ms-swift)",
    "openai": "OpenAI content parts",
    "hf": "Hugging Face content parts",
    "query": "queries and responses (ms-swift)",
    "alpaca": "instructions and outputs (Alpaca)",
    "question": "questions and answers",
    "llama_factory": "LLaMA-Factory columns",
    "caption": "media with captions",
}
_TURN_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("query", "response"), ("instruction", "output"), ("question", "answer"), ("QA", "QA"))
_CAPTIONS = ("caption", "captions")
_OPTIONS = ("options", "candidates", "choices", "option0", "choice_a", "a0", "Answer_Choices")
_PATH_KEYS = ("image_path", "video_path", "media", "path", "file", "file_name")  # name or ending tells the kind
RECORD_KEYS = frozenset(  # all keys that a record is read from
    {
        *_TURN_LISTS,
        *_CAPTIONS,
        *_OPTIONS,
        *MEDIA_KEYS,
        *_PATH_KEYS,
        *CLIP_KEYS,
        *(key for pair in _PAIRS for key in pair),
    }
    | {"id", "language", "lang", "system", "history", "input", "audio", "audios", "frames"}
)


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


def is_record(item: Any) -> bool:
    """Whether a JSON object is a record, not a container of records."""
    keys = {*_TURN_LISTS, *_CAPTIONS, *(key for pair in _PAIRS for key in pair)}
    return isinstance(item, dict) and bool(keys & item.keys())


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
        return tagged(*_by_columns(item, columns, where), item, where, root, "llama_factory")
    key = next((key for key in _TURN_LISTS if item.get(key) is not None), None)
    if key is None:
        return _simple(item, where, root)
    if is_parts(item[key]):
        return parts_record(item, item[key], where, root)
    keys = keys_of(item[key], key)
    if key == "messages" or keys.role == "role":
        turns = read_turns(item[key], key, keys, where)
        media = record_media(item, IMAGE_KEYS, VIDEO_KEYS, where)
        return tagged(untagged_first(turns, *media), *media, item, where, root, "messages")
    turns = read_turns(item[key], key, keys, where)
    media = record_media(item, IMAGE_KEYS, (*VIDEO_KEYS, "frames"), where)
    return tagged(turns, *media, item, where, root, "llava")


def caption_record(caption: str, kind: str, path: str, name: str) -> Parsed:
    """The conversation of a medium and its caption."""
    turns = (Turn("user", f"<{kind}>"), Turn("assistant", caption.strip()))
    return Parsed(Conversation(name, turns, (Media(kind, path),)), "caption")


# ----------------------------------------------------------------------------------- simple


def _simple(item: dict[str, Any], where: str, root: str) -> Parsed:
    """A record without a list of turns: a question with its answer, or a caption."""
    asked, answered = next((pair for pair in _PAIRS if all(item.get(key) is not None for key in pair)), ("", ""))
    images, videos = _simple_media(item, where)
    if asked:
        if choices := next((key for key in _OPTIONS if item.get(key) is not None), None):
            raise UserError(f"{where}: has {choices!r} beside '{asked}'; write the choices into the question's text")
        pairs = _pairs(item, asked, answered, where)
        turns = rounds_of(pairs, f"'{asked}' and '{answered}'", where, item.get("system"))
        name = {"query": "query", "instruction": "alpaca"}.get(asked, "question")
        return tagged(untagged_first(turns, images, videos), images, videos, item, where, root, name)
    caption = next((item[key] for key in _CAPTIONS if item.get(key)), None)
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if not isinstance(caption, str) or len(images) + len(videos) != 1:
        raise UserError(f"{where}: {_what_is_missing(item, caption, images, videos)}")
    turns = rounds_of([("<video>" if videos else "<image>", caption.strip())], "'caption'", where)
    return tagged(turns, images, videos, item, where, root, "caption")


def _pairs(item: dict[str, Any], asked: str, answered: str, where: str) -> list[Any]:
    if asked == "QA":  # VideoChat's: [{"i": instruction, "q": question, "a": answer}, ...]
        rounds = item["QA"]
        if not isinstance(rounds, list) or not rounds or not all(isinstance(one, dict) for one in rounds):
            raise UserError(f"{where}: 'QA' must be a list of objects with 'q' and 'a', found {shown(rounds)}")
        return [(f"{one['i']}\n{one.get('q')}" if one.get("i") else one.get("q"), one.get("a")) for one in rounds]
    question = item[asked]
    if asked == "instruction" and isinstance(item.get("input"), str) and item["input"]:
        question = f"{question}\n{item['input']}"
    return [*_history(item, "history", where), (question, item[answered])]


def _history(item: dict[str, Any], key: str, where: str) -> list[Any]:
    """The rounds before the last."""
    history = item.get(key) or []
    if not isinstance(history, list):
        raise UserError(f"{where}: '{key}' must be a list of pairs, found {shown(history)}")
    return history


def _simple_media(item: dict[str, Any], where: str) -> tuple[list[Any], list[Any]]:
    images, videos = record_media(item, IMAGE_KEYS, VIDEO_KEYS, where)
    for key in () if images or videos else _PATH_KEYS:
        for path in listed(item, key, where):
            image = key == "image_path" or (key != "video_path" and _is_image(path))
            (images if image else videos).append(path)
        if images or videos:
            break
    return images, videos


def _is_image(path: Any) -> bool:
    return isinstance(path, str) and os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _what_is_missing(item: dict[str, Any], caption: Any, images: list[Any], videos: list[Any]) -> str:
    if isinstance(caption, str):
        return f"a caption is of one medium, and the record names {len(images) + len(videos)} ('video' or 'image')"
    has = ", ".join(f"'{key}'" for key in list(item)[:8]) or "no keys"
    return (
        f"'conversations' must be a list of turns, found null; the record has {shown(has)[1:-1]}. Give 'conversations' "
        "or 'messages', 'question' and 'answer', or 'caption'"
    )


# ---------------------------------------------------------------------------------- columns


def _by_columns(item: dict[str, Any], columns: Columns, where: str) -> tuple[tuple[Turn, ...], list[Any], list[Any]]:
    images = listed(item, columns.images, where) if columns.images else []
    videos = listed(item, columns.videos, where) if columns.videos else []
    system = item.get(columns.system) if columns.system else None
    if columns.formatting == "alpaca":
        asked = _alpaca_query(item, columns), item.get(columns.response)
        pairs = [*_history(item, columns.history, where), asked]
        return rounds_of(pairs, f"'{columns.prompt}' and '{columns.response}'", where, system), images, videos
    names = {columns.user: "user", columns.assistant: "assistant", columns.system_role: "system"}
    keys = Keys(columns.role, columns.content, names)
    turns = read_turns(item.get(columns.messages), columns.messages, keys, where)
    if isinstance(system, str) and system and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return turns, images, videos


def _alpaca_query(item: dict[str, Any], columns: Columns) -> Any:
    prompt, query = item.get(columns.prompt), item.get(columns.query)
    return f"{prompt}\n{query}" if isinstance(prompt, str) and query else prompt
