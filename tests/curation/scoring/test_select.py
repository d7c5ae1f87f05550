"""The choice: rules in order, caps that do not depend on chance, duplicates found by few comparisons."""

import numpy as np
import pytest

from kangaroo_jax.curation.duplicates import groups
from kangaroo_jax.curation.select import funnel, judge, threshold_verdict
from kangaroo_jax.curation.stages.fingerprint import difference_hash, fingerprint
from kangaroo_jax.errors import UserError


def a_row(name: str, **changes):
    rng = np.random.default_rng(abs(hash(name)) % 2**32 if changes.get("seed") is None else changes.pop("seed"))
    plain = [f"{int(h):016x}" for h in rng.integers(1, 2**64 - 1, 5, dtype=np.uint64)]
    row = {"id": name, "item": name, "kind": "video", "path": f"{name}.mp4", "start": 0.0, "end": 10.0, "failures": {}}
    row |= {"caption": "", "category": "", "language": "", "source": "s", "licence": "", "source_id": ""}
    row |= {"probe": {"decodable": 1.0, "width": 640, "height": 360, "seconds": 10.0, "sha256": name}}
    row |= {"motion": {"score": 0.4}, "text": {"coverage": 0.0}, "face": {"coverage": 0.0}, "keyframe_times": []}
    row |= {"fingerprint": {"plain": plain, "mirrored": [f"{int(p, 16) ^ (2**64 - 1):016x}" for p in plain]}}
    return row | changes


@pytest.fixture
def settings(config):
    return config.select


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"failures": {"probe": "no frames"}}, "broken"),
        ({"cuts": {"decodable": 0.5}}, "broken"),
        ({"end": 1.0}, "seconds"),
        ({"end": 2000.0}, "seconds"),
        ({"text": {"coverage": 0.5}, "face": {"coverage": 0.5}}, "text"),
        ({"face": {"coverage": 0.3}}, "face"),
        ({"motion": {"score": 0.001}}, "motion"),
        ({"kind": "image", "motion": {}, "end": 0.0}, None),
        ({"caption_language": {"code": "fr"}}, "language"),
        ({"language": "zh", "caption_language": {"code": "fr"}}, None),
    ],
)
def test_the_first_rule_that_fails_is_named(settings, changes, rule):
    settings.languages = ("en", "zh")
    verdict = threshold_verdict(a_row("a", **changes), settings)
    assert (verdict and verdict[0]) == rule


def test_of_duplicates_the_best_is_kept(settings):
    small = {"probe": {"decodable": 1.0, "width": 320, "height": 180, "seconds": 10.0, "sha256": "x"}}
    rows = [a_row("a", seed=1, **small), a_row("b", seed=1), a_row("c", seed=2)]
    verdicts = judge(rows, settings)
    assert verdicts == [("duplicate", "of b, which has more pixels"), None, None]
    rows[1]["text"]["coverage"] = 0.9  # what is dropped takes nothing with it
    assert [verdict and verdict[0] for verdict in judge(rows, settings)] == [None, "text", None]


def test_of_equal_pictures_the_one_that_says_more_is_kept(settings):
    plain, named, told = a_row("a", seed=1), a_row("b", seed=1, category="birds"), a_row("c", seed=1, caption="a bird")
    assert judge([plain, named], settings) == [("duplicate", "of b, which names its category"), None]
    assert judge([plain, told], settings) == [("duplicate", "of c, which has a caption"), None]
    longer = a_row("d", seed=1, end=12.0)
    assert judge([plain, longer], settings) == [("duplicate", "of d, which is longer"), None]
    same = a_row("e", seed=1)
    assert judge([plain, same], settings) == [None, ("duplicate", "of a, which is the same; its id comes first")]


def test_a_reason_names_the_limit(settings):
    settings.update(min_short_side=400)
    assert threshold_verdict(a_row("a"), settings) == ("size", "640x360 pixels, under min_short_side 400")
    assert threshold_verdict(a_row("a", end=1e4), settings) == ("seconds", "10000.0 s, over max_seconds 1200")


