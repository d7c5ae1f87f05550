"""The pipeline as a whole: exact resume, the same batches however they are made, bad samples in the ledger."""

import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kangaroo_jax.config import DataConfig
from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.data.annotations.sources import read_conversations
from kangaroo_jax.data.batches import loader as loader_module
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import Loader, LoaderStats, batch_from_recipes, make_loader
from kangaroo_jax.data.batches.sample import make_recipe
from kangaroo_jax.data.media.decode import Decoder, make_decoder
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from tests.data.media import read_number, write_video

K, V = 2, 3


def annotate(folder: Path, media: Path, count: int = 30, bad: dict[int, str] | None = None) -> Path:
    """A JSONL of short and long videos, photos and text; `bad` puts other files in some places."""
    rng = random.Random(0)
    lines = []
    for i in range(count):
        name = rng.choice(["2s.mp4", "5s.mp4", "20s.mp4", "photo.jpg", ""])
        name = (bad or {}).get(i, name)
        kind = "image" if name.endswith("jpg") else "video"
        tag = f"<{kind}>\n" if name else ""
        item = {
            "id": f"s{i}",
            "conversations": [{"from": "human", "value": tag + "What?" + " moves" * rng.randint(0, 9)}],
        }
        item["conversations"].append({"from": "gpt", "value": f"number {i}"})
        if name:
            item[kind] = str(media / name)
        lines.append(json.dumps(item))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(data_config: DataConfig, tmp_path: Path, media: Path) -> DataConfig:
    data_config = replace(data_config, train=(str(annotate(tmp_path, media)),))
    return data_config


def open_loader(config: DataConfig, tokenizer: Tokenizer, ledger: Ledger | None = None, **kwargs: Any) -> Loader:
    settings = {"frames_per_group": K, "tokens_per_group": V, "seed": 5, "num_threads": 0} | kwargs
    return make_loader(config, tokenizer, ledger=ledger or Ledger(), **settings)


def take(loader: Loader, count: int) -> list[tuple[PackedBatch, LoaderStats, bytes]]:
    return [(*next(loader), loader.get_state()) for _ in range(count)]


def assert_same(a: tuple[PackedBatch, LoaderStats, bytes], b: tuple[PackedBatch, LoaderStats, bytes]) -> None:
    for name in FIELDS:
        x, y = getattr(a[0], name), getattr(b[0], name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=name)
    assert a[1:] == b[1:]


def test_shapes_types_and_contents(config: DataConfig, tokenizer: Tokenizer) -> None:
    loader = open_loader(config, tokenizer)
    for batch, stats, _ in take(loader, 5):
        assert batch.tokens.shape == (2, 256) and batch.frames.shape == (2, 24, 48, 48, 3)
        assert (batch.weights.dtype, batch.frames.dtype, batch.frame_times.dtype) == (np.float32, np.uint8, np.float32)
        assert all(
            getattr(batch, name).dtype == np.int32 for name in FIELDS if "frame" not in name and name != "weights"
        )
        assert stats.tokens == (batch.segment_ids > 0).sum() and stats.frames == (batch.frame_groups > 0).sum()
        assert stats.samples == len(stats.sample_ids) == sum(row.max() for row in batch.segment_ids)
        for frame, time in zip(batch.frames.reshape(-1, 48, 48, 3), batch.frame_times.reshape(-1), strict=True):
            if frame.any():  # the number burnt into a frame says when it was on display
                assert read_number(frame) == (9 if time == 0 and read_number(frame) == 9 else round(time * 4))
    loader.close()


@pytest.mark.parametrize("bins", [0, 1, 3])
def test_an_epoch_sees_every_sample_once(config: DataConfig, tokenizer: Tokenizer, bins: int) -> None:
    config = replace(config, packing_bins=bins)
    loader = open_loader(config, tokenizer)
    seen: list[str] = []
    while len(seen) < 90:
        seen += next(loader)[1].sample_ids
    counts = Counter(seen)
    lanes = json.loads(loader.get_state())["lanes"].values()
    waiting = [(n, 2 * lane["next"]) for lane in lanes for _, _, n in lane["waiting"]]
    drawn = sum(lane["next"] for lane in lanes)
    assert drawn == len(seen) + len(waiting)
    counts += Counter(f"s{n}" for n, _ in waiting)
    assert set(counts) == {f"s{i}" for i in range(30)}
    assert max(counts.values()) - min(counts.values()) <= 3  # lanes may be at places an epoch apart
    if bins == 0:
        assert [Counter(seen[i * 30 : i * 30 + 30]).most_common(1)[0][1] for i in range(3)] == [1, 1, 1]
        assert seen[:30] != seen[30:60]  # shuffled anew
    loader.close()


