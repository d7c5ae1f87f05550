"""Times are those of the frames decoded, whatever the file's clock, rate, rotation or key frames."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.data.media import picker, video
from kangaroo_jax.data.media.video import FramePolicy, load_video, probe, sample_times
from tests.data.media import read_number, write_video

STAGES_4_5 = FramePolicy(
    fps=1.0, min_frames=16, max_frames=64, long_seconds=64, long_min_frames=64, long_max_frames=160
)


def numbers(clip: video.Clip) -> list[int]:
    return [read_number(frame) for frame in clip.pixels]


def on_display(stamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the last frame whose stamp is not after each time; the first before it begins."""
    return np.maximum(np.searchsorted(stamps, np.asarray(times) + 1e-3, side="right") - 1, 0)


@pytest.mark.parametrize(
    "seconds, count", [(2, 16), (16, 16), (17, 18), (17.4, 18), (40, 40), (64, 64), (64.1, 64), (100, 100), (4000, 160)]
)
def test_frame_count_is_one_a_second_within_the_range_and_even(seconds: float, count: int) -> None:
    times = sample_times(seconds, STAGES_4_5)
    assert len(times) == count
    edges = np.linspace(0, seconds, count + 1)
    np.testing.assert_allclose(times, (edges[1:] + edges[:-1]) / 2)


def test_rate_and_most_frames_of_one_video_work_together() -> None:
    assert len(sample_times(20.0, STAGES_4_5.narrowed(fps=2.0))) == 40
    assert len(sample_times(20.0, STAGES_4_5.narrowed(fps=2.0, max_frames=24))) == 24
    assert len(sample_times(20.0, STAGES_4_5.narrowed(max_frames=4))) == 4
    assert len(sample_times(20.0, STAGES_4_5.narrowed(max_frames=7))) == 6
    assert len(sample_times(900.0, STAGES_4_5.narrowed(max_frames=32))) == 32
    assert len(sample_times(20.0, FramePolicy(min_frames=1, max_frames=1, multiple=1))) == 1
    assert len(sample_times(20.0, FramePolicy(min_frames=1, max_frames=1, multiple=2))) == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("start", [0.0, 5.0])
def test_ntsc_rate_and_start_offset(tmp_path: Path, name: str, start: float) -> None:
    rate = Fraction(30_000, 1001)
    path = write_video(tmp_path / name, 75, rate, start=start)
    stamps = np.arange(75) / float(rate)
    clip = load_video(path, image_size=48, policy=FramePolicy(fps=6, min_frames=2))
    wanted = sample_times(probe(path).seconds, FramePolicy(fps=6, min_frames=2))
    assert clip.pixels.shape == (len(wanted), 48, 48, 3)
    assert numbers(clip) == on_display(stamps, wanted).tolist()
    np.testing.assert_allclose(clip.times, stamps[numbers(clip)], atol=1e-3)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_variable_frame_rate(tmp_path: Path, name: str) -> None:
    stamps = np.cumsum([0, 0.04, 0.04, 0.5, 0.033, 0.7, 0.1, 0.1, 0.1, 0.9, 0.04, 0.25])
    path = write_video(tmp_path / name, stamps=stamps, codec="libvpx-vp9" if name.endswith("webm") else "libx264")
    times = np.linspace(0.0, stamps[-1], 40)
    clip = load_video(path, image_size=48, times=times)
    assert numbers(clip) == on_display(stamps, times).tolist()
    np.testing.assert_allclose(clip.times, stamps[numbers(clip)], atol=1.1e-3)


def test_a_frame_is_found_by_its_own_rounded_time(tmp_path: Path) -> None:
    rate = Fraction(30_000, 1001)
    path = write_video(tmp_path / "a.mp4", 60, rate)
    clip = load_video(path, image_size=48, times=np.floor(np.arange(60) / float(rate) * 1e3) / 1e3)
    assert numbers(clip) == list(range(60))
    again = load_video(path, image_size=48, times=clip.times)
    assert numbers(again) == list(range(60))


def test_repeated_times_give_the_same_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 8, 8)
    clip = load_video(path, image_size=48, times=[0.2, 0.2, 0.9, 0.9])
    assert numbers(clip) == [1, 1, 7, 7]
    assert clip.times.tolist() == [0.125, 0.125, 0.875, 0.875]


