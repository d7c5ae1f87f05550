"""Rows that several hosts have: each decodes its own frames, and together they have the batches of one host alone."""

import json
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.config import DataConfig
from kangaroo_jax.conventions import FIELDS
from kangaroo_jax.data.batches.held_out import HeldOutBatches
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import Loader, make_loader
from kangaroo_jax.data.batches.sharing import SharedRow, Sharing
from kangaroo_jax.data.media import picker
from kangaroo_jax.data.media.decode import Decoder, Outcome, ThreadDecoder, decode_one
from kangaroo_jax.data.media.video import Clip, MediaRef, load_moments, load_video, probe
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from tests.data.media import write_video
from tests.data.test_loader import annotate

FRAMES = 24  # of a row


class Room:
    """Where hosts that are threads of this process leave their messages."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, int], str] = {}
        self.news = threading.Condition()


class Messages:
    """A host's messages in the room."""

    def __init__(self, room: Room, host: int) -> None:
        self._room, self._host, self._begun, self._stopped = room, host, 0, False

    def exchange(self, name: str, text: str, hosts: Collection[int]) -> dict[int, str]:
        said, keys = self._room.said, {host: (f"{self._begun} {name}", host) for host in sorted(hosts)}
        with self._room.news:
            assert keys[self._host] not in said
            said[keys[self._host]] = text
            self._room.news.notify_all()
            there = lambda: self._stopped or all(key in said for key in keys.values())  # noqa: E731
            assert self._room.news.wait_for(there, timeout=60), "a host waits for ever"
            if self._stopped:
                raise RuntimeError("stopped")
            return {host: said[key] for host, key in keys.items()}

    def begin_anew(self) -> None:
        self._begun, self._stopped = self._begun + 1, False

    def stop(self) -> None:
        with self._room.news:
            self._stopped = True
            self._room.news.notify_all()


def sharings(hosts: int, rows: Collection[int], frames: int = FRAMES) -> list[Sharing]:
    """Each host's part where all have all rows, and each as many frames of them."""
    room, each = Room(), frames // hosts
    all_of_them = frozenset(range(hosts))
    return [
        Sharing(
            {row: SharedRow(all_of_them, frozenset(range(host * each, host * each + each))) for row in rows},
            Messages(room, host),
        )
        for host in range(hosts)
    ]


def loaders(config: DataConfig, tokenizer: Tokenizer, hosts: int, folder: Path, **options) -> list[Loader]:  # noqa: ANN003
    rows = range(config.packs_per_batch)
    shares = sharings(hosts, rows, config.frames_per_pack) if hosts > 1 else [None]
    settings = {"frames_per_group": 2, "tokens_per_group": 3, "seed": 5, "num_threads": 2} | options
    return [
        make_loader(config, tokenizer, ledger=Ledger(folder / f"{hosts}.{host}.jsonl"), sharing=share, **settings)
        for host, share in enumerate(shares)
    ]


def taken(loader: Loader, count: int) -> list:
    return [(*next(loader), loader.get_state()) for _ in range(count)]


def assert_together(alone: list, hosts: list[list], frames: int = FRAMES) -> None:
    """Every host has the batches of one alone, but for the pixels, of which each has its part and no more."""
    each = frames // len(hosts)
    for number, (batch, stats, state) in enumerate(alone):
        for host, found in enumerate(hosts):
            other, other_stats, other_state = found[number]
            assert (other_stats, other_state) == (stats, state)
            for name in FIELDS:
                if name != "frames":
                    np.testing.assert_array_equal(getattr(other, name), getattr(batch, name), err_msg=name)
            mine = slice(host * each, host * each + each)
            np.testing.assert_array_equal(other.frames[:, mine], batch.frames[:, mine])
            assert not np.delete(other.frames, np.r_[mine], axis=1).any(), "it decoded what another has"


@pytest.fixture
def damaged(tmp_path: Path) -> dict[int, str]:
    """s3 and s7 have damage in the middle, for which s7 is lost; s5 is cut short."""
    files = {}
    for number, (first, last) in ((3, (0.52, 0.54)), (7, (0.4, 0.75))):
        path = write_video(tmp_path / f"{number}.mp4", 160, 8, gop=8, options={"movflags": "faststart"})
        data = bytearray(path.read_bytes())
        a, b = int(first * len(data)), int(last * len(data))
        data[a:b] = bytes(b - a)
        path.write_bytes(data)
        files[number] = str(path)
    cut = write_video(tmp_path / "cut.mp4", 80, 4, options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * 0.6)])
    return files | {5: str(cut)}


