"""Reported times against ffprobe's, frame by frame: which frame it is, its burnt-in number says."""

import json
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.data.batches.sample import plan_media
from kangaroo_jax.data.media import picker
from kangaroo_jax.data.media.decode import decode_one
from kangaroo_jax.data.media.video import FramePolicy, load_video, probe
from kangaroo_jax.errors import UserError
from tests.data.media import numbered_frame, read_number, write_video

FRAMES = 90
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")


def presentation_times(path: Path) -> dict[int, float]:
    """ffprobe's time of each frame, by the number that FFmpeg's own decoding of that frame shows."""
    probed = subprocess.run(
        ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "frame=pts_time", "-of", "json", path],
        capture_output=True, check=True,
    )  # fmt: skip
    times = [float(frame["pts_time"]) for frame in json.loads(probed.stdout)["frames"] if "pts_time" in frame]
    raw = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-fps_mode", "passthrough", "-vf", "scale=96:96", "-f", "rawvideo",
         "-pix_fmt", "rgb24", "-"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 96, 96, 3)
    assert len(frames) == len(times)
    return {read_number(frame): time for frame, time in zip(frames, times, strict=True)}


def variable(path: Path) -> Path:
    gaps = np.random.default_rng(0).choice([0.01, 0.04, 0.2, 1.3], FRAMES)
    return write_video(path, stamps=np.cumsum(gaps).round(3).tolist(), options={})


def edit_list(path: Path) -> Path:
    """Begins, by its edit list, at 1.1 s, inside a group of pictures."""
    whole = write_video(path.with_name("whole.mp4"), FRAMES, 30, gop=30)
    command = ["ffmpeg", "-v", "error", "-y", "-ss", "1.1", "-i", whole, "-c", "copy", "-avoid_negative_ts", "0", path]
    subprocess.run(command, check=True)
    return path


def b_frames(path: Path) -> Path:
    whole = write_video(path.with_name("whole.mp4"), FRAMES, 30)
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-y",
        "-i",
        whole,
        "-c:v",
        "libx264",
        "-bf",
        "3",
        "-b_strategy",
        "0",
        "-g",
        "40",
    ]
    subprocess.run([*command, "-crf", "10", path], check=True)
    return path


CASES: dict[str, Callable[[Path], Path]] = {
    "constant.mp4": lambda path: write_video(path, FRAMES, Fraction(30000, 1001)),
    "variable.mp4": variable,
    "variable.mkv": variable,
    "offset.mp4": lambda path: write_video(path, FRAMES, 24, start=3.7),
    "offset.ts": lambda path: write_video(path, FRAMES, 25, start=3.7),
    "edit_list.mp4": edit_list,
    "b_frames.mp4": b_frames,
    "rotated.mp4": lambda path: write_video(path, FRAMES, 30, rotation=90),
    "a.webm": lambda path: write_video(path, FRAMES, 20, codec="libvpx-vp9"),
}


@needs_ffmpeg
@pytest.mark.parametrize("seek", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_times_are_ffprobes(tmp_path: Path, name: str, seek: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picker, "_SEEK_SECONDS", 0.0 if seek else 1e9)
    path = CASES[name](tmp_path / name)
    truth = presentation_times(path)
    first = min(truth.values())
    for policy in (FramePolicy(min_frames=16, max_frames=16), FramePolicy(min_frames=5, max_frames=5, multiple=1)):
        clip = load_video(path, image_size=48, policy=policy)
        shown = [read_number(frame) for frame in clip.pixels]
        assert len(set(shown)) > 3 and clip.zero == pytest.approx(first, abs=1e-6)
        for number, time in zip(shown, clip.times, strict=True):
            assert clip.zero + time == pytest.approx(truth[number], abs=1e-6), number
        # It is the frame on display: the last of all that is not after the moment.
        wanted = (np.arange(len(shown)) + 0.5) * probe(path).seconds / len(shown) + first
        due = [max((n for n in truth if truth[n] <= w + 1e-3), key=truth.__getitem__) for w in wanted]
        assert shown == due


@needs_ffmpeg
def test_times_of_a_clip_with_start_and_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, Fraction(30000, 1001), start=0.5)
    truth = presentation_times(path)
    clip = load_video(path, image_size=48, policy=FramePolicy(min_frames=8, max_frames=8), start=0.71, end=2.3)
    for frame, time in zip(clip.pixels[1:], clip.times[1:], strict=True):
        assert clip.zero + time == pytest.approx(truth[read_number(frame)], abs=1e-6)
    first = truth[read_number(clip.pixels[0])]
    assert clip.zero == pytest.approx(0.5 + 0.71, abs=1e-6) and clip.times[0] == max(0.0, first - clip.zero)


