"""Media told by their bytes, images of unusual depth and size, files that are none, and what `data check` says."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kangaroo_jax.data.audit import check as data_check
from kangaroo_jax.data.media import animation, image
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.media.image import letterbox, load_image
from kangaroo_jax.data.media.kinds import kind_of
from kangaroo_jax.data.media.video import MediaRef, folder_of_frames, load_video, probe
from kangaroo_jax.errors import UserError
from tests.data.media import numbered_frame, read_number, write_video


def moving(path: Path, form: str, count: int = 6) -> Path:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(count)]
    how = {} if form == "GIF" else {"lossless": True}
    frames[0].save(path, form, save_all=True, append_images=frames[1:], duration=100, **how)
    return path


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF"])
@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.webp", "a"])
def test_animations_whatever_their_ending(tmp_path: Path, form: str, name: str) -> None:
    path = moving(tmp_path / name, form)
    assert kind_of(path.read_bytes()) == "animation"
    assert [read_number(x) for x in load_video(path, image_size=96, times=[0.0, 0.25, 0.5]).pixels] == [0, 2, 5]
    assert probe(path, "video").seconds == pytest.approx(0.6, abs=0.01)
    assert probe(path).kind == ("image" if name in ("a.gif", "a.webp") else "video")


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.jpg", "a"])
def test_videos_whatever_their_ending(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(write_video(tmp_path / "a.mp4", 8, 8).read_bytes())
    assert kind_of(path.read_bytes()) == "video" and probe(path).kind == "video"
    assert read_number(load_video(path, image_size=48, times=[0.5]).pixels[0]) == 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("name", ["a", "a.mp4"])
def test_images_whatever_their_ending(tmp_path: Path, form: str, name: str) -> None:
    try:
        Image.fromarray(numbered_frame(5)).save(tmp_path / name, form)
    except (KeyError, OSError):
        pytest.skip(f"Pillow writes no {form} here")
    assert probe(tmp_path / name).kind == "image" and read_number(load_image(tmp_path / name, 48)) == 5


@pytest.mark.parametrize("head", [b"", b"hello", b"\0" * 300, b"RIFF....WAVE"])
def test_other_bytes_are_no_kind(head: bytes) -> None:
    assert kind_of(head) is None


@pytest.mark.parametrize("mark", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_pillow_reads_named_formats_alone(tmp_path: Path, mark: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(mark + b"%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="not an image"):
        load_image(path, 32)


RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)


@pytest.mark.parametrize(
    "values", [(RAMP * 65535).astype(np.uint16), RAMP.astype(np.float32), (RAMP * 255).astype(np.float32),
               (RAMP * 255).astype(np.int32), (RAMP * 65535).astype(np.int32), (RAMP * 2e9).astype(np.int32)],
    ids=["16 bit", "float to 1", "float to 255", "int to 255", "int to 65535", "int"],
)  # fmt: skip
def test_deep_greys_have_their_brightness(tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    shown = load_image(path, 64)
    assert np.abs(shown[..., 0] - RAMP * 255).max() <= 1
    monkeypatch.setattr(image, "_STRIP", 64 * 5)  # strips give the same
    np.testing.assert_array_equal(load_image(path, 64), shown)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "RGB"])
def test_strips_give_the_bytes_of_the_whole(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 4), np.uint8)
    picture = Image.fromarray(pixels, "RGBA").convert("RGB" if mode in ("P", "CMYK") else mode).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path, **({"transparency": 3} if mode == "P" else {}))
    whole = load_image(path, 32)
    monkeypatch.setattr(image, "_STRIP", 70 * 7)
    np.testing.assert_array_equal(load_image(path, 32), whole)
    monkeypatch.setattr(image, "_WHOLE", 1000)
    monkeypatch.setattr(image, "_STRIP", 70 * 4)
    assert np.abs(load_image(path, 8).astype(int) - load_image(path, 8)).max() == 0


def test_images_up_to_the_stated_size(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000), 1).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 32)[16].min() == 255
    Image.new("1", (20_000, 9_000)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="too large an image"):
        load_image(tmp_path / "b.png", 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_images_are_turned_too(tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png"):
        Image.fromarray(numbered_frame(5, 960, 480)).save(tmp_path / name, exif=exif)
        plain = load_image(tmp_path / name, 48).astype(int)
        with Image.open(tmp_path / name) as opened:
            assert (plain == letterbox(ImageOps.exif_transpose(opened), 48)).all()
        monkeypatch.setattr(image, "_WHOLE", 1000)
        assert np.abs(load_image(tmp_path / name, 48) - plain).mean() < 6
        monkeypatch.undo()


def chunk(kind: bytes, body: bytes, check: int | None = None) -> bytes:
    found = zlib.crc32(kind + body) if check is None else check
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", found)


@pytest.mark.parametrize(
    "make",
    [
        lambda: chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
        lambda: chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
        lambda: chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
        lambda: chunk(b"tEXt", b"a\0" + b"x" * 3_000_000),
        lambda: chunk(b"tEXt", b"a\0b", check=1),
        lambda: chunk(b"zTXt", b"a\0\0broken"),
        lambda: chunk(b"gAMA", b"\0\0\xb1\x8f", check=1),
        lambda: chunk(b"prVt", b"a", check=1),
        lambda: chunk(b"sRGB", b""),
        lambda: chunk(b"eXIf", b"no EXIF"),
    ],
    ids=["zTXt", "iTXt", "iCCP", "tEXt", "wrong sum", "broken", "wrong sum 2", "private", "short", "no EXIF"],
)
def test_a_png_is_read_whatever_its_texts_are(tmp_path: Path, make: Callable[[], bytes]) -> None:
    out = io.BytesIO()
    Image.fromarray(numbered_frame(5)).save(out, "PNG")
    png, path = out.getvalue(), tmp_path / "a.png"
    path.write_bytes(png[:33] + make() + png[33:])
    assert read_number(load_image(path, 48)) == 5


def test_a_frame_with_side_data_of_a_new_kind_is_shown(tmp_path: Path) -> None:
    Image.fromarray(numbered_frame(5)).save(tmp_path / "a.tiff")  # FFmpeg hands its EXIF on with the frame
    assert read_number(load_video(tmp_path / "a.tiff", image_size=48, times=[0.0]).pixels[0]) == 5


# ----------------------------------------------------------------------------- files that are none


@pytest.mark.parametrize("name", ["{}", "{}::x.mp4@0+99", "{}::x.png@0+99"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    decoder = ThreadDecoder(0, 3.0)
    path = name.format(tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe, a device or a socket"):
        decoder.probe(path, kind)
    assert "a pipe, a device" in str(decoder.decode([MediaRef(kind, path, (0.0,))], 32)[0])


def test_animations_have_a_deadline_and_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = moving(tmp_path / "a.webp", "WEBP")
    for call in (lambda: probe(path, "video", 0.0), lambda: load_video(path, image_size=8, times=[0.3], seconds=0.0)):
        with pytest.raises(UserError, match="not decoded within 0 s"):
            call()
    monkeypatch.setattr(animation, "MAX_FRAME_PIXELS", 6 * 96 * 96 - 1)
    with pytest.raises(UserError, match="6 frames of 96x96 pixels are too many"):
        probe(path, "video")


# ------------------------------------------------------------------------------------ data check


def test_hidden_files_and_notes_are_passed_over(tmp_path: Path) -> None:
    Image.fromarray(numbered_frame(0)).save(tmp_path / "f0.png")
    write_video(tmp_path / "v.mp4", 2)
    (tmp_path / "no_ending").write_bytes((tmp_path / "v.mp4").read_bytes())
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("._f0.png", ".DS_Store", "a.txt", "a.json", "a.srt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    said: list[str] = []
    media = data_check.media_in([str(tmp_path)], said.append)
    kinds = {Path(path).name: kind for path, kind in media}
    assert kinds == {"f0.png": "image", "v.mp4": "video", "no_ending": "video", "empty.mp4": "video"}
    assert said == [f"{tmp_path}: 5 hidden files and files of other kinds are passed over"]
    assert folder_of_frames(tmp_path) == (str(tmp_path / "f0.png"),)


def test_a_missing_file_is_named_once(tmp_path: Path) -> None:
    said: list[str] = []
    media = {(str(tmp_path / "none.mp4"), "video"): "1"}
    assert data_check.check_media(media, tmp_path / "r.jsonl", workers=1, seconds=20, tell=said.append) == 1
    assert said[0] == f"BAD {tmp_path}/none.mp4: no such file"
    assert json.loads((tmp_path / "r.jsonl").read_text())["problems"]
