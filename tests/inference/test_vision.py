"""Media are known by their bytes: looked at once under whatever name, and never taken for one another."""

import base64
import dataclasses
import hashlib
import io
import os
import tarfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.media.decode import Decoder, Outcome, ProcessDecoder, ThreadDecoder, decode_one
from kangaroo_jax.data.media.storage import MediaCache, use_cache
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.identity import media_identity, source_of
from kangaroo_jax.inference.vision import Vision, Watched
from tests.data.media import numbered_frame, read_number, write_video

SIDE = 32


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """a.mp4, the same as b.bin, and c.mp4, which differs; 16 numbered frames, 8 a second."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 16, 8)
    (folder / "b.bin").write_bytes((folder / "a.mp4").read_bytes())
    write_video(folder / "c.mp4", 16, 8, gop=4)
    for path in folder.iterdir():  # long ago: what they hold is remembered
        os.utime(path, (1e9, 1e9))
    return folder


class Counting:
    """A decoder that says what it was asked for, and may be made to wait."""

    def __init__(self, decoder: Decoder) -> None:
        self.asked: list[MediaRef] = []
        self.go = threading.Event()
        self.go.set()
        self._decoder = decoder

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        self.asked.append(ref)
        self.go.wait(10)
        return self._decoder.submit(ref, image_size)


def encode(frames: np.ndarray, seconds: np.ndarray) -> jnp.ndarray:
    """Two tokens for a group of two frames: the numbers that the frames show and their seconds."""
    numbers = np.array([read_number(frame) for frame in frames], np.float32)
    return jnp.asarray(np.stack([numbers, seconds], axis=-1).reshape(-1, 2))


@pytest.fixture
def make(request):
    """Makes a Vision of two frames a group, two tokens each, and four frames a call."""

    def make(decoder: Decoder | None = None, encode=encode, **options) -> Vision:
        decoder = Counting(decoder or ThreadDecoder(2))
        defaults = dict(image_size=SIDE, frames_per_group=2, tokens_per_group=2, frames_a_call=4, cache_bytes=1 << 20)
        vision = Vision(encode, decoder, **{**defaults, "weights_id": "w", **options})
        vision.asked, vision.go = decoder.asked, decoder.go
        request.addfinalizer(vision.close)
        return vision

    return make


def ref(path: Path | str, count: int = 8, seconds: float = 2.0, **options) -> MediaRef:
    times = tuple((i + 0.5) * seconds / count for i in range(count))
    return MediaRef("video", str(path), times, **options)


def seen(vision: Vision, *watched: Watched) -> list[np.ndarray]:
    """Their tokens, once they are all there; raises what has gone wrong."""
    deadline = time.monotonic() + 20
    while any(w.ready < w.rows for w in watched):
        assert time.monotonic() < deadline
        for w in watched:
            if w.error is not None:
                raise w.error
        if not vision.pump():
            time.sleep(1e-3)
    vision.pump()
    return [w.take(0, w.rows) for w in watched]


def numbers(rows: np.ndarray) -> list[int]:
    return rows[:, 0].astype(int).tolist()


WANTED = [1, 3, 5, 7, 9, 11, 13, 15]  # the frames on display at the moments of `ref`


class Slow(np.ndarray):
    """Tokens that the device needs a while for, from when it is handed their frames."""

    @classmethod
    def encode(cls, frames: np.ndarray, seconds: np.ndarray) -> "Slow":
        rows = np.asarray(encode(frames, seconds)).view(cls)
        rows.there = time.perf_counter() + 0.1
        return rows

    def copy_to_host_async(self) -> None:
        pass

    def block_until_ready(self) -> "Slow":
        time.sleep(max(0.0, self.there - time.perf_counter()))
        return self


def test_seconds_of_looking_are_those_until_the_tokens_are_there(make, clips):
    vision, begun = make(encode=Slow.encode), time.perf_counter()
    watched = vision.watch(ref(clips / "a.mp4"))
    seen(vision, watched)
    deadline = time.monotonic() + 10
    while watched.usage["encode"] < 0.1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 0.1 <= watched.usage["encode"] <= time.perf_counter() - begun


def test_the_pixels_of_many_media_are_never_there_at_a_time(make, clips):
    frame = SIDE * SIDE * 3
    vision = make(pixel_bytes=10 * frame)
    media = [ref(clips / name, count) for name in ("a.mp4", "c.mp4") for count in (8, 4, 6, 12)]
    watched = [vision.watch(medium) for medium in media]
    assert wait_for(lambda: all(w.identity is not None for w in watched))
    assert sum(len(asked.times) for asked in vision.asked) <= 12
    done = 0
    while done < len(watched):
        begun = sum(len(asked.times) for asked in vision.asked)
        looked = sum(w.usage["frames_encoded"] for w in watched)
        assert begun - looked <= 12  # the largest may be there alone
        if not vision.pump():
            time.sleep(1e-3)
        done = sum(w.ready == w.rows for w in watched)
    bad = vision.watch(ref(clips / "none.mp4"))
    assert wait_for(lambda: bad.error is not None)


def test_a_medium_that_waits_for_room_may_be_left(make, clips):
    vision = make(pixel_bytes=1)
    vision.go.clear()
    first, second, third = (
        vision.watch(ref(clips / name, count)) for name, count in (("a.mp4", 8), ("c.mp4", 4), ("c.mp4", 6))
    )
    assert wait_for(lambda: third.identity is not None and second.identity is not None and vision.asked)
    waiting = [w for w in (first, second, third) if len(w.ref.times) != len(vision.asked[0].times)]
    waiting[0].release()
    vision.go.set()
    seen(vision, *(w for w in (first, second, third) if w is not waiting[0]))
    assert len(vision.asked) == 2


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(1e-3)
    return bool(condition())


def test_owners_take_turns_at_decoding_and_looking(make, clips):
    vision = make()
    vision.go.clear()
    many = [vision.watch(ref(clips / "a.mp4", count), b"a", b"a") for count in range(2, 26, 2)]
    assert wait_for(lambda: all(w.identity is not None for w in many))
    few = vision.watch(ref(clips / "c.mp4", 16), b"b", b"b")
    assert wait_for(lambda: few.identity is not None)
    vision.go.set()
    seen(vision, few)
    assert [Path(asked.path).name for asked in vision.asked].index("c.mp4") <= 2  # those that the decoder had before
    assert sum(w.ready == w.rows for w in many) < 8
    seen(vision, *many)
    assert len(vision.asked) == 13


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("count", [2, 8, 14])
def test_tokens_are_those_of_the_frames_in_order_however_they_are_decoded(make, clips, pieces, count):
    vision = make(pieces=pieces)
    medium, plain = ref(clips / "a.mp4", count), decode_one(ref(clips / "a.mp4", count), SIDE)
    watched = vision.watch(medium)
    (rows,) = seen(vision, watched)
    assert numbers(rows) == [read_number(frame) for frame in plain.pixels]
    np.testing.assert_array_equal(rows[:, 1], plain.times.astype(np.float32))
    assert watched.times == tuple(rows[:, 1]) and rows.shape == (count, 2)
    assert len(vision.asked) == min(pieces, -(-count // 4))
    assert {k: v for k, v in watched.usage.items() if k.startswith("frames")} == {
        "frames_decoded": count,
        "frames_encoded": count,
        "frames_reused": 0,
    }
    for first in range(count):  # and any part of them
        np.testing.assert_array_equal(watched.take(first, count), rows[first:])
    with pytest.raises(ValueError, match="that are ready"):
        watched.take(0, count + 1)


def test_the_same_bytes_under_another_name_are_neither_decoded_nor_looked_at(make, clips, tmp_path):
    vision = make()
    (first,) = seen(vision, vision.watch(ref(clips / "a.mp4")))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(clips / "a.mp4", "7.mp4")
    with tarfile.open(tmp_path / "shard.tar") as archive:
        (member,) = archive.getmembers()
    (tmp_path / "link").symlink_to(clips / "a.mp4")
    for name in (clips / "b.bin", f"{tmp_path}/shard.tar::7.mp4@{member.offset_data}+{member.size}", tmp_path / "link"):
        watched = vision.watch(ref(name))
        (rows,) = seen(vision, watched)
        np.testing.assert_array_equal(rows, first)
        assert watched.usage["frames_reused"] == 8 and not watched.usage["frames_decoded"]
    assert len(vision.asked) == 1
    assert vision.stats() == {
        "frames_decoded": 8,
        "frames_encoded": 8,
        "frames_reused": 24,
        "media": 1,
        "bytes": first.nbytes,
    }


def test_whatever_changes_what_is_seen_is_another_medium(make, clips):
    base = ref(clips / "a.mp4")
    others = [
        ref(clips / "a.mp4", 16),
        ref(clips / "a.mp4", seconds=1.0),
        ref(clips / "a.mp4", start=0.5, seconds=1.0),
        ref(clips / "c.mp4"),
        dataclasses.replace(base, kind="image"),
    ]
    known = {media_identity(medium, SIDE, "w")[0] for medium in [base, *others]}
    known |= {media_identity(base, SIDE * 2, "w")[0], media_identity(base, SIDE, "v")[0]}
    assert len(known) == 8
    vision = make()
    eight, sixteen = seen(vision, vision.watch(base), vision.watch(others[0]))
    assert numbers(eight) == WANTED and numbers(sixteen) == list(range(16))


def test_namespaces_share_nothing(make, clips):
    vision = make()
    seen(vision, vision.watch(ref(clips / "a.mp4"), b"one"))
    watched = vision.watch(ref(clips / "a.mp4"), b"two")
    seen(vision, watched)
    assert watched.usage["frames_decoded"] == 8 and vision.stats()["media"] == 2
    again = vision.watch(ref(clips / "a.mp4"), b"two")
    seen(vision, again)
    assert again.usage["frames_reused"] == 8 and vision.stats()["frames_decoded"] == 16


def test_a_file_overwritten_in_place_is_seen_anew_however_soon(make, tmp_path):
    """Images of equal size in bytes, within the same tick of the file system's clock."""
    data = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.fromarray(numbered_frame(number, SIDE, SIDE)).save(buffer, "BMP")
        data.append(buffer.getvalue())
    assert len({len(content) for content in data}) == 1
    vision, path = make(), tmp_path / "a.bmp"
    path.write_bytes(data[0])
    times = path.stat()
    for number, content in enumerate(data):
        with path.open("r+b") as file:
            file.write(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some tools do
        (rows,) = seen(vision, vision.watch(MediaRef("image", str(path), (0.0, 0.0))))
        assert numbers(rows) == [number, number]
    with path.open("r+b", buffering=0) as file:
        for number in range(300):  # several in a tick
            file.seek(0)
            file.write(b"%3d" % number)
            assert source_of(str(path)).digest == hashlib.sha256(b"%3d" % number + data[-1][3:]).digest()


def test_the_digest_of_a_file_at_rest_is_read_once(clips, monkeypatch, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes((clips / "a.mp4").read_bytes())
    read: list[str] = []
    monkeypatch.setattr("kangaroo_jax.inference.identity._FRESH", 0.05)
    monkeypatch.setattr(
        "kangaroo_jax.inference.identity.member_of", lambda name: read.append(name)
    )  # asked before each reading
    time.sleep(0.1)
    assert source_of(str(path)).digest == source_of(str(path)).digest and len(read) == 1
    path.write_bytes(b"other")
    source_of(str(path))
    assert len(read) == 2


def test_bytes_that_change_between_reading_and_decoding_are_an_error_and_nothing_is_kept(make, clips, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes((clips / "a.mp4").read_bytes())
    vision = make()
    vision.go.clear()
    watched = vision.watch(ref(path))
    while not vision.asked:
        time.sleep(1e-3)
    path.write_bytes((clips / "c.mp4").read_bytes())
    vision.go.set()
    with pytest.raises(UserError, match=r"v\.mp4: the file was changed while it was read"):
        seen(vision, watched)
    watched.release()
    assert vision.stats()["media"] == 0
    seen(vision, vision.watch(ref(path)))


def test_one_flight_for_all_who_ask_and_a_failure_is_not_kept(make, clips, tmp_path):
    vision = make()
    vision.go.clear()
    watched = [vision.watch(ref(clips / name)) for name in ("a.mp4", "b.bin", "a.mp4")]
    vision.go.set()
    for rows in seen(vision, *watched):
        assert numbers(rows) == WANTED
    assert len(vision.asked) == 1 and vision.stats()["frames_reused"] == 16

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 100)
    for _ in range(2):
        watched = vision.watch(ref(broken))
        with pytest.raises(UserError, match="not a readable video"):
            seen(vision, watched)
        watched.release()
    assert len(vision.asked) == 3 and vision.stats()["media"] == 1
    missing = vision.watch(ref(tmp_path / "none.mp4"))
    with pytest.raises(UserError, match="no such file"):
        seen(vision, missing)
    missing.release()
    assert missing.identity is None


def test_least_recently_used_is_forgotten_beyond_the_bytes_but_nothing_in_use(make, clips):
    vision = make(cache_bytes=2 * 8 * 2 * 4)  # two of these media

    def look(path: str, count: int = 8) -> Watched:
        watched = vision.watch(ref(clips / path, count))
        seen(vision, watched)
        return watched

    first, second = look("a.mp4"), look("c.mp4")
    third = look("a.mp4", 6)
    assert vision.stats()["media"] == 3  # all are in use
    third.release()
    first.release()
    second.release()
    assert vision.stats()["media"] == 2 and vision.stats()["bytes"] <= 128
    look("a.mp4").release()
    assert look("a.mp4").usage["frames_reused"] == look("c.mp4").usage["frames_reused"] == 8
    assert look("a.mp4", 6).usage["frames_decoded"] == 6


def test_who_leaves_takes_the_work_along_unless_another_waits(make, clips):
    vision = make(ThreadDecoder(1), pieces=4)
    vision.go.clear()
    watched = vision.watch(ref(clips / "a.mp4", 16))
    other = vision.watch(ref(clips / "b.bin", 16))
    while None in (watched.identity, other.identity):
        time.sleep(1e-3)
    watched.release()
    watched.release()  # once is enough
    vision.go.set()
    assert numbers(seen(vision, other)[0]) == list(range(16))
    assert len(vision.asked) == 4


def test_what_nobody_waits_for_is_taken_back_from_the_decoder(make, clips):
    class Never:
        def submit(self, medium: MediaRef, image_size: int) -> "Future[Outcome]":
            futures.append(Future())
            return futures[-1]

    futures: list[Future[Outcome]] = []
    vision = make(Never(), pieces=4)
    watched = vision.watch(ref(clips / "c.mp4", 16))
    while len(futures) < 4 or watched.identity is None:
        time.sleep(1e-3)
    watched.release()
    deadline = time.monotonic() + 10
    while not all(future.cancelled() for future in futures):
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    assert vision.stats()["media"] == 0 and not vision.pump()


@pytest.mark.parametrize("part", [12, 24])
def test_damage_costs_what_it_costs_in_training(make, tmp_path, part):
    """Pieces of a damaged video would fail, or hold other frames than the whole does."""
    path = write_video(tmp_path / "v.mp4", 64, 8, gop=8, options={"movflags": "+faststart"})
    data = bytearray(path.read_bytes())
    data[-len(data) // part :] = bytes(len(data) // part)
    path.write_bytes(data)
    medium, vision = ref(path, 32, seconds=8.0), make(pieces=8)
    plain = decode_one(medium, SIDE)
    if part == 12:
        with pytest.raises(UserError) as error:
            seen(vision, vision.watch(medium))
        assert str(error.value) == str(plain)
    else:
        (rows,) = seen(vision, vision.watch(medium))
        assert plain.missed == 3
        np.testing.assert_array_equal(rows[:, 1], plain.times.astype(np.float32))


def test_a_hole_where_a_piece_begins_shows_what_the_whole_shows(make, tmp_path):
    path = write_video(tmp_path / "v.mp4", 80, 8, gop=4, options={"movflags": "+faststart"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(float(p.pts * p.time_base), p.pos, p.size) for p in container.demux(video=0) if p.size]
    for seconds, place, size in places:
        if 5.0 <= seconds < 5.5:
            data[place + 4 : place + size] = bytes(size - 4)
    path.write_bytes(data)
    medium, vision = ref(path, 40, seconds=10.0), make(pieces=2, frames_a_call=20)
    plain, part = (decode_one(m, SIDE) for m in (medium, dataclasses.replace(medium, times=medium.times[20:])))
    assert plain.missed == part.missed == 0 and (plain.times[20:] != part.times).any()
    (rows,) = seen(vision, vision.watch(medium))
    np.testing.assert_array_equal(rows[:, 1], plain.times.astype(np.float32))


def test_looking_begins_while_later_frames_are_being_decoded(make, clips):
    class Slow(ThreadDecoder):
        def submit(self, medium: MediaRef, image_size: int) -> "Future[Outcome]":
            outcome = decode_one(medium, image_size)
            future: Future[Outcome] = Future()
            if medium.times[0] < 1.0:
                future.set_result(outcome)
            else:
                later.append((future, outcome))
            return future

    later: list = []
    vision = make(Slow(0), pieces=2)
    watched = vision.watch(ref(clips / "a.mp4"))
    while not vision.pump():
        time.sleep(1e-3)
    assert (watched.ready, watched.rows) == (4, 8) and numbers(watched.take(0, 4)) == WANTED[:4]
    assert not vision.pump() and watched.times == ()
    calls = []
    vision.listener = lambda: calls.append(1)
    for future, outcome in later:
        future.set_result(outcome)
    assert calls and vision.pump() and numbers(watched.take(2, 8)) == WANTED[2:]


def test_frames_given_as_images_and_a_data_address(make, clips, tmp_path):
    use_cache(MediaCache(tmp_path / "cache", 1 << 30))
    vision, paths = make(), []
    for number in (3, 9, 3, 12):
        paths.append(str(tmp_path / f"{len(paths)}.png"))
        Image.fromarray(numbered_frame(number)).save(paths[-1])
    frames = MediaRef("video", paths[0], (0.0, 1.0, 2.0, 3.0), frames=tuple(paths))
    assert numbers(seen(vision, vision.watch(frames))[0]) == [3, 9, 3, 12]
    backwards = dataclasses.replace(frames, frames=tuple(reversed(paths)))
    assert numbers(seen(vision, vision.watch(backwards))[0]) == [12, 3, 9, 3]
    address = f"data:video/mp4;base64,{base64.b64encode((clips / 'a.mp4').read_bytes()).decode()}"
    seen(vision, vision.watch(ref(clips / "a.mp4")))
    watched = vision.watch(ref(address))
    seen(vision, watched)
    assert watched.usage["frames_reused"] == 8


def test_worker_processes_decode_and_are_cancelled(make, clips):
    decoder = ProcessDecoder(1)
    try:
        vision = make(decoder, pieces=2)
        gone = vision.watch(ref(clips / "c.mp4", 16))
        while not vision.asked:
            time.sleep(1e-3)
        gone.release()
        assert numbers(seen(vision, vision.watch(ref(clips / "a.mp4")))[0]) == WANTED
    finally:
        decoder.close()