def test_clip_of_a_video_counts_from_its_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 80, 8, start=3.0)
    policy = FramePolicy(fps=2, min_frames=2)
    clip = load_video(path, image_size=48, policy=policy, start=4.0, end=7.0)
    wanted = 4.0 + sample_times(3.0, policy)
    assert numbers(clip) == np.floor(wanted * 8 + 1e-6).astype(int).tolist()
    np.testing.assert_allclose(clip.times, np.array(numbers(clip)) / 8 - 4.0)
    # The frame already on display when the clip starts is at its time 0.
    first = load_video(path, image_size=48, times=[0.0], start=4.05)
    assert numbers(first) == [32] and first.times[0] == 0.0
    # An end after the last frame is the last frame.
    assert len(load_video(path, image_size=48, policy=policy, start=8.0, end=99.0).times) == 4


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_of_the_file_is_applied(tmp_path: Path, rotation: int) -> None:
    path = write_video(tmp_path / "a.mp4", 8, 8, rotation=rotation)
    assert numbers(load_video(path, image_size=48, times=[0.0, 0.5])) == [0, 4]


def test_letterbox_of_wide_and_tall_videos(tmp_path: Path) -> None:
    wide = load_video(write_video(tmp_path / "w.mp4", 4, 8, size=(128, 64)), image_size=64, times=[0.0]).pixels[0]
    assert (wide[:16] == 0).all() and (wide[48:] == 0).all() and wide[16:48].min() > 0
    tall = load_video(write_video(tmp_path / "t.mp4", 4, 8, size=(64, 128)), image_size=64, times=[0.0]).pixels[0]
    assert (tall[:, :16] == 0).all() and (tall[:, 48:] == 0).all() and tall[:, 16:48].min() > 0


@pytest.mark.parametrize("gop", [1, 12, 50, 400])
def test_seeking_changes_nothing(tmp_path: Path, gop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 400, 8, gop=gop)
    for count in (2, 5, 40):
        times = (np.arange(count) + 0.5) * 50 / count
        monkeypatch.setattr(picker, "_SEEK_SECONDS", 0.0)
        seeking = load_video(path, image_size=48, times=times)
        monkeypatch.setattr(picker, "_SEEK_SECONDS", 1e9)
        forward = load_video(path, image_size=48, times=times)
        assert numbers(seeking) == np.floor(times * 8 + 1e-6).astype(int).tolist()
        np.testing.assert_array_equal(seeking.pixels, forward.pixels)
        np.testing.assert_array_equal(seeking.times, forward.times)


def test_seeks_skip_what_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 400, 8, gop=10)
    monkeypatch.setattr(picker, "_SEEK_SECONDS", 0.0)
    decoded = []
    whole = picker.FramePicker._decode

    def counted(self: picker.FramePicker):  # noqa: ANN202
        for item in whole(self):
            decoded.append(item[1])
            yield item

    monkeypatch.setattr(picker.FramePicker, "_decode", counted)
    load_video(path, image_size=48, times=[10.0, 20.0, 45.0])
    assert len(decoded) < 60


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("b.mkv", "libx265")]
)
@pytest.mark.parametrize("even", [True, False])
def test_passing_over_frames_changes_nothing(
    tmp_path: Path, name: str, codec: str, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(3)
    stamps = np.arange(240) / 8 if even else np.cumsum(random.choice([0.04, 0.08, 0.3, 0.7], 240))
    path = write_video(tmp_path / name, rate=8, stamps=(stamps - stamps[0]).tolist(), gop=60, codec=codec)
    end = stamps[-1] - stamps[0]
    skipped = []
    choose = picker.FramePicker._set_skip

    def noted(self: picker.FramePicker, *arguments: object) -> None:
        choose(self, *arguments)
        skipped.append(self._skipping)

    for count in (7, 60, 200):
        times = np.sort(random.uniform(0, end, count))
        monkeypatch.setattr(picker.FramePicker, "_set_skip", noted)
        passing = load_video(path, image_size=48, times=times)
        assert any(skipped) and not all(skipped)
        monkeypatch.setattr(picker.FramePicker, "_set_skip", lambda *_: None)
        every = load_video(path, image_size=48, times=times)
        np.testing.assert_array_equal(passing.pixels, every.pixels)
        np.testing.assert_array_equal(passing.times, every.times)


def test_a_stream_without_a_header_and_sound_longer_than_the_picture(tmp_path: Path) -> None:
    raw = write_video(tmp_path / "a.h264", 40, 8)
    seconds = probe(raw).seconds
    assert seconds == pytest.approx(5.0, abs=0.3) or seconds == pytest.approx(40 / 25, abs=0.3)
    shown = numbers(load_video(raw, image_size=48, policy=FramePolicy(min_frames=10, max_frames=10)))
    assert shown == sorted(shown) and len(set(shown)) == 10
    with_sound = write_video(tmp_path / "b.mkv", 16, 8, audio=True)
    assert probe(with_sound).seconds == pytest.approx(2.0, abs=0.05)
    assert len(load_video(with_sound, image_size=48, policy=FramePolicy(min_frames=16)).times) == 16


def test_probe(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "a.mp4", 20, 8, size=(128, 96)))
    assert (info.kind, info.width, info.height, info.codec) == ("video", 128, 96, "h264")
    assert info.seconds == pytest.approx(2.5) and info.fps == pytest.approx(8)
