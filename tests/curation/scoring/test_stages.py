"""Stages: damaged files, cuts, times of key frames and pairs, coverage; the models on pictures with known truth."""

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.curation.stages import pictures
from kangaroo_jax.curation.stages.cuts import clips_between, cuts, cuts_by_size, usual_gap
from kangaroo_jax.curation.stages.face import box_coverage, boxes_of
from kangaroo_jax.curation.stages.fingerprint import quantiles, without_black_bars
from kangaroo_jax.curation.stages.keyframes import candidate_times, keyframes, sharpness
from kangaroo_jax.curation.stages.motion import motion, pair_times
from kangaroo_jax.curation.stages.pictures import greys_at, pictures_at
from kangaroo_jax.curation.stages.probe import probe
from kangaroo_jax.curation.stages.text import coverage, static_share
from kangaroo_jax.data.media.video import load_video
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.guard import Guard, Stopped
from kangaroo_jax.system.processes import Lost
from tests.curation.scoring.clips import breaking_job, moving, scene, write_clip
from tests.data.media import numbered_frame, read_number, set_display_matrix, write_video


def probed(path, config, kind="video"):
    row = {"id": "x", "path": str(path), "kind": kind, "start": None, "end": None, "caption": ""}
    return row | {"probe": probe(row, config.probe, path.parent).scores}


def clip_of(path, config):
    row = probed(path, config)
    outcome = cuts(row, config.cuts, path.parent)
    (start, end), *_ = outcome.clips
    return row | {"cuts": outcome.scores, "start": start, "end": end}