def test_the_seed_decides_the_order(config: DataConfig, tokenizer: Tokenizer) -> None:
    orders = []
    for seed in (1, 1, 2):
        loader = open_loader(config, tokenizer, seed=seed)
        orders.append([stats.sample_ids for _, stats, _ in take(loader, 4)])
        loader.close()
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("bins", [0, 3])
def test_resume_is_exact_at_every_batch(config: DataConfig, tokenizer: Tokenizer, bins: int) -> None:
    config = replace(config, packing_bins=bins)
    loader = open_loader(config, tokenizer)
    start = loader.get_state()
    whole = take(loader, 12)
    for stop in (0, 1, 5, 9):
        fresh = open_loader(config, tokenizer, num_threads=stop % 3)
        fresh.set_state(whole[stop - 1][2] if stop else start)
        for expected, found in zip(whole[stop:], take(fresh, 12 - stop), strict=True):
            assert_same(expected, found)
        fresh.close()
    loader.set_state(whole[3][2])  # and back, in the same loader
    assert_same(whole[4], take(loader, 1)[0])
    loader.close()
    assert len(whole[-1][2]) < 3000  # the state stays small


@pytest.mark.parametrize("threads, workers, cache", [(1, 0, 0), (16, 0, 0), (2, 0, 8), (0, 2, 0)])
def test_the_same_batches_however_they_are_made(
    config: DataConfig, tokenizer: Tokenizer, threads: int, workers: int, cache: int
) -> None:
    reference = open_loader(config, tokenizer)
    expected = take(reference, 8)
    reference.close()
    config = replace(config, num_workers=workers, cache_mib=cache)
    loader = open_loader(config, tokenizer, num_threads=threads)
    for a, b in zip(expected, take(loader, 8), strict=True):
        assert_same(a, b)
    loader.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
