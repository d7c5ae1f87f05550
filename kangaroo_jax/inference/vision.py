"""What was seen: vision tokens of media, made once, however often and under whatever name they are asked about.

Frames are decoded in the decoder's workers, in pieces, and looked at in groups as they come; who waits for a medium
reads the tokens that are ready while the rest is being decoded.
"""

import collections
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.decode import Decoder, Outcome
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.identity import Source, media_identity
from kangaroo_jax.inference.timing import Finishes

Encode = Callable[[np.ndarray, np.ndarray], jax.Array]  # uint8[F, S, S, 3], seconds float32[F] -> [R, D]


_READERS = 4  # threads that read the bytes of media to know what they are


class Vision:
    """Vision tokens by what their media are, the least recently used forgotten beyond a number of bytes.

    `watch` may be called from any thread, `pump` from the one that owns the device.
    """

    def __init__(
        self,
        encode: Encode,
        decoder: Decoder,
        *,
        image_size: int,
        frames_per_group: int,
        tokens_per_group: int,
        frames_a_call: int,
        weights_id: str,
        cache_bytes: int,
        pieces: int = 1,
        pixel_bytes: int = 1 << 30,
    ) -> None:
        """What it needs of the model, and its bounds.

        Args:
            encode: the ViT and projector for exactly `frames_a_call` frames; need not wait for its result.
            decoder: reads media; it is its maker's to close.
            image_size: S, pixels.
            frames_per_group: frames that the patchify joins.
            tokens_per_group: vision tokens that they become.
            frames_a_call: a multiple of `frames_per_group`.
            weights_id: names the weights and the dtype in which they compute.
            cache_bytes: of vision tokens of media that nobody uses at the moment.
            pieces: parts in which a video may be decoded at the same time.
            pixel_bytes: of frames that are being decoded or wait to be looked at; other media wait, and one that is
                larger is decoded alone.
        """
        if frames_a_call % frames_per_group:
            raise ValueError(f"{frames_a_call} frames a call: must be a multiple of {frames_per_group}")
        self._encode, self._decoder, self._side = encode, decoder, image_size
        self.frames_per_group, self.tokens_per_group = frames_per_group, tokens_per_group
        self.frames_a_call = frames_a_call
        self._model, self._limit, self._pieces, self._most_pixels = weights_id, cache_bytes, pieces, pixel_bytes
        # Called from any thread when something has happened that `pump` or who waits for a medium should see.
        self.listener: Callable[[], None] = lambda: None
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="identity")
        self._finishes = Finishes()
        self._lock = threading.RLock()
        self._media: collections.OrderedDict[tuple[bytes, bytes], _Medium] = collections.OrderedDict()
        self._unfinished: list[_Medium] = []  # in the order in which they were asked for
        self._encoding: list[_Medium] = []  # whose last rows may still be on the device
        self._decoded = self._encoded = self._reused = 0

    def watch(self, ref: MediaRef, namespace: bytes = b"") -> "Watched":
        """Begin to look at a medium, or find what is known of it. Waits for nothing; to be released once.

        Within a namespace equal media are looked at once; between two nothing is shared.
        """
        watched = Watched(self, ref)
        self._readers.submit(self._find, watched, namespace)
        return watched

    def _find(self, watched: "Watched", namespace: bytes) -> None:
        """Read what a medium is; begin to decode it where nobody has."""
        ref, medium, error, known = watched.ref, None, None, False
        try:
            identity, sources = media_identity(ref, self._side, self._model)
        except UserError as reason:
            error = reason
        except Exception as reason:  # of a library that reads containers
            error = UserError(f"{short(ref.path)}: cannot be read ({type(reason).__name__}: {reason})")
        with self._lock:
            if error is None and watched.held:
                key = (namespace, identity)
                medium = self._media.get(key)
                known = medium is not None
                if medium is None:
                    medium = self._media[key] = _Medium(self, key, ref, sources)
                    self._unfinished.append(medium)
                self._media.move_to_end(key)
                medium.users += 1
                self._reused += len(ref.times) if known else 0
            watched.found(medium, known, error)
        self._begin()
        self.listener()

    def _begin(self) -> None:
        """Have media decoded, first come first served, as far as there is room for their pixels."""
        while True:
            with self._lock:
                medium = next((medium for medium in self._unfinished if not medium.begun), None)
                there = sum(medium.pixel_bytes for medium in self._unfinished if medium.begun)
                if medium is None or (there and there + medium.pixel_bytes > self._most_pixels):
                    return
                medium.begun = True
            try:
                medium.decode(self._pieces)
            except (UserError, RuntimeError) as reason:  # no worker can start, or the decoder is closed
                medium.fail(UserError(str(reason)))

    def pump(self) -> bool:
        """Look at one group of frames, first come first served; False where none waits. For the device's thread."""
        with self._lock:
            settled, self._encoding = self._encoding, []
            medium = next((medium for medium in self._unfinished if medium.waits()), None)
            part = medium.next_part(self.frames_a_call) if medium is not None else None
        if medium is not None and part is not None:
            self._encode_part(medium, *part)
        for other in settled:
            other.settle()
        with self._lock:
            self._forget()
        return medium is not None

    def stats(self) -> dict[str, int]:
        """Frames `decoded`, `encoded` and `reused` since the beginning; `media` remembered or in use, their `bytes`."""
        with self._lock:
            size = sum(medium.bytes for medium in self._media.values())
            counts = {"decoded": self._decoded, "encoded": self._encoded, "reused": self._reused}
            return {f"frames_{name}": count for name, count in counts.items()} | {
                "media": len(self._media),
                "bytes": size,
            }

    def close(self) -> None:
        """Forget everything, and wait for nothing that is under way."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._finishes.close()
        with self._lock:
            unfinished = list(self._unfinished)
            self._media.clear()
            self._unfinished.clear()
        for medium in unfinished:
            medium.cancel()

    def _encode_part(self, medium: "_Medium", pixels: np.ndarray, seconds: np.ndarray) -> None:
        begun = time.perf_counter()
        missing = self.frames_a_call - len(pixels)
        padded = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else pixels
        rows = self._encode(padded, np.pad(seconds, (0, missing)))
        self._finishes.of(rows, functools.partial(medium.looked, begun))
        rows.copy_to_host_async()
        with self._lock:
            medium.add_rows(len(pixels), rows)
            self._encoded += len(pixels)
            self._encoding.append(medium)
            if medium.complete and medium in self._unfinished:
                self._unfinished.remove(medium)
        self._begin()

    def _forget(self) -> None:
        """Forget what nobody uses, least recently used first, beyond the bytes allowed."""
        idle = [medium for medium in self._media.values() if not medium.users]
        total = sum(medium.bytes for medium in idle)
        for medium in idle:
            if total <= self._limit:
                return
            total -= medium.bytes
            del self._media[medium.key]

    # -------------------------------------------------------------------- for the media's own threads

    def _counted(self, frames: int) -> None:
        with self._lock:
            self._decoded += frames
        self.listener()

    def _dropped(self, medium: "_Medium") -> None:
        """A medium that has failed, or that nobody waits for any more: the next who asks begins anew."""
        with self._lock:
            if self._media.get(medium.key) is medium:
                del self._media[medium.key]
            if medium in self._unfinished:
                self._unfinished.remove(medium)
        self._begin()
        self.listener()

    def _released(self, medium: "_Medium") -> None:
        with self._lock:
            medium.users -= 1
            if not medium.users:
                if not medium.complete:
                    medium.cancel()
                    self._dropped(medium)
                elif self._media.get(medium.key) is medium:
                    self._media.move_to_end(medium.key)
                self._forget()


class _Medium:
    """The vision tokens of one medium, those that are there and those to come. Its owner's lock guards it."""

    def __init__(self, owner: Vision, key: tuple[bytes, bytes], ref: MediaRef, sources: tuple[Source, ...]) -> None:
        self.owner, self.key, self.ref, self.sources = owner, key, ref, sources
        self.users = 0
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
        return (len(self.ref.times) - self.frames_encoded) * self.owner._side**2 * 3

    @property
    def bytes(self) -> int:
        return sum(int(rows.nbytes) for _, _, rows in self._rows)

    # ------------------------------------------------------------------------------- decoding

    def _submit(self, ref: MediaRef) -> "Future[Outcome]":
        return self.owner._decoder.submit(ref, self.owner._side)

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
            with self.owner._lock:
                self._ready[number] = outcome
                self._take_ready()
            self.owner._counted(len(outcome.pixels))
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
        with self.owner._lock:
            if self._whole is not None or self.error is not None:
                return
            self._whole = self._submit(self.ref)
        self._whole.add_done_callback(self._whole_came)

    def _whole_came(self, future: "Future[Outcome]") -> None:
        outcome = self._outcome(future)
        if isinstance(outcome, UserError):
            self.fail(outcome)
        elif outcome is not None:
            with self.owner._lock:
                had = len(self.seconds)
                self._queue(dataclasses.replace(outcome, pixels=outcome.pixels[had:], times=outcome.times[had:]))
            self.owner._counted(len(outcome.pixels))

    def fail(self, error: UserError) -> None:
        """Tell everybody who waits for it, and forget it: who asks again may have better luck."""
        with self.owner._lock:
            self.error = self.error or error
        self.cancel()
        self.owner._dropped(self)

    def cancel(self) -> None:
        """Take what is not decoded yet back from the decoder."""
        for future in (*self._pieces, *([self._whole] if self._whole else [])):
            future.cancel()
        with self.owner._lock:
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
        with self.owner._lock:
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