@needs_ffmpeg
def test_times_of_a_gif(tmp_path: Path) -> None:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(12)]
    delays = [100, 40, 300, 20, 70, 100, 500, 30, 90, 60, 120, 200]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, loop=0)
    truth = presentation_times(path)
    clip = load_video(path, image_size=96, times=[0.0, 0.11, 0.3, 0.46, 1.2, 1.4])
    shown = [read_number(frame) for frame in clip.pixels]
    assert [truth[number] for number in shown] == pytest.approx(clip.times.tolist(), abs=1e-6)
    assert shown[0] == 0 and shown[-1] > 8 and probe(path, "video").seconds == pytest.approx(1.63, abs=0.02)


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_times_of_webp_and_png_animations(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(6)]
    delays = [100, 40, 300, 20, 70, 200]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, lossless=True)
    assert probe(path, "video").seconds == pytest.approx(0.73)
    clip = load_video(path, image_size=96, times=[0.0, 0.1, 0.13, 0.2, 0.44, 0.72])
    assert [read_number(frame) for frame in clip.pixels] == [0, 1, 1, 2, 3, 5]
    np.testing.assert_allclose(clip.times, [0.0, 0.1, 0.1, 0.14, 0.44, 0.53], atol=1e-9)
    with pytest.raises(UserError, match="its frames end at 0.73 s, before 2.00 s"):
        load_video(path, image_size=96, times=[2.0])


def test_frames_in_a_folder_or_a_list(tmp_path: Path) -> None:
    for i in range(40):
        Image.fromarray(numbered_frame(i)).save(tmp_path / f"f{i}.png")  # f10 comes after f9
    policy = FramePolicy(min_frames=4, max_frames=16)
    paths = tuple(str(tmp_path / f"f{i}.png") for i in range(40))
    (few,) = plan_media([Media("video", paths[0], frames=paths[:5], sample_fps=2.0)], policy, 2)
    clip = decode_one(few, 48)
    assert [read_number(x) for x in clip.pixels] == [0, 1, 2, 3, 4, 4]
    assert clip.times.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    (many,) = plan_media([Media("video", str(tmp_path), sample_fps=4.0)], policy, 2)
    clip = decode_one(many, 48)
    shown = [read_number(x) for x in clip.pixels]
    assert shown == sorted(set(shown)) and len(shown) == 16
    np.testing.assert_allclose(clip.times, np.array(shown) / 4)
    (part,) = plan_media([Media("video", str(tmp_path), start=2.0, end=4.0, sample_fps=4.0)], policy, 2)
    assert [int(Path(frame).stem[1:]) for frame in part.frames] == list(range(8, 16))
    assert part.times[:3] == (0.0, 0.25, 0.5)


def test_damage_costs_only_its_own_frames(tmp_path: Path) -> None:
    """Bytes in the middle are overwritten: the rest arrives, each frame with its own time."""
    path = write_video(tmp_path / "a.mp4", 400, 20, gop=20, options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 900] = np.random.default_rng(1).bytes(900)
    path.write_bytes(data)
    clip = load_video(path, image_size=48, policy=FramePolicy(min_frames=40, max_frames=40))
    shown = np.array([read_number(frame) for frame in clip.pixels])
    np.testing.assert_allclose(clip.times, shown / 20, atol=1e-6)
    due = np.floor((np.arange(40) + 0.5) * 20 / 40 * 20)
    assert (shown == due).mean() >= 0.9
