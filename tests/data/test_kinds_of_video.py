"""Videos that say little or odd things of themselves: streams, lengths, orientations, times, colours."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.audit import check as data_check
from kangaroo_jax.data.media import picker, pixels
from kangaroo_jax.data.media.stamps import BestEffort
from kangaroo_jax.data.media.video import FramePolicy, load_video, probe
from kangaroo_jax.errors import UserError
from tests.data.media import numbered_frame, read_number, set_display_matrix, write_video

POLICY = FramePolicy(min_frames=16, max_frames=16)
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def numbers(clip) -> list[int]:  # noqa: ANN001
    return [read_number(frame) for frame in clip.pixels]


def at_rate(path: Path, codec: str, count: int, rate: int, options: dict[str, str] | None = None) -> Path:
    """A numbered video whose codec's clock ticks once a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(i), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def thumbnail_first(path: Path) -> Path:
    """Stream 0 is one picture without the mark of a cover, stream 1 the video."""
    with av.open(str(path), "w") as container:
        still, moving = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=8)
        for stream, form in ((still, "yuvj420p"), (moving, "yuv420p")):
            stream.width = stream.height = 96
            stream.pix_fmt = form
        still.disposition, moving.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        container.mux(still.encode(av.VideoFrame.from_ndarray(numbered_frame(4000), format="rgb24")))
        for i in range(16):
            container.mux(moving.encode(av.VideoFrame.from_ndarray(numbered_frame(i), format="rgb24")))
        for stream in (still, moving):
            container.mux(stream.encode(None))
    return path


def test_the_best_stream_is_shown_and_not_the_first(tmp_path: Path) -> None:
    path = thumbnail_first(tmp_path / "a.mov")
    assert numbers(load_video(path, image_size=48, policy=POLICY)) == list(range(16))
    assert probe(path).codec == "h264"


@pytest.mark.parametrize("name", ["a.flv", "b.mkv"])
def test_the_length_is_the_pictures_where_the_sound_is_longer(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 24, 8, audio=True)  # 3 s, beside 5 s of sound
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"XURATION"))
    seconds = probe(path).seconds
    assert seconds == pytest.approx(3.0, abs=0.13)
    clip = load_video(path, image_size=48, policy=POLICY)
    assert numbers(clip) == [int((i + 0.5) * seconds / 2) for i in range(16)] and not clip.missed


@pytest.mark.parametrize("tag", [b"00:00:02,000000000", b"unknown (live)    ", b"2               s "])
def test_an_odd_tag_of_the_length(tmp_path: Path, tag: bytes) -> None:
    path = write_video(tmp_path / "a.mkv", 16, 8)
    data = path.read_bytes()
    assert b"00:00:02.000000000" in data
    path.write_bytes(data.replace(b"00:00:02.000000000", tag))
    assert probe(path).seconds == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_all_orientations(tmp_path: Path, turn: int, mirrored: bool) -> None:
    path = write_video(tmp_path / "a.mp4", 2, 8)
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turn]
    sign = -1 if mirrored else 1  # the x axis is flipped first
    set_display_matrix(path, sign * cos, sign * sin, -sin, cos)
    shown = load_video(path, image_size=96, times=[0.0]).pixels[0].astype(int)
    picture = numbered_frame(0)[:, ::sign]
    assert np.abs(shown - np.rot90(picture, -turn)).mean() < 4


