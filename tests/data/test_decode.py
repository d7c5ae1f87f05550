"""Decoding in threads and processes: order, errors in their places, crashes and hangs, the cache."""

import os
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.data.media import decode
from kangaroo_jax.data.media.decode import CachedDecoder, Outcome, ProcessDecoder, ThreadDecoder, make_decoder
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError
from tests.data.media import read_number


def refs_of(media: Path) -> list[MediaRef]:
    names = ["20s.mp4", "missing.mp4", "2s.mp4", "5s.mp4"]
    return [MediaRef("video", str(media / name), (0.5, 1.5)) for name in names] + [
        MediaRef("image", str(media / "photo.jpg"), (0.0, 0.0))
    ]


@pytest.mark.parametrize("threads, workers, cache", [(0, 0, 0), (3, 0, 0), (0, 2, 0), (2, 0, 1)])
def test_outcomes_are_in_order(media: Path, threads: int, workers: int, cache: int) -> None:
    decoder = make_decoder(num_workers=workers, num_threads=threads, cache_mib=cache)
    for _ in range(2):
        outcomes = decoder.decode(refs_of(media), 48)
        assert [isinstance(outcome, UserError) for outcome in outcomes] == [False, True, False, False, False]
        for outcome, expected in zip(outcomes, ([2, 6], None, [2, 6], [2, 6], [9, 9]), strict=True):
            if isinstance(outcome, Clip):
                assert [read_number(frame) for frame in outcome.pixels] == expected
    assert decoder.decode([], 48) == []
    decoder.close()


def test_a_library_that_breaks_costs_only_the_sample(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: object, **kwargs: object) -> Clip:
        raise RuntimeError("inside\nout")

    monkeypatch.setattr(decode, "load_media", breaks)
    (outcome,) = ThreadDecoder(0).decode(refs_of(media)[:1], 48)
    assert isinstance(outcome, UserError) and str(outcome).endswith("(RuntimeError: inside out)")
    monkeypatch.setattr(decode, "load_media", lambda *a, **k: Clip(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1)))
    (outcome,) = ThreadDecoder(0).decode(refs_of(media)[:1], 8)
    assert isinstance(outcome, UserError) and "1 frames decoded, 2 promised" in str(outcome)


def decode_or_misbehave(ref: MediaRef, image_size: int) -> Outcome:
    """In a worker: files named so crash it or hang it."""
    if "crash" in ref.path:
        os.abort()
    if "hang" in ref.path:
        time.sleep(60)
    return Clip(np.full((1, 2, 2, 3), image_size, np.uint8), np.zeros(1))


def test_crashes_and_hangs_cost_only_their_own_sample() -> None:
    names = ["a", "crash", "b", "hang", "c", "crash again", "d", "e"]
    decoder = ProcessDecoder(2, time_limit=2.0, job=decode_or_misbehave)
    outcomes = decoder.decode([MediaRef("video", name, (0.0,)) for name in names], 7)
    for name, outcome in zip(names, outcomes, strict=True):
        if "crash" in name:
            assert isinstance(outcome, UserError) and str(outcome).startswith(f"{name}: the decoder crashed")
        elif "hang" in name:
            assert str(outcome) == "hang: not decoded within 2 s"
        else:
            assert isinstance(outcome, Clip) and (outcome.pixels == 7).all()
    decoder.close()


def noise(ref: MediaRef, image_size: int) -> Clip:
    """In a worker: as many random frames as times."""
    times = np.array(ref.times)
    pixels = np.random.default_rng(len(times)).integers(0, 256, (len(times), image_size, image_size, 3), np.uint8)
    return Clip(pixels, times, 1.5, 2)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="of Linux")
def test_many_pixels_come_in_memory_of_their_own_which_is_freed_with_them() -> None:
    decoder, counts = ProcessDecoder(2, job=noise), (1, 5, 6, 40)  # 5 frames are under 4 MiB, 40 are 31 MB
    refs = [MediaRef("video", "x", tuple(map(float, range(count)))) for count in counts]
    decoder.decode(refs, 512)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        outcomes = decoder.decode(refs, 512)
        for ref, outcome in zip(refs, outcomes, strict=True):
            whole = noise(ref, 512)
            assert isinstance(outcome, Clip) and (outcome.zero, outcome.missed) == (1.5, 2)
            np.testing.assert_array_equal(outcome.pixels, whole.pixels)
            np.testing.assert_array_equal(outcome.times, whole.times)
            outcome.pixels[0] = 0
        assert Path("/proc/self/maps").read_text().count("memfd:kangaroo-array") == 2
    del outcome, outcomes
    assert "memfd:kangaroo-array" not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == files
    decoder.close()


class Counting:
    """A decoder that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        self.asked.append(ref.path)
        future: Future[Outcome] = Future()
        bad = ref.path == "bad"
        future.set_result(UserError("bad") if bad else Clip(np.zeros((1, 16, 16, 3), np.uint8), np.zeros(1)))
        return future

    def close(self) -> None:
        pass


def test_the_cache_keeps_what_was_used_last_within_its_limit() -> None:
    inner = Counting()
    cache = CachedDecoder(inner, limit=3 * 16 * 16 * 3)
    a, b, c, d, bad = (MediaRef("video", name, (0.0,)) for name in ("a", "b", "c", "d", "bad"))
    assert len(cache.decode([a, b, a, c], 16)) == 4
    assert inner.asked == ["a", "b", "c"]
    cache.decode([a, d], 16)  # b was used longest ago
    cache.decode([a, c, d], 16)
    assert inner.asked == ["a", "b", "c", "d"]
    cache.decode([b], 16)
    assert inner.asked[-1] == "b"
    cache.decode([bad], 16)
    cache.decode([bad], 16)
    assert inner.asked[-2:] == ["bad", "bad"]  # errors are not kept