def test_probe_of_a_whole_video(tmp_path, config):
    scores = probed(write_clip(tmp_path / "a.mp4", moving(0), g="8"), config)["probe"]
    assert (scores["width"], scores["height"], scores["frames"], scores["codec"]) == (240, 180, 20, "h264")
    assert scores["seconds"] == pytest.approx(2.5) and scores["fps"] == 8 and scores["decodable"] == 1.0
    assert scores["keys"] == [0.0, 1.0, 2.0]
    turned = write_video(tmp_path / "t.mp4", 16, rotation=90, size=(96, 64))
    assert (probed(turned, config)["probe"]["width"], probed(turned, config)["probe"]["height"]) == (64, 96)


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0)])
def test_pictures_are_turned_and_mirrored_as_in_training(tmp_path, config, matrix):
    path = write_video(tmp_path / "a.mp4", 8, size=(96, 64))
    set_display_matrix(path, *matrix)
    row = clip_of(path, config)
    shown = load_video(path, image_size=96, times=[0.5]).pixels[0].astype(int)
    (picture,) = pictures_at(row, [0.5], 96)
    colour = picture.colour(96)
    top, left = ((96 - side) // 2 for side in colour.shape[:2])
    assert (row["probe"]["width"], row["probe"]["height"]) == colour.shape[1::-1]
    assert np.abs(shown[top : 96 - top, left : 96 - left] - colour).mean() < 4


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webm"])
def test_animations_are_told_by_their_bytes(tmp_path, config, name):
    frames = [Image.fromarray(numbered_frame(i)) for i in range(6)]
    frames[0].save(tmp_path / name, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    row = clip_of(tmp_path / name, config)
    assert row["probe"]["seconds"] == pytest.approx(0.6) and row["cuts"]["times"] == []
    assert [read_number(picture.colour(96)) for picture in pictures_at(row, [0.05, 0.35], 96)] == [0, 3]


def test_damage_is_measured(tmp_path, config):
    whole = write_clip(tmp_path / "a.mp4", moving(0, 80), g="8", movflags="faststart")
    data = bytearray(whole.read_bytes())
    rng = np.random.default_rng(0)
    noisy = data.copy()
    for place in rng.integers(len(data) // 2, len(data), 60):
        noisy[place] = rng.integers(0, 256)
    (tmp_path / "noisy.mp4").write_bytes(noisy)
    row = clip_of(tmp_path / "noisy.mp4", config)
    assert min(row["probe"]["decodable"], row["cuts"]["decodable"]) < 0.9
    for name, content in (("empty", b""), ("html", b"<html></html>"), ("half", bytes(data[: len(data) // 2]))):
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(UserError):
            probed(tmp_path / f"{name}.mp4", config)


def test_cuts_are_found_by_a_full_pass_and_between_key_frames(tmp_path, config):
    pictures = [picture for seed in (1, 2, 3) for picture in moving(seed, 24, step=1)]
    film = write_clip(tmp_path / "film.mp4", pictures, g="100", sc_threshold="0")
    with_keys = write_clip(tmp_path / "keys.mp4", pictures, g="24")
    for path, limit in ((film, 3e8), (film, 0), (with_keys, 0)):
        config.cuts.full_pass_pixels = limit
        found = clip_of(path, config)["cuts"]["times"]
        assert found == pytest.approx([3.0, 6.0], abs=0.13), (path.name, limit)
    config.cuts.update(whole_seconds=5.0, min_clip_seconds=2.0)
    assert len(cuts(probed(film, config), config.cuts, tmp_path).clips) == 3


def test_a_scene_begins_with_a_large_packet_or_a_key_frame_out_of_turn():
    packets = [(k / 10, 100, False) for k in range(60)]
    packets[0], packets[50] = (0.0, 1000, True), (5.0, 900, True)
    assert cuts_by_size(packets, 0.0, 5.0, False) == []
    assert cuts_by_size(packets, 0.0, 5.01, True) == [pytest.approx(5.0)]  # the later key frame begins it
    packets[30] = (3.0, 850, False)
    assert cuts_by_size(packets, 0.0, 5.01, True) == [3.0]
    noisy = [(time, 700 if size == 100 else size, key) for time, size, key in packets]
    assert cuts_by_size(noisy, 0.0, 5.01, False) == []  # all are large
    assert usual_gap(np.array([5.0, 5.0, 1.2, 10.0, 5.0])) == 5.0  # 10.0 is there once
    assert usual_gap(np.array([3.0, 8.0])) == 8.0 and usual_gap(np.array([])) == 0.0


def test_scenes_are_joined_and_divided():
    assert clips_between([1, 4, 8], 0, 12, 3, 60) == ((0.0, 4.0), (4.0, 8.0), (8.0, 12.0))
    assert clips_between([], 0, 100, 3, 40) == ((0.0, 33.333), (33.333, 66.667), (66.667, 100.0))
    assert clips_between([99], 0, 100, 3, 200) == ((0.0, 100.0),)


def test_key_frames_are_spread_sharp_and_not_at_cuts(tmp_path, config):
    times = candidate_times(10.0, [1.0, 5.1], [], config.keyframes)
    assert times.shape == (5, 3) and (np.diff(times.ravel()) >= 0).all()
    assert all((2 * k <= row).all() and (row <= 2 * k + 2).all() for k, row in enumerate(times))
    assert np.abs(times.ravel()[:, None] - [1.0, 5.1]).min() >= 0.148
    near = candidate_times(10.0, [], [0.9, 4.7], config.keyframes)
    assert near[0, 0] == pytest.approx(1.05) and near[2, 0] == pytest.approx(4.85)
    blurred = [cv2.GaussianBlur(p, (0, 0), 4) if i % 4 else p for i, p in enumerate(moving(1, 40))]
    row = clip_of(write_clip(tmp_path / "b.mp4", blurred), config)
    outcome = keyframes(row, config.keyframes, tmp_path)
    assert len(outcome.files) == 5 and all(data[:2] == b"\xff\xd8" for data in outcome.files)
    assert sum(round(8 * time) % 4 == 0 for time in outcome.scores["times"]) >= 3  # the sharp ones
    picture = cv2.imdecode(np.frombuffer(outcome.files[0], np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (180, 240, 3)
    grey = cv2.cvtColor(scene(1), cv2.COLOR_RGB2GRAY)
    assert sharpness(grey) > 2 * sharpness(cv2.GaussianBlur(grey, (0, 0), 4))


def test_motion_is_of_the_diagonal_and_no_cut_adds_to_it(tmp_path, config):
    still = [scene(1)] * 24 + [scene(2)] * 24
    row = clip_of(write_clip(tmp_path / "still.mp4", still), config)
    assert motion(row, config.motion, tmp_path).scores["score"] < 0.015
    scores = []
    for name, size in (("small", (180, 240)), ("large", (360, 480))):
        frames = [
            cv2.resize(p, size[::-1], interpolation=cv2.INTER_AREA) for p in moving(3, 24, 2, width=480, height=360)
        ]
        row = clip_of(write_clip(tmp_path / f"{name}.mp4", frames, crf="10"), config)
        scores.append(motion(row, config.motion, tmp_path).scores["score"])
    assert scores[0] == pytest.approx(scores[1], rel=0.35) and min(scores) > 0.1
    pairs = pair_times(10.0, 0.04, [2.2], config.motion)
    assert pairs.shape == (10, 2) and (np.diff(pairs.ravel()) >= 0).all() and pairs[-1, 1] < 9.98
    assert 2.35 in pairs[:, 0].tolist()
    spread = pair_times(2.0, 0.04, [0.5], config.motion)
    assert spread.shape == (8, 2) and (np.diff(spread.ravel()) > 0).all() and spread[-1, 1] < 1.98
    assert pair_times(0.2, 0.04, [], config.motion).shape == (1, 2)


def test_key_frames_and_motion_share_what_is_decoded(tmp_path, config, monkeypatch):
    row = clip_of(write_clip(tmp_path / "a.mp4", moving(2, 48, 2)), config)
    alone = motion(row, config.motion, tmp_path)
    keyframes(row, config.keyframes, tmp_path)
    monkeypatch.setattr(pictures, "pictures_at", lambda *_: pytest.fail("decoded again"))
    assert motion(row, config.motion, tmp_path) == alone
    with pytest.raises(pytest.fail.Exception):
        motion(row, {**config.motion, "short_side": 128}, tmp_path)


def test_frames_have_their_own_shape(tmp_path, config):
    row = clip_of(write_clip(tmp_path / "a.mp4", moving(0)), config)
    seen = list(pictures_at(row, [0.0, 1.0], 120))
    assert [picture.colour(120).shape for picture in seen] == [(90, 120, 3)] * 2
    assert [picture.time for picture in seen] == [0.0, 1.0]
    (grey,) = greys_at(row, np.array([0.0]), 90)
    assert grey.shape == (90, 120) and np.abs(grey.mean() - seen[0].colour(120).mean()) < 12
    assert (
        np.abs(seen[0].colour(120).astype(int) - cv2.resize(scene(0), (120, 90), interpolation=cv2.INTER_AREA)).mean()
        < 6
    )


def test_overlapping_boxes_count_once():
    box = np.array([[0, 0], [50, 0], [50, 40], [0, 40]], np.float32)
    assert coverage([box, box + 10], (100, 100, 3)) == pytest.approx(0.282, abs=0.02)
    assert coverage([], (100, 100, 3)) == 0
    assert static_share([[box, box + 50], [box + 1], []]) == pytest.approx(2 / 3)
    assert box_coverage([np.array([-5, 0, 10, 10, 0.9]), np.array([5, 0, 15, 10, 0.9])], (20, 20, 3)) == 150 / 400
    bars = np.zeros((100, 100), np.uint8)
    bars[20:80] = 128
    noise = np.random.default_rng(0).integers(0, 256, (7, 30), np.uint8)
    assert np.allclose(quantiles(noise, 0.75), np.quantile(noise, 0.75, axis=1))
    assert without_black_bars(bars).shape == (60, 100) and without_black_bars(bars * 0).shape == (100, 100)


def test_a_heatmap_becomes_boxes():
    centres = np.zeros((10, 10), np.float32)
    centres[4, 5], centres[4, 6], centres[8, 1] = 0.9, 0.8, 0.3
    sizes = np.full((2, 10, 10), np.log(4.0), np.float32)
    ((left, top, right, bottom, score),) = boxes_of(centres, sizes, np.zeros((2, 10, 10), np.float32))
    assert (left, top, right, bottom) == pytest.approx((14, 10, 30, 26)) and score == pytest.approx(0.9)


def test_a_guard_survives_its_process_and_closes_in_the_midst(tmp_path, config):
    guard = Guard(breaking_job, seconds=3.0, memory_mib=2000)
    row = {"id": "x", "path": str(tmp_path / "segv_1.mp4"), "kind": "video", "start": None, "end": None}
    with pytest.raises(Lost, match="crashed .SIGSEGV."):
        guard.call("cuts", row, {}, str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        guard.call("probe", row, {}, str(tmp_path))
    guard.close()
    with pytest.raises(Stopped):
        guard.call("probe", row, {}, str(tmp_path))


def test_models_on_pictures_with_known_truth(tmp_path, config):
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from kangaroo_jax.curation.stages.text import text

    slide = np.full((360, 640, 3), 245, np.uint8)
    for k in range(6):
        cv2.putText(slide, "Filters of the data pipeline", (20, 60 + 50 * k), 0, 1.15, (20, 20, 60), 3)
    results = []
    for k, picture in enumerate((slide, scene(3, 640, 360))):
        folder = tmp_path / "keyframes" / f"c{k}"
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "0.jpg"), picture)
        row = {"id": f"c{k}", "keyframes": {"times": [0.0], "digest": str(k)}}
        results.append(text(row, config.text, tmp_path).scores)
    assert results[0]["coverage"] > 0.3 and "Filters" in results[0]["sample"]
    assert results[1]["coverage"] < 0.05
    shutil.rmtree(tmp_path / "keyframes")
