"""Hostile media start no program, hold nobody up and take no more memory than a medium may."""

import os
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.curation.stages.probe import probe as score
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.video import load_video, probe
from kangaroo_jax.errors import UserError

pytestmark = pytest.mark.alone
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
OTHERS = {
    "eps": EPS,
    "fli": b"\x00" * 4 + b"\x11\xaf" + b"\x00" * 200,
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
    "wmf": b"\xd7\xcd\xc6\x9a" + b"\x00" * 60,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_no_other_program_reads_an_image(kind: str, ending: str, tmp_path: Path, monkeypatch) -> None:
    """Ghostscript, which Pillow would start for a PostScript file of any name."""
    for name in ("gs", "gswin64c", "djpeg", "cjpeg"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho run >{tmp_path}/was_run\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(OTHERS[kind])
    with pytest.raises(UserError, match=rf"a\.{ending}: "):
        load_image(str(path), image_size=16)
    assert not (tmp_path / "was_run").exists()


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """What `work` raised; the test fails where it does not end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still at work after {seconds} s"
    return raised[0] if raised else None


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.png", "pipe::x.mp4@0+99", "pipe::x.png@0+99"])
def test_a_pipe_holds_nobody_up(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name.split("::")[0])
    path = str(tmp_path / name)
    read = (lambda: load_image(path, image_size=16)) if ".png" in name else (lambda: probe(path))
    assert isinstance(within(10, read), UserError)
    row = {"path": path, "kind": "image" if ".png" in name else "video"}
    assert isinstance(within(10, lambda: score(row, {}, tmp_path)), UserError)


def slow_animation(path: Path, frames: int, side: int) -> Path:
    """An APNG of tiny frames on a canvas that is large: little to read, much to compose."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    def control(number: int, size: int) -> bytes:
        numbers = (number, size, size, 0, 0)
        return chunk(b"fcTL", b"".join(n.to_bytes(4, "big") for n in numbers) + bytes([0, 1, 0, 10, 0, 0]))

    packer = zlib.compressobj(9)
    row = b"\0" * (side + 1)
    whole = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    parts += [chunk(b"acTL", frames.to_bytes(4, "big") + b"\0\0\0\0"), control(0, side), chunk(b"IDAT", whole)]
    pixel = zlib.compress(b"\0\xff")
    for i in range(1, frames):
        parts += [control(2 * i - 1, 1), chunk(b"fdAT", (2 * i).to_bytes(4, "big") + pixel)]
    path.write_bytes(b"".join([*parts, chunk(b"IEND", b"")]))
    return path


@pytest.mark.parametrize("read", ["probe", "load_video"])
def test_an_animation_ends_at_its_limit_or_is_refused(read: str, tmp_path: Path) -> None:
    path = str(slow_animation(tmp_path / "a.png", 1000, 4000))
    call = {
        "probe": lambda: probe(path, "video", seconds=1.0),
        "load_video": lambda: load_video(path, image_size=16, times=[90.0], seconds=1.0),
    }[read]
    assert isinstance(within(20, call), UserError)


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "CMYK"])
def test_an_image_is_made_small_before_it_is_computed_with(mode: str, tmp_path: Path) -> None:
    """Numbers of numpy's: one of float64 for each pixel were 8 bytes, and several of them at once more."""
    side = 4000
    path = tmp_path / "a.png" if mode != "CMYK" else tmp_path / "a.tif"
    if mode == "I;16":
        Image.fromarray(np.full((side, side), 30_000, np.uint16)).save(path)
    else:
        Image.new(mode, (side, side)).save(path)
    tracemalloc.start()
    try:
        load_image(str(path), image_size=32)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 7 * side * side
