"""The vision tokens of one medium: its frames are decoded in pieces, and looked at in groups as they come."""

import collections
import dataclasses
import functools
import itertools
import time
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.decode import Decoder, Outcome
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.identity import Source


class Owner(Protocol):
    """What a medium needs of who keeps it."""

    decoder: Decoder
    side: int  # S, pixels
    frames_per_group: int
    tokens_per_group: int
    frames_a_call: int

    @property
    def lock(self) -> AbstractContextManager[Any, Any]:
        """Guards its media; who holds it may take it again."""

    def counted(self, frames: int) -> None:
        """So many frames were decoded."""

    def dropped(self, medium: "Medium") -> None:
        """The medium has failed, or nobody waits for it any more."""


class Medium:
    """The vision tokens of one medium, those that are there and those to come. Its owner's lock guards it."""

    def __init__(self, owner: Owner, key: tuple[bytes, bytes], ref: MediaRef, sources: tuple[Source, ...]) -> None:
        self.owner, self.key, self.ref, self.sources = owner, key, ref, sources
        self.users = 0
        self.owners: set[bytes] = set()  # of those who asked for it
        self.error: UserError | None = None
        self.seconds: list[float] = []  # of the frames that are decoded, in order
        self.decode_seconds = self.encode_seconds = 0.0
        self.frames_decoded = self.frames_encoded = 0
        self.begun = False  # whether the decoder has it
        self._begun_at = 0.0
        self._looked = 0.0  # until when
        self._pieces: list[Future[Outcome]] = []
        self._ready: dict[int, Clip] = {}  # pieces that came before an earlier one
        self._next_piece = 0
        self._whole: Future[Outcome] | None = None
        self._pixels: collections.deque[np.ndarray] = collections.deque()  # decoded and not yet looked at, in order
        self._rows: list[tuple[int, int, Any]] = []  # first row, last, array [n or more, D], on the device at first

    @property
    def ready(self) -> int:
        return self.frames_encoded // self.owner.frames_per_group * self.owner.tokens_per_group

    @property
    def complete(self) -> bool:
        return self.frames_encoded == len(self.ref.times)

    @property
    def pixel_bytes(self) -> int:
        return (len(self.ref.times) - self.frames_encoded) * self.owner.side**2 * 3

    @property
    def bytes(self) -> int:
        return sum(int(rows.nbytes) for _, _, rows in self._rows)

    @property
    def decoding(self) -> bool:
        """Whether the decoder is at it."""
        return self.begun and self.error is None and len(self.seconds) < len(self.ref.times)

    # ------------------------------------------------------------------------------- decoding

    def _submit(self, ref: MediaRef) -> "Future[Outcome]":
        return self.owner.decoder.submit(ref, self.owner.side)

    def decode(self, most: int) -> None:
        """Hand the medium to the decoder, in pieces of whole calls, as even as they can be."""
        self._begun_at = time.perf_counter()
        calls = -(-len(self.ref.times) // self.owner.frames_a_call)
        count = max(1, min(most, calls)) if self.ref.kind == "video" else 1
        cuts = [round(i * calls / count) * self.owner.frames_a_call for i in range(count + 1)]
        self._pieces = [
            self._submit(dataclasses.replace(self.ref, times=self.ref.times[a:b], frames=self.ref.frames[a:b]))
            for a, b in itertools.pairwise(cuts)
        ]
        for number, future in enumerate(self._pieces):
            future.add_done_callback(functools.partial(self._came, number))

    def _came(self, number: int, future: "Future[Outcome]") -> None:
        """A piece is decoded, or is not; called in one of the decoder's threads."""
        outcome = self._outcome(future)
        if isinstance(outcome, Clip) and not (len(self._pieces) > 1 and (outcome.damaged or outcome.missed)):
            with self.owner.lock:
                self._ready[number] = outcome
                self._take_ready()
            self.owner.counted(len(outcome.pixels))
        elif outcome is not None and len(self._pieces) > 1:
            self._read_whole()  # what damage costs is decided by the video as a whole
        elif isinstance(outcome, UserError):
            self.fail(outcome)

    def _outcome(self, future: "Future[Outcome]") -> Outcome | None:
        """What the decoder made of the bytes that the medium is known by; None where it need not be known."""
        if future.cancelled():
            return None
        try:
            outcome = future.result()
        except UserError as error:
            return error
        if isinstance(outcome, UserError) or all(source.unchanged() for source in self.sources):
            return outcome
        return UserError(f"{short(self.ref.path)}: the file was changed while it was read; ask again")

    def _take_ready(self) -> None:
        """Queue the pieces that follow those already queued."""
        while self._whole is None and self._next_piece in self._ready:
            self._queue(self._ready.pop(self._next_piece))
            self._next_piece += 1

    def _queue(self, clip: Clip) -> None:
        self.seconds += [float(np.float32(time)) for time in clip.times]
        if len(clip.pixels):
            self._pixels.append(clip.pixels)
        if len(self.seconds) == len(self.ref.times):
            self.decode_seconds = time.perf_counter() - self._begun_at

    def _read_whole(self) -> None:
        """Decode the medium as one; of that the frames are used which no piece has given yet."""
        with self.owner.lock:
            if self._whole is not None or self.error is not None:
                return
            self._whole = self._submit(self.ref)
        self._whole.add_done_callback(self._whole_came)

    def _whole_came(self, future: "Future[Outcome]") -> None:
        outcome = self._outcome(future)
        if isinstance(outcome, UserError):
            self.fail(outcome)
        elif outcome is not None:
            with self.owner.lock:
                had = len(self.seconds)
                self._queue(dataclasses.replace(outcome, pixels=outcome.pixels[had:], times=outcome.times[had:]))
            self.owner.counted(len(outcome.pixels))

    def fail(self, error: UserError) -> None:
        """Tell everybody who waits for it, and forget it: who asks again may have better luck."""
        with self.owner.lock:
            self.error = self.error or error
        self.cancel()
        self.owner.dropped(self)

    def cancel(self) -> None:
        """Take what is not decoded yet back from the decoder."""
        for future in (*self._pieces, *([self._whole] if self._whole else [])):
            future.cancel()
        with self.owner.lock:
            self._pixels.clear()
            self._ready.clear()

    # ------------------------------------------------------------------------------- encoding

    def waits(self) -> bool:
        """Whether a whole call's frames are decoded and not looked at, or the last ones."""
        there = len(self.seconds) - self.frames_encoded
        last = len(self.seconds) == len(self.ref.times)
        return bool(self._pixels) and self.error is None and (there >= self.owner.frames_a_call or last)

    def next_part(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `most` frames, fewer at the end, and their seconds."""
        parts, count = [], 0
        while self._pixels and count < most:
            pixels = self._pixels.popleft()
            if len(pixels) > most - count:
                self._pixels.appendleft(pixels[most - count :])
                pixels = pixels[: most - count]
            parts.append(pixels)
            count += len(pixels)
        first = self.frames_encoded
        seconds = np.array(self.seconds[first : first + count], np.float32)
        return np.concatenate(parts) if len(parts) > 1 else parts[0], seconds

    def add_rows(self, frames: int, rows: jax.Array) -> None:
        first = self.ready
        self.frames_encoded += frames
        self._rows.append((first, self.ready, rows))

    def looked(self, begun: float, ended: float) -> None:
        """The device had frames from `begun` on, those before them perhaps as well, and is done with them."""
        with self.owner.lock:
            self.encode_seconds += ended - max(begun, self._looked)
            self._looked = ended

    def settle(self) -> None:
        """Bring rows that are still on the device to the host, those of padding left out."""
        for place, (first, last, rows) in enumerate(self._rows):
            if not isinstance(rows, np.ndarray):
                whole = np.asarray(rows)
                self._rows[place] = first, last, whole if len(whole) == last - first else whole[: last - first].copy()

    def take(self, first: int, last: int) -> np.ndarray:
        self.settle()
        parts = [
            rows[max(first - begin, 0) : last - begin]
            for begin, end, rows in self._rows
            if begin < last and end > first
        ]
        return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])