def test_as_many_threads_decode_as_the_process_has_cpus(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as many as the machine has, nor at most 8."""
    asked: list[int] = []

    def make(*, num_threads: int, **options: Any) -> Decoder:
        asked.append(num_threads)
        return make_decoder(num_threads=num_threads, **options)

    monkeypatch.setattr(loader_module, "make_decoder", make)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        open_loader(config, tokenizer, num_threads=None).close()
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(20)))
    open_loader(config, tokenizer, num_threads=None).close()
    assert asked == [1, 20]


def test_hosts_share_the_samples(config: DataConfig, tokenizer: Tokenizer) -> None:
    config = replace(config, packing_bins=0)
    seen = []
    for host in range(2):
        loader = open_loader(config, tokenizer, rows=[host])
        taken = take(loader, 15)
        assert taken[0][0].tokens.shape[0] == 1
        seen.append({name for _, stats, _ in taken for name in stats.sample_ids})
        loader.close()
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 30


def test_a_state_of_other_data_is_refused(config: DataConfig, tokenizer: Tokenizer) -> None:
    loader = open_loader(config, tokenizer)
    state = loader.get_state()
    loader.close()
    for change in ({"seed": 6}, {"tokens_per_group": 4}):
        other = open_loader(config, tokenizer, **change)
        with pytest.raises(UserError, match="saved data position"):
            other.set_state(state)
        other.close()


# ----------------------------------------------------------------------------- bad samples


@pytest.fixture
def bad_config(data_config: DataConfig, tmp_path: Path, media: Path) -> DataConfig:
    """s3 is missing, s4 is text, s5 is cut short (found only by decoding)."""
    (tmp_path / "text.mp4").write_text("no video")
    whole = write_video(tmp_path / "cut.mp4", 20, 4, options={"movflags": "faststart"})
    whole.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    bad = {3: str(tmp_path / "missing.mp4"), 4: str(tmp_path / "text.mp4"), 5: str(whole)}
    data_config = replace(data_config, train=(str(annotate(tmp_path, media, count=12, bad=bad)),))
    return data_config


def test_bad_samples_are_skipped_and_entered_once(bad_config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    loader = open_loader(bad_config, tokenizer, ledger)
    taken = take(loader, 20)
    seen = {name for _, stats, _ in taken for name in stats.sample_ids}
    assert seen == {f"s{i}" for i in range(12)} - {"s3", "s4", "s5"}
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert {(line["id"], line["stage"]) for line in lines} == {("s3", "recipe"), ("s4", "recipe"), ("s5", "decode")}
    assert len(lines) == 3 == ledger.count
    for line in lines:
        assert line["path"] in line["reason"] and line["path"].endswith(".mp4") and "\n" not in line["reason"]
    assert taken[-1][1].skipped > 3  # counted each time
    for batch, stats, _ in taken:  # a blanked sample leaves nothing behind
        used = batch.segment_ids > 0
        assert used.sum() == stats.tokens and (batch.frame_groups > 0).sum() == stats.frames
        assert not batch.weights[~used].any() and (batch.vision_index[~used] == -1).all()
        assert not batch.frames[batch.frame_groups == 0].any()
    middle = 9
    again = open_loader(bad_config, tokenizer, Ledger(tmp_path / "ledger.jsonl"))
    again.set_state(taken[middle][2])
    for expected, found in zip(taken[middle + 1 :], take(again, 19 - middle), strict=True):
        assert_same(expected, found)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3
    loader.close()
    again.close()


def test_strict_raises_at_the_first_bad_sample(bad_config: DataConfig, tokenizer: Tokenizer) -> None:
    bad_config = replace(bad_config, strict=True)
    loader = open_loader(bad_config, tokenizer)
    with pytest.raises(UserError, match="sample 's[345]': .*strict"):
        take(loader, 20)
    loader.close()


@pytest.mark.parametrize("keep_header", [False, True])
def test_nothing_but_bad_samples_is_an_error(
    data_config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, media: Path, keep_header: bool
) -> None:
    path = write_video(tmp_path / "a.mp4", 20, 4, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3] if keep_header else b"x")
    data_config = replace(
        data_config, train=(str(annotate(tmp_path, media, count=4, bad=dict.fromkeys(range(4), str(path)))),)
    )
    loader = open_loader(data_config, tokenizer)
    with pytest.raises(UserError, match="none of the 4 samples can be used"):
        take(loader, 20)
    loader.close()


def test_one_good_sample_among_many_bad_ones_is_enough(
    data_config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, media: Path
) -> None:
    bad = {i: "missing.mp4" for i in range(9)} | {9: "2s.mp4"}
    data_config = replace(data_config, train=(str(annotate(tmp_path, media, count=10, bad=bad)),))
    loader = open_loader(data_config, tokenizer)
    assert {name for _, stats, _ in take(loader, 3) for name in stats.sample_ids} == {"s9"}
    loader.close()


def test_mistakes_in_the_configuration(config: DataConfig, tokenizer: Tokenizer) -> None:
    config = replace(config, frames_per_pack=7)
    with pytest.raises(UserError, match="frames_per_pack 7 must be a multiple of 2"):
        open_loader(config, tokenizer)
    config = replace(config, frames_per_pack=24, train=())
    with pytest.raises(UserError, match="config.data.train is empty"):
        open_loader(config, tokenizer)


# ------------------------------------------------------------------------- text, evaluation


def test_text_alone_needs_no_frames(data_config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, media: Path) -> None:
    data_config = replace(data_config, train=(str(annotate(tmp_path, media, bad=dict.fromkeys(range(30), ""))),))
    data_config = replace(data_config, frames_per_pack=0)
    loader = open_loader(data_config, tokenizer)
    batch, stats, _ = take(loader, 1)[0]
    assert batch.frames.shape == (2, 0, 48, 48, 3) and stats.frames == 0 and (batch.vision_index == -1).all()
    assert stats.tokens / batch.tokens.size > 0.7
    loader.close()


def test_one_recipe_a_row(config: DataConfig, tokenizer: Tokenizer) -> None:
    recipes = [make_recipe(c, tokenizer, config, K, V) for c in read_conversations(config.train)][:6]
    batch = batch_from_recipes(recipes, tokens=200, frames=16, image_size=32)
    assert batch.frames.shape == (6, 16, 32, 32, 3)
    for b, recipe in enumerate(recipes):
        n = len(recipe.tokens)
        np.testing.assert_array_equal(batch.tokens[b, :n], recipe.tokens)
        assert (batch.segment_ids[b, :n] == 1).all() and not batch.segment_ids[b, n:].any()
        assert (batch.frame_groups[b] > 0).sum() == recipe.frames
    with pytest.raises(UserError, match="there is room for 10 and 16"):
        batch_from_recipes(recipes, tokens=10, frames=16, image_size=32)
    with pytest.raises(ValueError, match="at least one"):
        batch_from_recipes([], tokens=10, frames=16, image_size=32)


def test_one_recipe_a_row_raises_for_a_bad_file(bad_config: DataConfig, tokenizer: Tokenizer) -> None:
    cut = [c for c in read_conversations(bad_config.train) if c.id == "s5"][0]
    recipe = make_recipe(cut, tokenizer, bad_config, K, V)
    with pytest.raises(UserError, match="cut.mp4: .*cut short"):
        batch_from_recipes([recipe], tokens=200, frames=16, image_size=32)
