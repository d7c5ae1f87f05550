"""Intervals that cover what they should where questions share videos, and differences that are found as promised."""

import math

import numpy as np
import pytest

from kangaroo_jax.evaluation.statistics import compare, estimate

VIDEOS, EACH = 60, 5


def answers(rng: np.random.Generator, level: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers, of which those about one video go together, and the number of each one's video."""
    easy = np.clip(rng.normal(level, 0.25, VIDEOS), 0, 1).repeat(EACH)
    return (rng.random(VIDEOS * EACH) < easy).astype(float), np.arange(VIDEOS).repeat(EACH)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = float(np.clip(rng.normal(0.6, 0.25, 200_000), 0, 1).mean())
    made = [estimate(*map(list, answers(rng))) for _ in range(400)]
    covered = np.mean([one.low <= truth <= one.high for one in made])
    assert 0.92 <= covered <= 0.98
    apart = [estimate(list(values), range(len(values))) for values, _ in (answers(rng) for _ in range(200))]
    assert np.mean([one.error for one in apart]) < 0.8 * np.mean([one.error for one in made])  # as if videos were apart
    assert np.std([one.mean for one in made]) == pytest.approx(np.mean([one.error for one in made]), rel=0.1)


def test_the_smallest_difference_is_found_four_times_of_five():
    rng = np.random.default_rng(1)
    smallest = float(np.mean([estimate(*map(list, answers(rng))).smallest for _ in range(50)]))
    found = 0
    for _ in range(400):
        first, second = (estimate(*map(list, answers(rng, level))) for level in (0.5, 0.5 + smallest))
        found += (second.mean - first.mean) / math.hypot(first.error, second.error) > 1.96
    assert 0.7 <= found / 400 <= 0.9


def test_all_right_and_one_video_are_not_certain():
    right = estimate([1.0] * 40, range(40))
    assert right.mean == 1.0 and 0.85 < right.low < 0.95 and right.high == 1.0 and right.smallest > 0.05
    one = estimate([1.0, 0.0, 1.0, 1.0], ["a"] * 4)
    assert one.clusters == 1 and one.high - one.low > 0.5
    assert (estimate([], []).low, estimate([], []).high) == (0.0, 1.0)


def test_strata_weigh_the_same_and_scales_are_kept():
    values, videos = [1.0] * 9 + [0.0], list(range(10))
    assert estimate(values, videos).mean == 0.9
    assert estimate(values, videos, ["a"] * 9 + ["b"]).mean == 0.5
    judged = estimate([3.0, 0.0, 1.5, 1.5], range(4), most=3.0)
    assert judged.mean == 1.5 and 0 <= judged.low < 1.5 < judged.high <= 3.0


def test_pairs_show_what_single_scores_do_not():
    rng = np.random.default_rng(2)
    first, videos = answers(rng)
    second = np.where(rng.random(len(first)) < 0.06, 1.0, first)  # a few more are right
    made = compare(list(first), list(second), list(videos))
    assert made.low > 0 and made.probability < 0.01 and made.worse == 0 and made.better == int((second - first).sum())
    assert made.smallest < estimate(list(first), list(videos)).smallest / 2
    same = compare(list(first), list(first), list(videos))
    assert (same.mean, same.probability, same.better) == (0.0, 1.0, 0)
    false_alarms = 0
    for _ in range(300):
        (a, videos), (b, _) = answers(rng), answers(rng)
        false_alarms += compare(list(a), list(b), list(videos)).probability < 0.05
    assert 0.02 <= false_alarms / 300 <= 0.09
