"""Packing loses nothing, mixes nothing, and keeps to its budgets; what leaves is checked against its promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.data.batches.packing import Packer, PackItem, Shape, assemble, empty_batch, write_sample
from kangaroo_jax.data.batches.sample import Recipe
from kangaroo_jax.data.media.video import Clip, MediaRef
from kangaroo_jax.errors import UserError

T, F, S, V = 40, 12, 2, 3


def make(index: int, text: int, media: list[int], k: int) -> PackItem:
    """A sample of `text` text tokens and media of so many groups; every number in it is its own."""
    groups = sum(media)
    is_vision = np.zeros(text + groups * V, bool)
    is_vision[1 : 1 + groups * V] = True
    tokens = np.arange(len(is_vision), dtype=np.int32) + 1000 * (index + 1)
    weights = (~is_vision & (np.arange(len(tokens)) % 2 == 1)).astype(np.float32)
    refs, time = [], 0
    for number, size in enumerate(media):
        times = tuple(float(index * 100 + time + i) for i in range(size * k))
        refs.append(MediaRef("video", f"{index}/{number}", times))
        time += size * k
    return PackItem((0, index), Recipe(f"s{index}", tokens, weights, is_vision, tuple(refs), k, V))


def decode(recipe: Recipe) -> list[Clip]:
    """Pixels that show the time of each frame."""
    clips = []
    for ref in recipe.media:
        times = np.array(ref.times)
        clips.append(Clip(np.broadcast_to((times % 251)[:, None, None, None], (len(times), S, S, 3)), times))
    return clips


def pack(items: list[PackItem], bins: int) -> tuple[list[list[PackItem]], list[list[int]]]:
    """All rows: those closed on the way and those still open."""
    packer = Packer(T, F, bins)
    rows = [row for item in items if (row := packer.add(item)) is not None]
    return rows, packer.state()


def indices_of(row: list[PackItem] | None) -> list[int]:
    return [item.index[1] for item in row or []]


samples = st.lists(st.tuples(st.integers(2, 12), st.lists(st.integers(1, 2), max_size=2)), min_size=1, max_size=40)


@settings(deadline=None)
@given(sizes=samples, bins=st.integers(0, 5), k=st.sampled_from([1, 2]))
def test_rows_lose_nothing_and_keep_to_their_budgets(sizes: list, bins: int, k: int) -> None:
    items = [make(i, text, media, k) for i, (text, media) in enumerate(sizes)]
    rows, still_open = pack(items, bins)
    indices = [p for row in rows for p in indices_of(row)] + [p for _, _, p in still_open]
    assert sorted(indices) == list(range(len(items)))
    waiting = [items[p].recipe for _, _, p in still_open]
    assert sum(len(recipe.tokens) for recipe in waiting) < max(bins * T, 1)
    assert sum(recipe.frames for recipe in waiting) < max(bins * F, 1)
    for row in rows:
        assert len(row) > 0
        assert sum(len(item.recipe.tokens) for item in row) <= T
        assert sum(item.recipe.frames for item in row) <= F
        assert indices_of(row) == sorted(indices_of(row))
    again, open_again = pack(items, bins)
    assert [indices_of(row) for row in again] == [indices_of(row) for row in rows] and open_again == still_open


@settings(deadline=None)
@given(sizes=samples, bins=st.integers(1, 4), cut=st.integers(0, 40))
def test_a_restored_packer_goes_on_the_same(sizes: list, bins: int, cut: int) -> None:
    items = [make(i, text, media, 2) for i, (text, media) in enumerate(sizes)]
    first, second = Packer(T, F, bins), Packer(T, F, bins)
    for item in items[:cut]:
        first.add(item)
    second.restore([(waited, items[index]) for waited, _, index in first.state()])
    for item in items[cut:]:
        assert indices_of(first.add(item)) == indices_of(second.add(item))
    assert first.state() == second.state()


@settings(deadline=None, max_examples=60)
@given(sizes=samples, k=st.sampled_from([1, 2]), lost=st.sets(st.integers(0, 39)))
def test_arrays_hold_each_sample_whole_and_apart(sizes: list, k: int, lost: set[int]) -> None:
    items = [make(i, text, media, k) for i, (text, media) in enumerate(sizes)]
    rows = [[item.recipe for item in row] for row in pack(items, 3)[0]]
    lost_ids = {f"s{i}" for i in lost}
    clips = [[None if recipe.id in lost_ids else decode(recipe) for recipe in row] for row in rows]
    batch = assemble(rows, clips, Shape(T, F, S, k, V))
    for b, row in enumerate(rows):
        used = np.zeros(T, bool)
        for segment, recipe in enumerate(row, start=1):
            here = batch.segment_ids[b] == segment
            assert here.sum() == (0 if recipe.id in lost_ids else len(recipe.tokens))
            used |= here
            if recipe.id not in lost_ids:
                check_segment(batch, b, np.flatnonzero(here), recipe, k)
        padding = ~used
        for name, empty in (("segment_ids", 0), ("weights", 0), ("tokens", 0), ("positions", 0), ("vision_index", -1)):
            assert (getattr(batch, name)[b][padding] == empty).all()
        kept = sum(recipe.frames for recipe in row if recipe.id not in lost_ids)
        assert (batch.frame_groups[b] > 0).sum() == kept == (batch.vision_index[b] >= 0).sum() // V * k


def check_segment(batch: PackedBatch, b: int, at: np.ndarray, recipe: Recipe, k: int) -> None:
    """Tokens in one piece, targets inside the segment, and each vision token at its own frames."""
    n = len(at)
    np.testing.assert_array_equal(at, np.arange(at[0], at[0] + n))
    np.testing.assert_array_equal(batch.tokens[b, at], recipe.tokens)
    np.testing.assert_array_equal(batch.positions[b, at], np.arange(n))
    np.testing.assert_array_equal(batch.targets[b, at], [*recipe.tokens[1:], 0])
    np.testing.assert_array_equal(batch.weights[b, at], [*recipe.weights[1:], 0])
    rows = batch.vision_index[b, at]
    np.testing.assert_array_equal(rows >= 0, recipe.is_vision)
    rows = rows[rows >= 0]
    np.testing.assert_array_equal(np.diff(rows), 1)
    groups = rows[::V] // V
    frames = (groups[:, None] * k + np.arange(k)).reshape(-1)
    times = np.array([time for ref in recipe.media for time in ref.times])
    np.testing.assert_array_equal(batch.frame_times[b, frames], times)
    np.testing.assert_array_equal(batch.frames[b, frames, 0, 0, 0], times % 251)
    np.testing.assert_array_equal(batch.frame_groups[b, frames], np.repeat(groups, k) + 1)


def test_the_worked_example_of_the_module() -> None:
    b, V_, q, a, e = 1, 10, 20, 21, 5  # noqa: N806
    first = Recipe(
        "1",
        np.array([b, V_, V_, q, a, e], np.int32),
        np.array([0, 0, 0, 0, 1, 1], np.float32),
        np.array([0, 1, 1, 0, 0, 0], bool),
        (MediaRef("image", "p", (0.0,)),),
        1,
        2,
    )
    second = Recipe(
        "2", np.array([b, q, a, e], np.int32), np.array([0, 0, 1, 1], np.float32), np.zeros(4, bool), (), 1, 2
    )
    batch = assemble([[first, second]], [[decode(first), []]], Shape(12, 1, S, 1, 2))
    assert batch.tokens[0].tolist() == [b, V_, V_, q, a, e, b, q, a, e, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0]
    assert batch.targets[0].tolist() == [V_, V_, q, a, e, 0, q, a, e, 0, 0, 0]
    assert batch.weights[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    assert batch.vision_index[0].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1]


def test_no_row_waits_for_ever() -> None:
    """One small sample in a row that nothing else fits: it leaves all the same."""
    packer = Packer(10, 0, 2)
    packer.add(make(0, 6, [], 1))
    for index in range(1, 100):
        row = packer.add(make(index, 9, [], 1))
        if row and row[0].index[1] == 0:
            return
    pytest.fail("the first sample never left")


def test_too_large_for_a_row() -> None:
    packer = Packer(T, F, 2)
    with pytest.raises(UserError, match="'s1': 41 tokens and 0 frames, but a row holds 40 and 12"):
        packer.add(make(1, 41, [], 1))
    with pytest.raises(UserError, match="16 frames"):
        packer.add(make(1, 2, [8], 2))


def test_promises_are_checked() -> None:
    recipe = make(3, 4, [2], 2).recipe
    short = [Clip(clip.pixels[:3], clip.times[:3]) for clip in decode(recipe)]
    with pytest.raises(UserError, match="'s3': 3 frames decoded, 4 promised"):
        assemble([[recipe]], [[short]], Shape(T, F, S, 2, V))
    with pytest.raises(UserError, match="'s3'"):
        assemble([[recipe]], [[decode(recipe)]], Shape(T, F, S, 2, V + 1))
    shape = Shape(T, F, S, 2, V)
    with pytest.raises(UserError, match="'s3': its frames begin at 1, inside a group"):
        write_sample(empty_batch(1, shape), 0, 1, 0, 1, recipe, decode(recipe), shape)
