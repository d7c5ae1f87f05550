"""Every bad file is a UserError of one line that names the file."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.media import image, picker
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.video import FramePolicy, load_video, probe
from kangaroo_jax.errors import UserError
from tests.data.media import write_audio, write_video

pytestmark = pytest.mark.alone

POLICY = FramePolicy(min_frames=8)


def check_one_line(error: pytest.ExceptionInfo[UserError], path: Path, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    assert text.startswith(f"{path}: ")
    assert not words or any(word in text for word in words), text


def text_file(path: Path) -> Path:
    path.write_text("this is no video\n" * 200)
    return path


def playlist(path: Path) -> Path:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    return path


def no_header(path: Path) -> Path:
    whole = write_video(path, 40).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def cut_short(path: Path) -> Path:
    whole = write_video(path, 80, options={"movflags": "faststart"}).read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.6)])
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def noise(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path, ["no such file"]),
        (text_file, ["not a readable video"]),
        (playlist, ["not a readable video", "no video stream"]),
        (no_header, ["cut short"]),
        (cut_short, ["cut short"]),
        (empty, ["empty"]),
        (folder, ["folder"]),
        (noise, ["not a readable video"]),
        (write_audio, ["no video stream"]),
    ],
)
def test_bad_video(tmp_path: Path, make: Callable[[Path], Path], words: list[str]) -> None:
    path = make(tmp_path / "clip: 1.mp4")
    with pytest.raises(UserError) as error:
        load_video(path, image_size=32, policy=POLICY)
    check_one_line(error, path, *words)
    if make is not cut_short:  # only decoding shows that
        with pytest.raises(UserError) as error:
            probe(path)
        check_one_line(error, path, *words)


def test_a_file_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = cut_short(tmp_path / "a.mp4")
    assert load_video(path, image_size=32, times=[0.0, 1.0]).times.tolist() == [0.0, 1.0]


def test_no_frame_is_taken_after_the_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 16, 8)
    with pytest.raises(UserError, match="end at 1.88 s, before 9.00 s"):
        load_video(path, image_size=32, times=[0.0, 9.0])


def test_a_damaged_beginning_is_named_by_where_it_ends(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 160, 8, gop=16)
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 8
    data[begin : begin + len(data) // 4] = bytes(len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"no frame can be decoded before \d+\.\d\d s, for 0\.50 s; the file is damaged"
    ):
        load_video(path, image_size=32, times=[0.5, 1.0, 1.5, 18.0])


@pytest.mark.parametrize("start, end", [(2.5, None), (1.0, 1.0), (-1.0, 1.0), (math.nan, None), (0.0, math.nan)])
def test_clip_outside_the_file(tmp_path: Path, start: float, end: float | None) -> None:
    path = write_video(tmp_path / "a.mp4", 16, 8)
    with pytest.raises(UserError) as error:
        load_video(path, image_size=32, policy=POLICY, start=start, end=end)
    check_one_line(error, path, "no video between")


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 4)
    monkeypatch.setattr(picker, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(UserError) as error:
        load_video(path, image_size=32, policy=POLICY)
    check_one_line(error, path, "too large")
    monkeypatch.setattr(picker, "MAX_FRAME_PIXELS", 10**8)
    monkeypatch.setattr(picker, "MAX_SECONDS", 0.1)
    with pytest.raises(UserError) as error:
        load_video(path, image_size=32, policy=POLICY)
    check_one_line(error, path, "too long")
    assert len(load_video(path, image_size=32, policy=POLICY, start=0.1, end=0.2).times) == 8
    photo = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(photo)
    monkeypatch.setattr(image, "MAX_PIXELS", 1000)
    with pytest.raises(UserError) as error:
        load_image(photo, 32)
    check_one_line(error, photo, "too large")


def cut_jpeg(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])
    return path


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path, ["no such file"]),
        (text_file, ["not an image"]),
        (cut_jpeg, ["cannot read the image"]),
        (empty, ["empty"]),
        (folder, ["folder"]),
        (noise, ["not an image"]),
    ],
)
def test_bad_image(tmp_path: Path, make: Callable[[Path], Path], words: list[str]) -> None:
    path = make(tmp_path / "photo.jpg")
    with pytest.raises(UserError) as error:
        load_image(path, 32)
    check_one_line(error, path, *words)
