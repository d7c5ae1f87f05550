"""What was seen: vision tokens of media, made once, however often and under whatever name they are asked about.

Frames are decoded in the decoder's workers, in pieces, and looked at in groups as they come; who waits for a medium
reads the tokens that are ready while the rest is being decoded.
"""

import collections
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.data.media.decode import Decoder
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.identity import media_identity
from kangaroo_jax.inference.medium import Medium
from kangaroo_jax.inference.timing import Finishes
from kangaroo_jax.inference.turns import Turns

Encode = Callable[[np.ndarray, np.ndarray], jax.Array]  # uint8[F, S, S, 3], seconds float32[F] -> [R, D]


_READERS = 4  # threads that read the bytes of media to know what they are
_AHEAD = 2  # media for each piece that may be decoded at a time, which the decoder has at most


class Vision:
    """Vision tokens by what their media are, the least recently used forgotten beyond a number of bytes.

    Owners take turns at every part of the work, so that one with many media holds up nobody.

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
        self._encode, self.decoder, self.side = encode, decoder, image_size
        self.frames_per_group, self.tokens_per_group = frames_per_group, tokens_per_group
        self.frames_a_call = frames_a_call
        self._model, self._limit, self._pieces, self._most_pixels = weights_id, cache_bytes, pieces, pixel_bytes
        # Called from any thread when something has happened that `pump` or who waits for a medium should see.
        self.listener: Callable[[], None] = lambda: None
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="identity")
        self._finishes = Finishes()
        self.lock = threading.RLock()
        self._finding: list[tuple[Watched, bytes]] = []
        self._turns = {work: Turns() for work in ("find", "decode", "encode")}
        self._is_beginning = False
        self._media: collections.OrderedDict[tuple[bytes, bytes], Medium] = collections.OrderedDict()
        self._unfinished: list[Medium] = []  # in the order in which they were asked for
        self._encoding: list[Medium] = []  # whose last rows may still be on the device
        self._decoded = self._encoded = self._reused = 0

    def watch(self, ref: MediaRef, namespace: bytes = b"", owner: bytes = b"") -> "Watched":
        """Begin to look at a medium, or find what is known of it. Waits for nothing; to be released once.

        Within a namespace equal media are looked at once; between two nothing is shared. Owners take turns.
        """
        watched = Watched(self, ref, owner)
        with self.lock:
            self._finding.append((watched, namespace))
        self._readers.submit(self._find)
        return watched

    def _find(self) -> None:
        """Read what the next medium is; begin to decode it where nobody has."""
        with self.lock:
            turn = self._turns["find"]
            watched, namespace = turn.ordered(self._finding, lambda one: (one[0].owner,))[0]
            self._finding.remove((watched, namespace))
            turn.served((watched.owner,))
        ref, medium, error, known = watched.ref, None, None, False
        try:
            identity, sources = media_identity(ref, self.side, self._model)
        except UserError as reason:
            error = reason
        except Exception as reason:  # of a library that reads containers
            error = UserError(f"{short(ref.path)}: cannot be read ({type(reason).__name__}: {reason})")
        with self.lock:
            if error is None and watched.held:
                key = (namespace, identity)
                medium = self._media.get(key)
                known = medium is not None
                if medium is None:
                    medium = self._media[key] = Medium(self, key, ref, sources)
                    self._unfinished.append(medium)
                self._media.move_to_end(key)
                medium.users += 1
                medium.owners.add(watched.owner)
                self._reused += len(ref.times) if known else 0
            watched.found(medium, known, error)
        self._begin()
        self.listener()

    def _begin(self) -> None:
        """Have media decoded, as far as the decoder needs them and there is room for their pixels.

        What the decoder has it decodes in that order. Only one thread is in here: a medium that is decoded at once,
        and what happens meanwhile, is seen to by the next turn of its loop.
        """
        with self.lock:
            if self._is_beginning:
                return
            self._is_beginning = True
        while (medium := self._next_to_decode()) is not None:
            try:
                medium.decode(self._pieces)
            except Exception as reason:  # no worker can start, or the decoder is closed
                medium.fail(UserError(str(reason)))

    def _next_to_decode(self) -> Medium | None:
        """The medium to hand to the decoder now; None where there is none, and `_begin` is over."""
        with self.lock:
            turn = self._turns["decode"]
            waiting = turn.ordered([medium for medium in self._unfinished if not medium.begun], _owners)
            there = sum(medium.pixel_bytes for medium in self._unfinished if medium.begun)
            busy = sum(medium.decoding for medium in self._unfinished) >= _AHEAD * self._pieces
            if not waiting or busy or (there and there + waiting[0].pixel_bytes > self._most_pixels):
                self._is_beginning = False
                return None
            turn.served(_owners(waiting[0]))
            waiting[0].begun = True
            return waiting[0]

    def pump(self) -> bool:
        """Look at one group of frames; False where none waits. For the device's thread."""
        with self.lock:
            settled, self._encoding = self._encoding, []
            turn = self._turns["encode"]
            ready = turn.ordered([medium for medium in self._unfinished if medium.waits()], _owners)
            medium = ready[0] if ready else None
            part = medium.next_part(self.frames_a_call) if medium is not None else None
            if medium is not None:
                turn.served(_owners(medium))
        if medium is not None and part is not None:
            self._encode_part(medium, *part)
        for other in settled:
            other.settle()
        with self.lock:
            self._forget()
        return medium is not None

    def stats(self) -> dict[str, int]:
        """Frames `decoded`, `encoded` and `reused` since the beginning; `media` remembered or in use, their `bytes`."""
        with self.lock:
            size = sum(medium.bytes for medium in self._media.values())
            counts = {"decoded": self._decoded, "encoded": self._encoded, "reused": self._reused}
            return {f"frames_{name}": count for name, count in counts.items()} | {
                "media": len(self._media),
                "bytes": size,
            }

    def forget(self) -> None:
        """Forget media that nobody uses, and all counts."""
        with self.lock:
            for medium in [medium for medium in self._media.values() if not medium.users]:
                del self._media[medium.key]
            self._decoded = self._encoded = self._reused = 0

    def close(self) -> None:
        """Forget everything, and wait for nothing that is under way."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._finishes.close()
        with self.lock:
            unfinished = list(self._unfinished)
            self._media.clear()
            self._unfinished.clear()
        for medium in unfinished:
            medium.cancel()

    def _encode_part(self, medium: Medium, pixels: np.ndarray, seconds: np.ndarray) -> None:
        begun = time.perf_counter()
        missing = self.frames_a_call - len(pixels)
        padded = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else pixels
        rows = self._encode(padded, np.pad(seconds, (0, missing)))
        self._finishes.of(rows, functools.partial(medium.looked, begun))
        rows.copy_to_host_async()
        with self.lock:
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

    def counted(self, frames: int) -> None:
        with self.lock:
            self._decoded += frames
        self._begin()
        self.listener()

    def dropped(self, medium: Medium) -> None:
        """A medium that has failed, or that nobody waits for any more: the next who asks begins anew."""
        with self.lock:
            if self._media.get(medium.key) is medium:
                del self._media[medium.key]
            if medium in self._unfinished:
                self._unfinished.remove(medium)
        self._begin()
        self.listener()

    def _released(self, medium: Medium) -> None:
        with self.lock:
            medium.users -= 1
            if not medium.users:
                if not medium.complete:
                    medium.cancel()
                    self.dropped(medium)
                elif self._media.get(medium.key) is medium:
                    self._media.move_to_end(medium.key)
                self._forget()


def _owners(medium: Medium) -> set[bytes]:
    return medium.owners


class Watched:
    """One request's hold on a medium; see `Vision.watch`."""

    def __init__(self, vision: Vision, ref: MediaRef, owner: bytes) -> None:
        self.ref, self.owner, self.held = ref, owner, True
        self._vision = vision
        self._medium: Medium | None = None
        self._known = False
        self._error: UserError | None = None

    def found(self, medium: Medium | None, known: bool, error: UserError | None) -> None:
        """What it is, or why that cannot be known. For `Vision` alone."""
        self._medium, self._known, self._error = medium, known, error

    @property
    def identity(self) -> bytes | None:
        """sha256 of what is seen and of who sees it; None until it is known."""
        return self._medium.key[1] if self._medium else None

    @property
    def rows(self) -> int:
        """Vision tokens in all."""
        return len(self.ref.times) // self._vision.frames_per_group * self._vision.tokens_per_group

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
        with self._vision.lock:
            held, self.held = self.held, False
        if held and self._medium is not None:
            self._vision._released(self._medium)
