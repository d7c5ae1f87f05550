"""Conversations about images and videos: the one type that every annotation format is read into."""

import dataclasses
import re
from collections.abc import Sequence

TAG = re.compile(r"(?<!\\)<(image|video)>")  # one after a backslash is text
_TEXT_OF_TAG = re.compile(r"\\(<(?:image|video)>)")
_LEADING_TAGS = re.compile(r"^((?:<(?:image|video)>)++)(?=\S)")
_SCRIPTS = (  # scripts that identify a language; Han without kana is Chinese
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says; a user's text holds the tags `<image>` and `<video>` where its media stand.

    In it `\\<image>` is the text `<image>`.
    """

    role: str  # "system", "user" or "assistant"
    text: str
    loss: float = 1.0  # weight of an assistant's tokens in the loss


@dataclasses.dataclass(frozen=True)
class Media:
    """A file that a conversation is about; for a video, also which part to take and how densely to sample it.

    A video may be given as its `frames`, paths of images in order; `path` is then the first of them.
    """

    kind: str  # "image" or "video"
    path: str
    start: float | None = None  # seconds
    end: float | None = None  # seconds
    fps: float | None = None  # frames to sample a second
    max_frames: int | None = None
    min_frames: int | None = None
    nframes: int | None = None  # frames to sample, in place of fps and the range
    sample_fps: float | None = None  # frames a second at which `frames` (or a folder of them) were taken
    duration: float | None = None  # stated length of the whole file in seconds, so that it need not be opened
    frames: tuple[str, ...] = ()
    times: tuple[float, ...] = ()  # seconds at which `frames` were on display, in place of `sample_fps`


CLIP_KEYS = ("start", "end", "fps", "max_frames", "min_frames", "nframes", "sample_fps", "duration")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns and the media that their tags stand for, in the order of the tags."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...] = ()
    language: str = ""  # as annotated; "" where the record names none

    def split_answer(self) -> tuple["Conversation", str]:
        """The conversation up to its last answer, and that answer's text. Raises ValueError if there is none."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise ValueError(f"conversation {self.id!r} does not end with an assistant's turn")
        return dataclasses.replace(self, turns=self.turns[:-1]), self.turns[-1].text


def count_tags(turns: Sequence[Turn]) -> list[str]:
    """The kinds ("image", "video") that the user's and system's turns ask for, in order."""
    return [kind for turn in turns if turn.role != "assistant" for kind in TAG.findall(turn.text)]


def escaped(text: str) -> str:
    """The text with a backslash before whatever looks like a tag, so that a turn holds it as text."""
    return re.sub(r"(<(?:image|video)>)", r"\\\1", text)


def literal(text: str) -> str:
    """The inverse of `escaped`, for a piece of a user's text between tags."""
    return _TEXT_OF_TAG.sub(r"\1", text)


def spaced(text: str) -> str:
    """The text with a newline after the media that begin it, whatever the format (`kangaroo.md` 2, inferred)."""
    return _LEADING_TAGS.sub("\\1\n", text)


def language_of(conversation: Conversation) -> str:
    """The annotated language, or a guess from the script of the answers: zh, ja, ko, ru, ar, else en."""
    if conversation.language:
        return conversation.language
    text = "".join(turn.text for turn in conversation.turns if turn.role == "assistant")
    if text.isascii():
        return "en"
    for language, script in _SCRIPTS:
        if len(script.findall(text)) * 5 > len(text):
            return language
    return "en"