@needs_ffmpeg
@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0)])
def test_orientations_are_ffmpegs(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = write_video(tmp_path / "a.mp4", 2, 8, size=(96, 48))
    set_display_matrix(path, *matrix)
    size = "48x96" if matrix[0] == 0 else "96x48"
    raw = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    width, height = map(int, size.split("x"))
    shown = load_video(path, image_size=96, times=[0.0]).pixels[0].astype(int)
    inner = shown[(96 - height) // 2 :][:height, (96 - width) // 2 :][:, :width]
    assert np.abs(inner - np.frombuffer(raw, np.uint8).reshape(height, width, 3)).mean() < 2


@needs_ffmpeg
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("seek", [True, False])
def test_times_of_avi_with_b_frames_are_ffmpegs(
    tmp_path: Path, codec: str, seek: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seek:
        monkeypatch.setattr(picker, "_SEEK_SECONDS", 0.0)
        monkeypatch.setattr(picker, "_SEEK_FRAMES", 0)
    whole = write_video(tmp_path / "a.mkv", 160, 10)
    path = tmp_path / "a.avi"
    quality = ["-crf", "12", "-bf", "3", "-b_strategy", "0"] if codec == "libx264" else ["-q:v", "2", "-bf", "2"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", whole, "-c:v", codec, *quality, "-g", "12", path], check=True)
    probed = subprocess.run(
        ["ffprobe", "-v", "error", "-select_streams", "v:0",
         "-show_entries", "frame=best_effort_timestamp_time", "-of", "json", path],
        capture_output=True, check=True,
    )  # fmt: skip
    truth = [
        float(frame["best_effort_timestamp_time"]) for frame in json.loads(probed.stdout)["frames"] if len(frame) > 0
    ]
    clip = load_video(path, image_size=48, policy=POLICY)
    assert clip.zero == pytest.approx(truth[0]) and (np.diff(clip.times) > 0).all()
    for number, time in zip(numbers(clip), clip.times, strict=True):
        assert clip.zero + time == pytest.approx(truth[number], abs=1e-6)


@needs_ffmpeg
@pytest.mark.parametrize("start", [5.0, 6.0, 6.45, 6.8])
def test_the_end_of_avi_with_b_frames(tmp_path: Path, start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picker, "_SEEK_SECONDS", 0.0)
    monkeypatch.setattr(picker, "_SEEK_FRAMES", 0)
    whole, path = write_video(tmp_path / "a.mkv", 50, 7), tmp_path / "a.avi"
    how = ["-c:v", "libx264", "-crf", "12", "-bf", "3", "-g", "20", "-x264-params", "b-pyramid=normal:b-adapt=0"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", whole, *how, path], check=True)
    clip = load_video(path, image_size=48, policy=POLICY, start=start)
    assert clip.times + start == pytest.approx(np.maximum(np.array(numbers(clip)) / 7, start), abs=1e-3)


def test_raw_streams_are_decoded_on_where_others_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picker, "_BLIND_GAIN", 4)
    path = write_video(tmp_path / "a.h264", 200, 25)
    assert numbers(load_video(path, image_size=48, times=[0.0, 2.0, 7.9])) == [0, 50, 197]


def test_a_clip_of_a_video_longer_than_a_day(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", stamps=[0.0, 30.0, 60.0, 100_000.0], rate=1)
    with pytest.raises(UserError, match="hours is too long"):
        load_video(path, image_size=48, policy=POLICY)
    assert set(numbers(load_video(path, image_size=48, policy=POLICY, start=0, end=60))) == {0, 1}
    assert probe(path).seconds > 90_000


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_shown_as_usual_screens_do(tmp_path: Path, transfer: int) -> None:
    """A ramp to the white of graphics: dark parts stay, white ends near the top; ordinary videos are untouched."""
    ramp = np.repeat(np.linspace(0, 1, 128)[None, :, None], 64, 0).repeat(3, 2)
    if transfer == 16:
        code = pixels._to_pq(ramp**2.2 * 203)
    else:
        scene = (ramp**2.2 * 203 / 1000) ** (1 / 1.2)
        tail = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        code = np.where(scene <= 1 / 12, np.sqrt(3 * scene), tail)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "gbrp10le"
        stream.codec_context.color_trc = transfer
        frame = av.VideoFrame.from_ndarray((code * 1023).round().astype(np.uint16), format="gbrp10le")
        for i in range(2):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    row = load_video(path, image_size=128, times=[0.0]).pixels[0][64].astype(int)
    assert np.abs(row[:64] - ramp[0, :64] * 255).max() < 8 and 215 < row[-1].min() <= row[-1].max() < 245
    assert (np.diff(row[:, 0]) >= 0).all()


def test_transparent_videos_lie_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :32] = 255, 0, 0, 255
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "argb"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode(None))
    shown = load_video(path, image_size=64, times=[0.0]).pixels[0]
    assert (shown[:, :30] == (255, 0, 0)).all() and (shown[:, 34:] == 255).all()


def test_a_note_says_that_a_medium_is_transparent(tmp_path: Path) -> None:
    clear, full = np.full((16, 16, 4), 100, np.uint8), np.full((16, 16, 3), 100, np.uint8)
    (tmp_path / "frames").mkdir()
    for path in ("a.png", "frames/0.png"):
        Image.fromarray(clear).save(tmp_path / path)
    Image.fromarray(clear).save(tmp_path / "a.webp", save_all=True, append_images=[Image.fromarray(clear // 2)])
    Image.fromarray(full).save(tmp_path / "full.png")
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuva420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 4), np.uint8), format="rgba")
        container.mux(stream.encode(frame.reformat(format="yuva420p")))
        container.mux(stream.encode(None))
    kinds = {"a.png": "image", "frames": "video", "a.webp": "video", "a.webm": "video", "full.png": "image"}
    found = {name: data_check.check_one(str(tmp_path / name), kind) for name, kind in kinds.items()}
    assert not any(report.problems for report in found.values())
    said = {name: [note.split(":")[0].split(",")[0] for note in report.notes] for name, report in found.items()}
    assert said == {name: [] if name == "full.png" else ["transparent"] for name in kinds}


@needs_ffmpeg
@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("sound", [0, 1.12, 4])
def test_the_length_of_windows_media_is_the_pictures(tmp_path: Path, count: int, sound: float) -> None:
    whole, path = write_video(tmp_path / "a.mkv", count, 10), tmp_path / "a.wmv"
    sounds = ["-f", "lavfi", "-i", f"sine=duration={sound * count / 10}"] if sound else []
    subprocess.run(
        ["ffmpeg", "-v", "error", "-i", whole, *sounds, "-c:v", "wmv2", "-q:v", "2", "-c:a", "wmav2", path], check=True
    )
    clip = load_video(path, image_size=48, policy=POLICY)
    assert set(numbers(clip)) >= {0, count - 1} and (np.diff(clip.times) >= 0).all()
    assert probe(path).seconds == pytest.approx(count / 10, abs=0.13)


def test_the_length_of_one_frame_beside_sound(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 1, 10, audio=True)
    assert probe(path).seconds < 0.2 and set(numbers(load_video(path, image_size=48, policy=POLICY))) == {0}


@pytest.mark.parametrize("tag", [b"99:99:99.999999999", b"00:00:00.000000000", b"00:00:40.000000000"])
def test_a_tag_of_a_length_that_the_file_has_not(tmp_path: Path, tag: bytes) -> None:
    path = write_video(tmp_path / "a.mkv", 16, 8)
    path.write_bytes(path.read_bytes().replace(b"00:00:02.000000000", tag))
    assert probe(path).seconds == pytest.approx(2.0, abs=0.01)


def test_a_clock_that_starts_late_is_no_part_of_the_length(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.nut", 16, 8, start=500.0)
    assert probe(path).seconds == pytest.approx(2.0, abs=0.13)


@pytest.mark.parametrize("name, codec", [("a.m1v", "mpeg1video"), ("a.m2v", "mpeg2video"), ("a.mjpeg", "mjpeg")])
def test_the_length_of_a_raw_stream_is_counted(tmp_path: Path, name: str, codec: str) -> None:
    path = at_rate(tmp_path / name, codec, 160, 25)
    assert probe(path, "video").seconds == pytest.approx(6.4, abs=0.05)
    found = np.array(numbers(load_video(path, image_size=48, policy=POLICY)))
    assert np.abs(found - (10 * np.arange(16) + 5)).max() <= 1


@pytest.mark.parametrize("rate", [10, 30])
def test_a_raw_stream_runs_at_the_rate_that_it_states(tmp_path: Path, rate: int) -> None:
    path = at_rate(tmp_path / "a.h264", "libx264", 60, rate)
    assert probe(path).seconds == pytest.approx(60 / rate) and probe(path).fps == rate
    clip = load_video(path, image_size=48, policy=POLICY)
    assert clip.times == pytest.approx(np.array(numbers(clip)) / rate)


# --------------------------------------------------------------------------- what `data check` says

KEYS = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "00" * 16,
}


def test_an_encrypted_video_is_called_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 16, 8, options=KEYS)
    with pytest.raises(UserError, match="a.mp4: the video is encrypted"):
        load_video(path, image_size=48, policy=POLICY)
    assert ["the video is encrypted" in problem for problem in data_check.check_one(str(path), "video").problems] == [
        True
    ]


def test_a_note_says_that_a_video_is_interlaced(tmp_path: Path) -> None:
    path = at_rate(tmp_path / "a.ts", "libx264", 16, 25, {"x264-params": "tff=1"})
    report = data_check.check_one(str(path), "video")
    assert not report.problems and any(note.startswith("interlaced") for note in report.notes)
    plain = data_check.check_one(str(write_video(tmp_path / "b.mp4", 8, 8)), "video")
    assert not plain.problems and not plain.notes


@pytest.mark.parametrize(
    "glitches, back, said",
    [((), 0, "fine"), ((60,), 0.08, "note"), (range(20, 40, 2), 0.08, "bad"), ((60,), 0.8, "bad")],
)
def test_a_glitch_of_the_times_is_a_note(
    tmp_path: Path, glitches: Sequence[int], back: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Glitches(BestEffort):  # as FFmpeg's reader of program streams makes them, once in a thousand frames
        count = 0

        def of(self, pts: int | None, dts: int | None) -> int | None:
            self.count += 1
            stamp = super().of(pts, dts)
            return stamp - round(back * 90_000) if stamp is not None and self.count in glitches else stamp

    monkeypatch.setattr(data_check, "BestEffort", Glitches)
    report = data_check.check_one(str(at_rate(tmp_path / "a.mpg", "mpeg2video", 150, 25)), "video")
    steps = [
        [text for text in found if text.startswith("times step back")] for found in (report.problems, report.notes)
    ]
    assert list(map(len, steps)) == [said == "bad", said == "note"] and report.monotonic == (said == "fine")
    assert bool(report.problems) == (said == "bad")