@pytest.mark.parametrize("hosts, workers, bins", [(2, 0, 3), (4, 0, 0), (2, 1, 3)])
def test_hosts_have_the_batches_of_one_alone(
    data_config: DataConfig,
    tokenizer: Tokenizer,
    media: Path,
    tmp_path: Path,
    damaged: dict[int, str],
    hosts: int,
    workers: int,
    bins: int,
) -> None:
    path = annotate(tmp_path, media, 14, damaged)
    config = replace(data_config, train=(str(path),), packing_bins=bins, num_workers=workers)
    (one,) = loaders(replace(config, num_workers=0), tokenizer, 1, tmp_path)
    alone = taken(one, 8)
    group = loaders(config, tokenizer, hosts, tmp_path)
    with ThreadPoolExecutor(hosts) as pool:
        found = list(pool.map(lambda loader: taken(loader, 8), group))
        assert_together(alone, found)
        for loader in group:  # back again, while they read ahead
            loader.set_state(alone[2][2])
        assert_together(alone[3:6], list(pool.map(lambda loader: taken(loader, 3), group)))
    for loader in (one, *group):
        loader.close()
    ledgers = [
        [{key: value for key, value in json.loads(line).items() if key != "time"} for line in file.open()]
        for file in sorted(tmp_path.glob("*.jsonl"))
        if file.name[0].isdigit()
    ]
    assert len(ledgers) == 1 + hosts and ledgers[0] and all(ledger == ledgers[0] for ledger in ledgers)
    assert {"s5", "s7"} <= {entry["id"] for entry in ledgers[0]} and "s3" not in {entry["id"] for entry in ledgers[0]}


def test_held_out_batches_are_those_of_one_alone(
    data_config: DataConfig, tokenizer: Tokenizer, media: Path, tmp_path: Path, damaged: dict[int, str]
) -> None:
    path, rows = annotate(tmp_path, media, 10, damaged), range(data_config.packs_per_batch)

    def batches(sharing: Sharing | None) -> list:
        sizes = {"frames_per_group": 2, "tokens_per_group": 3, "ledger": Ledger(), "rows": rows}
        held_out = HeldOutBatches([str(path)], data_config, tokenizer, **sizes, sharing=sharing)
        return [(batch, None, None) for batch in held_out]

    with ThreadPoolExecutor(2) as pool:
        assert_together(batches(None), list(pool.map(batches, sharings(2, rows))))


class Told(Decoder):
    """Has an outcome for each part of the one medium, and counts what is asked of it."""

    def __init__(self, part: Outcome, whole: Outcome) -> None:
        self._outcomes, self.asked = {True: part, False: whole}, []

    def submit(self, ref: MediaRef, image_size: int) -> "Future[Outcome]":
        self.asked.append(ref.moments)
        future: Future[Outcome] = Future()
        outcome = self._outcomes[ref.moments is not None]
        if isinstance(outcome, Clip) and ref.moments is not None:
            outcome = replace(outcome, moments=ref.moments)
        future.set_result(outcome)
        return future


def clip_of(times: list[float], pixels: int, **how) -> Clip:  # noqa: ANN003
    return Clip(np.full((pixels, 2, 2, 3), 7, np.uint8), np.array(times), **how)


NAN, GONE, BAD = float("nan"), UserError("a.mp4: no such file"), UserError("a.mp4: cut short")
WHOLE = clip_of([0.0, 1.0, 2.0, 3.0], 4)
FIRST, LAST = clip_of([0.0, 1.0, NAN, NAN], 2), clip_of([NAN, NAN, 2.0, 3.0], 2)


