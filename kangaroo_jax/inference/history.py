"""What is asked, and what a history says of it: turns that are JSON-able, with the media that they are about."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn, count_tags
from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.image import opened_image
from kangaroo_jax.data.media.kinds import kind_of, read_head
from kangaroo_jax.data.media.storage import join
from kangaroo_jax.data.media.video import folder_of_frames, probe_cached
from kangaroo_jax.errors import UserError

History = list[dict[str, Any]]
AnyPath = str | Path
Video = AnyPath | Sequence[AnyPath]  # what shows it, or its frames as images


def ask(
    query: str,
    video: Video | None = None,
    image: AnyPath | None = None,
    start: float | None = None,
    end: float | None = None,
    *,
    frames: Sequence[AnyPath] | None = None,
    times: Sequence[float] | None = None,
    media: Sequence[tuple[str, Any]] = (),
) -> dict[str, Any]:
    """A turn of the user, as it stands in a history; see `Kangaroo.chat`.

    Raises UserError, also for files that cannot be opened.
    """
    if not query.strip():
        raise UserError("the query is empty: say what to ask")
    shown = [_medium(kind, thing) for kind, thing in media]
    if frames is not None:
        shown.append(_video(list(frames)) | ({} if times is None else {"times": _ascending(times, len(frames))}))
    elif times is not None:
        raise UserError("times are those of frames, and none are given")
    if video is not None:
        shown.append(_video(video) | {"start": start, "end": end})
    elif start is not None or end is not None:
        raise UserError("start and end belong to a video, and none is given")
    if image is not None:
        shown.append(_medium("image", image))
    wanted = count_tags([Turn("user", query)])
    if not wanted:
        query = "".join(f"<{medium['kind']}>\n" for medium in shown) + query
    elif sorted(wanted) != sorted(medium["kind"] for medium in shown):
        raise UserError(f"the query has the tags {', '.join(wanted)}, but {len(shown)} files are given with it")
    else:
        left = list(shown)
        shown = [left.pop(next(i for i, medium in enumerate(left) if medium["kind"] == kind)) for kind in wanted]
    return {"role": "user", "text": query, "media": shown}


def _medium(kind: str, thing: Any) -> dict[str, Any]:
    """What a history says of a medium of that kind."""
    if kind == "video":
        return _video(thing)
    if kind != "image" or not isinstance(thing, str | Path):
        raise UserError(
            f"media: ({kind!r}, {type(thing).__name__}) is none; give pairs of 'video' or 'image' and a file"
        )
    return {"kind": "image", "path": _opened(thing, "image")}


def _ascending(times: Sequence[float], count: int) -> list[float]:
    seconds = [float(second) for second in times]
    pairs = zip(seconds, seconds[1:], strict=False)
    if len(seconds) != count or not all(0 <= second < 1e6 for second in seconds) or any(a > b for a, b in pairs):
        raise UserError(f"times: {count} frames have as many seconds, from 0 on and ascending, not {seconds[:8]}")
    return seconds


def _video(video: Video) -> dict[str, Any]:
    """What a history says of a video: its path, and its frames where it is a list of images."""
    if isinstance(video, (str, Path)):
        if os.path.isdir(video):
            for frame in folder_of_frames(video):
                _opened(frame, "image")
            return {"kind": "video", "path": str(video)}
        return {"kind": "video", "path": _opened(video, "video")}
    frames = [_opened(frame, "image") for frame in video]
    if not frames:
        raise UserError("the list of the video's frames is empty")
    return {"kind": "video", "path": frames[0], "frames": frames}


def _opened(path: AnyPath, kind: str) -> str:
    """The path of something that can be opened as a `kind`. Raises UserError where it is none, or rather the other."""
    text = str(path)
    if text.startswith("file://"):
        text = join("", text)
    try:
        info = probe_cached(text, kind)
    except UserError:
        if kind == "image" and _is_video(text):
            raise UserError(f"{short(text)}: this is a video; give it as video") from None
        raise
    if kind == "video" and info.seconds <= 1.0 and _is_still(text):
        raise UserError(f"{short(text)}: this is a still image; give it as image")
    return text


def _is_video(path: str) -> bool:
    """Whether it is a video, and no picture that FFmpeg alone can read."""
    with contextlib.suppress(UserError):
        return kind_of(read_head(path)) == "video" or probe_cached(path, "video").seconds > 1.0
    return False


def _is_still(path: str) -> bool:
    """Whether it is an image of one frame, which FFmpeg takes for a short video."""
    with contextlib.suppress(UserError), opened_image(path) as image:
        return getattr(image, "n_frames", 1) == 1
    return False


def conversation(turns: History) -> Conversation:
    """A history and the new turn as the data pipeline wants it. Raises UserError where it is no history."""
    fields = {field.name for field in dataclasses.fields(Media)}
    spoken, media = [], []
    for number, turn in enumerate(turns):
        try:
            role, text, refs = turn["role"], turn["text"], turn.get("media") or []
            media += [
                Media(**ref | {key: tuple(ref.get(key, ())) for key in ("frames", "times")})
                for ref in refs
                if set(ref) <= fields
            ]
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"history: turn {number + 1} is none of those that chat returns") from None
        if role != ("user", "assistant")[number % 2]:
            raise UserError(f"history: turn {number + 1} is the {role}'s; user and assistant take turns")
        spoken.append(Turn(role, text))
    if count_tags(spoken) != [medium.kind for medium in media]:
        raise UserError("history: the tags in its turns and the media that it names do not match")
    return Conversation("chat", tuple(spoken), tuple(media))
