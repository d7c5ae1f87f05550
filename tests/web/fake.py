"""A model of the page without weights: it says what it is told to, and remembers what it was asked."""

import threading
import time
from collections.abc import Iterator, Sequence

from kangaroo_jax.errors import UserError
from kangaroo_jax.web.asking import Settings, Told, Turn


class FakeModel:
    """Looks at a second a frame, four at most, and says `pieces`; waits for `go` before each."""

    name, most_frames = "fake", 64

    def __init__(self, pieces: Sequence[str] = ("A red ", "ring ", "— 红色的环。")) -> None:
        self.pieces = pieces
        self.go = threading.Event()
        self.go.set()
        self.asked: list[tuple[list[Turn], Settings, str, bool]] = []
        self.answers: list[FakeAnswer] = []
        self.error: Exception | None = None  # what becomes of questions

    def ask(self, turns: Sequence[Turn], settings: Settings, salt: str, *, silent: bool = False) -> "FakeAnswer":
        bad = next((m for turn in turns for m in turn.media if m.path.read_bytes().startswith(b"no ")), None)
        if bad is not None:
            raise UserError(f"{bad.name}: no video")
        if self.error is not None:
            raise self.error
        known = {(said, old.media) for old, _, said, _ in self.asked for old in old}
        media = [medium for turn in turns for medium in turn.media]
        new = not any((salt, turn.media) in known for turn in turns if turn.media)
        self.asked.append((list(turns), settings, salt, silent))
        self.answers.append(
            FakeAnswer(self, [] if silent else list(self.pieces), len(media), settings.frames or 4, new)
        )
        return self.answers[-1]

    def close(self) -> None:
        """Nothing is held."""


class FakeAnswer:
    def __init__(self, model: FakeModel, pieces: list[str], media: int, frames: int, new: bool) -> None:
        self._model, self._pieces, self._count = model, pieces, frames * media
        self.planned = (tuple(float(second) for second in range(frames)),) * media
        self._new, self._said = new, 0
        self.cancelled = False

    def seen(self) -> tuple[float, ...]:
        return (1.0,) * (len(self.planned) - 1) + (0.5,)

    def pieces(self) -> Iterator[str]:
        for piece in self._pieces or [""]:
            while not self._model.go.wait(0.01):
                if self.cancelled:
                    return
            if self.cancelled:
                return
            time.sleep(0.005)
            self._said += 1
            if piece:
                yield piece

    def told(self) -> Told:
        return Told(
            finish_reason="cancelled" if self.cancelled and self._said < len(self._pieces) else "stop",
            new_tokens=self._said,
            frames_encoded=self._count if self._new else 0,
            frames_reused=0 if self._new else self._count,
            first_token=0.012,
            seconds=self.planned,
        )

    def cancel(self) -> None:
        self.cancelled = True
