"""What the page asks of a model, in this process or behind a server's address."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from kangaroo_jax.errors import UserError

MOST_TOKENS = 512  # of an answer
HIGHEST_TEMPERATURE = 2.0
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Medium:
    """A file of the page's own, as its user knows it."""

    kind: str  # "image" or "video"
    path: Path
    name: str  # for eyes alone
    digest: str  # of its bytes, in hexadecimal
    size: int  # bytes


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says; media stand where they were shown."""

    role: str  # "user" or "assistant"
    parts: tuple[str | Medium, ...]

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media in it."""
        return tuple(part for part in self.parts if isinstance(part, Medium))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to look and how to answer."""

    frames: int = 0  # of a video; 0: as in training
    temperature: float = 0.0
    seed: int = 0

    @classmethod
    def given(cls, frames: Any, temperature: Any, seed: Any, most_frames: int) -> "Settings":
        """Settings as a page sends them. Raises UserError where one is none or out of range."""
        return cls(
            int(_number("frames", frames, most_frames)),
            _number("temperature", temperature, HIGHEST_TEMPERATURE),
            int(_number("seed", seed, SEEDS - 1)),
        )


def _number(name: str, value: Any, most: float) -> float:
    given = 0 if value is None else value
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= most or math.isnan(given):
        raise UserError(f"{name}: must be a number from 0 to {most:g}")
    return given


@dataclasses.dataclass(frozen=True)
class Told:
    """How an answer came about."""

    finish_reason: str = "stop"  # or length, or cancelled
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, remembered
    new_tokens: int = 0
    frames_encoded: int = 0
    frames_reused: int = 0
    first_token: float = 0.0  # seconds
    total: float = 0.0
    seconds: tuple[tuple[float, ...], ...] = ()  # of the frames that were seen, of each medium


class Answering(Protocol):
    """An answer on its way."""

    @property
    def planned(self) -> tuple[tuple[float, ...], ...]:
        """The seconds of the frames that each medium is looked at; () where only the answer tells."""

    def seen(self) -> tuple[float, ...] | None:
        """How much of each medium is looked at, from 0 to 1; None where nobody knows."""

    def pieces(self) -> Iterator[str]:
        """The text as it comes. Raises UserError."""

    def told(self) -> Told:
        """How it came about, after the last piece."""

    def cancel(self) -> None:
        """The rest is not wanted. From any thread."""


class Model(Protocol):
    """What answers; every method may be called by several threads."""

    name: str
    most_frames: int  # of a video

    def ask(self, turns: Sequence[Turn], settings: Settings, salt: str, *, silent: bool = False) -> Answering:
        """Begin to answer the last of `turns`. `silent`: look and read, and say nothing.

        What is remembered is shared by those with the same `salt`, and by nobody else. Raises UserError.
        """

    def close(self) -> None:
        """End it."""