def test_clips_of_one_video_are_not_each_others_duplicates(settings):
    rows = [a_row(f"{item}.{k}", seed=1, item=item, start=10.0 * k, end=10.0 * k + 10) for item in "ab" for k in (0, 1)]
    assert [verdict and verdict[0] for verdict in judge(rows, settings)] == [None, None, "duplicate", "duplicate"]


def test_caps_and_quotas_thin_by_hash(settings):
    rows = [a_row(f"v{i}", category="cats" if i % 3 else "dogs", source="abc"[i % 2]) for i in range(60)]
    settings.update(category_cap=15, source_quotas=(("a", 5),))
    verdicts = judge(rows, settings)
    assert verdicts == [judge(rows[::-1], settings)[::-1][i] for i in range(60)]
    result = funnel(rows, verdicts, settings)
    assert result["category"]["cats"][0] == 40 and result["category"]["cats"][1] <= 15
    assert result["source"]["a"] == [30, 5]
    assert {s["rule"]: s["dropped"] for s in result["rules"]}["category"] == 60 - 30
    settings.seed = 1
    assert judge(rows, settings) != verdicts


def test_banded_search_finds_what_comparing_all_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**64 - 1, (400, 5), dtype=np.uint64)
    for i in range(100):  # copies whose frames differ by 8 bits of 64, of which a quarter are mirrored
        flips = [
            np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, 8, replace=False).astype(np.uint64)) for _ in range(5)
        ]
        hashes[300 + i] = hashes[i] ^ np.array(flips, np.uint64)
    reverse = hashes ^ np.uint64(0x5555555555555555)  # stands for the hash of the mirrored picture
    rows = []
    for i in range(400):
        plain, mirrored = (reverse[i], hashes[i]) if i >= 375 else (hashes[i], reverse[i])
        prints = {"plain": [f"{h:016x}" for h in plain.tolist()], "mirrored": [f"{h:016x}" for h in mirrored.tolist()]}
        rows.append(a_row(f"v{i}", fingerprint=prints))
    found = groups(rows, most_bits=14, tables=12)
    assert sum(found[300 + i] == i for i in range(100)) >= 99
    assert len(set(found)) == 400 - sum(found[i] != i for i in range(400)) and found[:300] == list(range(300))


def prints(*frames: str) -> dict[str, list[str]]:
    return {"plain": list(frames), "mirrored": ["" if not frame else "f" * len(frame) for frame in frames]}


def test_what_else_decides_which_are_duplicates():
    """Frames of 256 bits, of which the words differ; what is flat, how many frames agree, lengths, mirror images."""
    same, other = "0123456789abcdef" * 4, "0123456789abcdee" * 3 + "fedcba9876543210"
    rows = [
        a_row("a", end=4.0, fingerprint=prints(same, same, same, same)),
        a_row("b", end=4.2, fingerprint=prints(same, same, same, other)),
        a_row("c", end=9.0, fingerprint=prints(same, same, same, "")),
        a_row("d", end=4.0, fingerprint={"plain": ["f" * 64] * 4, "mirrored": [same] * 4}),
    ]
    options = dict(most_bits=2.0, tables=12)
    assert groups(rows, **options) == [0, 0, 0, 0]
    assert groups(rows, **options, mirror=False) == [0, 0, 0, 3]
    assert groups(rows[:2], **options, share=1.0) == [0, 1] != groups(rows[:2], **options, share=2 / 3)
    assert groups(rows[::2], **options, share=1.0) == [0, 0]
    assert groups(rows[::2], **options, share=1.0, flat=False) == [0, 1]
    assert groups(rows, **options, mirror=False, most_seconds=0.5) == [0, 0, 2, 3]


def test_a_finer_fingerprint_has_more_words_and_passes_over_noise(tmp_path, config):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (16, 17)).astype(np.int16)
    assert len(difference_hash(small)) == 64 and len(difference_hash(small[:8, :9])) == 16
    flat = 60 + rng.integers(0, 2, (16, 17)).astype(np.int16)
    assert int(difference_hash(flat), 16) and not int(difference_hash(flat, min_step=2), 16)
    with pytest.raises(UserError, match="grid must be 8, 16"):
        fingerprint({}, {**config.fingerprint, "grid": 12}, tmp_path)