class Watched:
    """One request's hold on a medium; see `Vision.watch`."""

    def __init__(self, owner: Vision, ref: MediaRef) -> None:
        self.ref, self.held = ref, True
        self._owner = owner
        self._medium: _Medium | None = None
        self._known = False
        self._error: UserError | None = None

    def found(self, medium: _Medium | None, known: bool, error: UserError | None) -> None:
        """What it is, or why that cannot be known. For `Vision` alone."""
        self._medium, self._known, self._error = medium, known, error

    @property
    def identity(self) -> bytes | None:
        """sha256 of what is seen and of who sees it; None until it is known."""
        return self._medium.key[1] if self._medium else None

    @property
    def rows(self) -> int:
        """Vision tokens in all."""
        return len(self.ref.times) // self._owner.frames_per_group * self._owner.tokens_per_group

    @property
    def ready(self) -> int:
        """Vision tokens that can be taken."""
        return self._medium.ready if self._medium else 0

    @property
    def error(self) -> UserError | None:
        """Why there will be no more of them."""
        return self._medium.error if self._medium else self._error

    @property
    def times(self) -> tuple[float, ...]:
        """When each frame was on display, in seconds of the clip; empty until all are decoded."""
        seconds = self._medium.seconds if self._medium else []
        return tuple(seconds) if len(seconds) == len(self.ref.times) else ()

    @property
    def usage(self) -> dict[str, float]:
        """What was done for this request, in frames and seconds on the clock.

        Frames that were known already, or on their way for another request, are `frames_reused`.
        """
        medium, known = self._medium, self._known
        new = medium if not known else None
        return {
            "frames_decoded": len(new.seconds) if new else 0,
            "frames_encoded": new.frames_encoded if new else 0,
            "frames_reused": len(self.ref.times) if known else 0,
            "decode_frames": new.decode_seconds if new else 0.0,
            "encode": new.encode_seconds if new else 0.0,
        }

    def take(self, first: int, last: int) -> np.ndarray:
        """Vision tokens [last - first, D]; ValueError where they are not ready. For the device's thread."""
        if self._medium is None or not 0 <= first < last <= self.ready:
            raise ValueError(f"rows {first} to {last} of {self.ready} that are ready")
        return self._medium.take(first, last)

    def release(self) -> None:
        """This request needs it no longer. A medium that nobody waits for is not looked at to its end."""
        with self._owner._lock:
            held, self.held = self.held, False
        if held and self._medium is not None:
            self._owner._released(self._medium)