@pytest.mark.parametrize(
    ("first", "last", "again", "agreed"),
    [
        ((FIRST, BAD), (LAST, BAD), [0, 0], [0.0, 1.0, 2.0, 3.0]),
        ((GONE, WHOLE), (LAST, WHOLE), [0, 0], "no such file"),  # on one host alone
        ((FIRST, WHOLE), (replace(WHOLE, pixels=LAST.pixels, certain=False), WHOLE), [1, 0], [0.0, 1.0, 2.0, 3.0]),
        ((FIRST, GONE), (replace(WHOLE, pixels=LAST.pixels, certain=False), WHOLE), [1, 0], "no such file"),
        ((FIRST, BAD), (replace(LAST, missed=1), BAD), [1, 1], "cut short"),  # a quarter of the moments
        ((FIRST, WHOLE), (replace(LAST, missed=1), WHOLE), [1, 1], [0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_what_one_host_could_not_decode_all_know(
    first: tuple[Outcome, Outcome], last: tuple[Outcome, Outcome], again: list[int], agreed: list[float] | str
) -> None:
    ref, decoders = MediaRef("video", "a.mp4", (0.5, 1.5, 2.5, 3.5)), [Told(*first), Told(*last)]

    def settled(host: int) -> Outcome:
        asked = shares[host].ask(7, 2, [ref], decoders[host], 2)
        return shares[host].settle({7: ("", asked)}, decoders[host], 2)[7][0]

    shares = sharings(2, [7], 8)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(settled, range(2)))
    assert [decoder.asked[:1] for decoder in decoders] == [[(0, 1)], [(2, 3)]]
    assert [len(decoder.asked) - 1 for decoder in decoders] == again
    for outcome in outcomes:
        if isinstance(agreed, str):
            assert isinstance(outcome, UserError) and agreed in str(outcome)
        else:
            assert isinstance(outcome, Clip) and outcome.times.tolist() == agreed and len(outcome.pixels) == 2


def test_hosts_with_different_samples_stop() -> None:
    shares = sharings(2, [0], 8)

    def settled(host: int) -> str:
        with pytest.raises(UserError, match="hosts 0, 1 have different samples in row 0") as raised:
            shares[host].settle({0: (f"sample {host}", [])}, ThreadDecoder(0), 2)
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(settled, range(2)))) == 1


# ------------------------------------------------------------------------------------ parts of a video


@pytest.mark.parametrize(
    ("name", "codec", "divided"),
    [("a.mp4", "libx264", True), ("a.ts", "libx264", None), ("a.mov", "libx264", True), ("a.avi", "libx264", False)],
)
def test_moments_have_the_frames_that_the_whole_gives_them(
    tmp_path: Path, name: str, codec: str, divided: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / name, 320, 16, gop=8, codec=codec)
    times = (np.arange(40) + 0.5) * probe(path).seconds / 40
    whole, random, seen = load_video(path, image_size=48, times=times), np.random.default_rng(0), []
    frames = picker.FramePicker._whole_frames
    monkeypatch.setattr(
        picker.FramePicker, "_whole_frames", lambda self: (seen.append(one) or one for one in frames(self))
    )
    for moments in [range(10), range(30, 40), *(sorted(random.choice(40, 7, replace=False)) for _ in range(4))]:
        seen.clear()
        part = load_moments(path, tuple(map(int, moments)), image_size=48, times=times)
        np.testing.assert_array_equal(part.pixels, whole.pixels[list(moments)])
        np.testing.assert_array_equal(part.times[list(moments)], whole.times[list(moments)])
        if divided is not None:
            assert part.certain == divided and np.isnan(part.times).any() == divided
    assert not divided or len(seen) < 320


def test_moments_of_pictures_are_decoded_alone(media: Path, tmp_path: Path) -> None:
    listed = MediaRef("video", "", (0.0, 1.0, 2.0), frames=(str(media / "photo.jpg"), "missing.jpg", "missing.jpg"))
    assert len(decode_one(replace(listed, moments=(0,)), 48).pixels) == 1
    assert isinstance(decode_one(replace(listed, moments=(1,)), 48), UserError)
    image = decode_one(MediaRef("image", str(media / "photo.jpg"), (0.0, 0.0), moments=(1,)), 48)
    assert len(image.pixels) == 1 and image.times.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "first", "length", "count", "moments"),
    [  # found among 3,600 parts of damaged files
        ("b.mkv", 6504, 400, 20, (3, 9, 14)),  # reached from the moment before, and not by a seek of its own
        ("e.ts", 75112, 2000, 20, (15, 16, 17, 18, 19)),
        ("g.mkv", 4926, 60, 40, (20, 21)),  # Matroska's reader passes over the damage without an error
    ],
)
def test_moments_of_a_damaged_video_have_the_frames_that_the_whole_gives_them(
    tmp_path: Path,
    name: str,
    first: int,
    length: int,
    count: int,
    moments: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picker, "_SEEK_SECONDS", 0.0)
    monkeypatch.setattr(picker, "_SEEK_FRAMES", 1)
    open_gop = {"x264-params": "open-gop=1:bframes=3:b-adapt=0"} if name == "g.mkv" else {}
    path = write_video(tmp_path / name, 160, 8, gop=8, codec_options=open_gop)
    times, data = (np.arange(count) + 0.5) * probe(path).seconds / count, bytearray(path.read_bytes())
    data[first : first + length] = bytes(length)
    path.write_bytes(data)
    whole = load_video(path, image_size=16, times=times)
    part = load_moments(path, moments, image_size=16, times=times)
    np.testing.assert_array_equal(part.pixels, whole.pixels[list(moments)])
    np.testing.assert_array_equal(part.times[list(moments)], whole.times[list(moments)])
