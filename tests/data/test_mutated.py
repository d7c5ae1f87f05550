"""Broken files: nothing hangs, crashes or leaks, and whole samples arrive as if the others were not there."""

import collections
import hashlib
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.config import DataConfig
from kangaroo_jax.conventions import FIELDS
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import make_loader
from kangaroo_jax.data.tokenizer import Tokenizer
from tests.data.media import numbered_frame, write_audio, write_video

pytestmark = pytest.mark.alone

SECONDS_A_FILE = 20.0


def originals(folder: Path) -> list[bytes]:
    """Videos in several containers and codecs, and images."""
    made = [
        write_video(folder / "o.mp4", 40, 8, options={"movflags": "faststart"}),
        write_video(folder / "tail.mp4", 40, 8),
        write_video(folder / "o.mkv", 40, 8),
        write_video(folder / "o.ts", 40, 8),
        write_video(folder / "o.webm", 24, 8, codec="libvpx-vp9"),
        write_video(folder / "o.avi", 40, 8),
        write_video(folder / "one.mp4", 1, 8),
    ]
    for name in ("o.png", "o.jpg", "o.webp"):
        Image.fromarray(numbered_frame(5)).save(folder / name)
        made.append(folder / name)
    return [path.read_bytes() for path in made] + [write_audio(folder / "sound.mp4").read_bytes()]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """A truncation, bit flips, zeros, noise, a repeated part, a cut-out, or nothing at all."""
    kind, n = int(rng.integers(8)), len(data)
    at = int(rng.integers(n))
    size = int(rng.integers(1, max(2, n // 4)))
    changed = bytearray(data)
    if kind == 0:
        return data[:at]
    if kind == 1:
        for i in rng.integers(0, n, int(rng.integers(1, 40))):
            changed[i] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        changed[at : at + size] = bytes(min(size, n - at))
    elif kind == 3:
        changed[at : at + size] = rng.bytes(min(size, n - at))
    elif kind == 4:
        return data[: at + size] + data[at:]
    elif kind == 5:
        return data[:at] + data[at + size :]
    elif kind == 6:  # sizes and counts in headers become huge
        for i in rng.integers(0, min(n, 2000), 6):
            changed[i : i + 4] = b"\xff\xff\xff\x7f"
    else:
        return b""
    return bytes(changed)


def hostile(folder: Path) -> list[Path]:
    """Files that no mutation makes: without end, without bottom, of huge dimensions, no files at all."""
    write_video(folder / "part.ts", 24, 8)
    texts = {
        "live.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:3,\npart.ts\n",  # a stream that goes on for ever
        "loop.mp4": "ffconcat version 1.0\n" + "file part.ts\n" * 20_000,
        "self.mp4": "ffconcat version 1.0\nfile self.mp4\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    with av.open(str(folder / "wide.mov"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width = stream.height = 6500  # more than 8K
        stream.pix_fmt = "gray"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((6500, 6500), np.uint8), format="gray")))
        container.mux(stream.encode(None))
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return [folder / name for name in (*texts, "pipe.mp4", "zero.mp4", "wide.mov", "bomb.png", "missing.mp4")]


def long_video(path: Path, frames: int) -> Path:
    """A small and whole video of very many frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((24, 16), i % 200, np.uint8), format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def annotate(folder: Path, media: Path, mutants: int, rounds_of_healthy: int, frames: int) -> tuple[Path, Path]:
    """Healthy samples (one of them with very many `frames`) among mutants and hostile files; the healthy ones alone."""
    rng = np.random.default_rng(7)
    whole = originals(folder)
    endings = [".mp4", ".mkv", ".ts", ".webm", ".avi", ".png", ".jpg", ".webp", ".gif"]
    lines, healthy = [], []
    for i in range(mutants):
        ending = endings[int(rng.integers(len(endings)))]  # often the wrong one
        path = folder / f"m{i}{ending}"
        path.write_bytes(mutate(whole[int(rng.integers(len(whole)))], rng))
        kind = "image" if ending in (".png", ".jpg", ".webp") else "video"
        lines.append(record(f"bad{i}", kind, path, i))
    for i, path in enumerate(hostile(folder)):
        lines.append(record(f"hostile{i}", "image" if path.suffix == ".png" else "video", path, i))
    long_video(folder / "many.mp4", frames)
    for i in range(rounds_of_healthy):
        kind, path = [("video", media / "2s.mp4"), ("video", media / "5s.mp4"), ("image", media / "photo.jpg")][i % 3]
        healthy.append(record(f"good{i}", kind, folder / "many.mp4" if i == 0 else path, i))
    both = lines + healthy
    random.Random(0).shuffle(both)
    (folder / "both.jsonl").write_text("\n".join(both))
    (folder / "healthy.jsonl").write_text("\n".join(healthy))
    return folder / "both.jsonl", folder / "healthy.jsonl"


def record(name: str, kind: str, path: Path, i: int) -> str:
    talk = [{"from": "human", "value": f"<{kind}>\nWhat?"}, {"from": "gpt", "value": f"number {i}"}]
    return json.dumps({"id": name, kind: str(path), "conversations": talk})


def resident() -> float:
    """MiB of this process and its children."""
    total, mine = 0, os.getpid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == mine or int(entry.name) == mine:
                    total += int((entry / "statm").read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue
    return total * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def run(
    config: DataConfig, tokenizer: Tokenizer, ledger: Ledger, epochs: int
) -> tuple[dict[str, set[bytes]], list[float], float]:
    """The arrays that arrive of each sample, memory (MiB) after every epoch, and the longest wait for a batch (s).

    With one sample a row (`packing_bins=0`) and one row a batch, a batch is a sample.
    """
    loader = make_loader(config, tokenizer, frames_per_group=2, tokens_per_group=3, seed=1, ledger=ledger)
    samples = sum(1 for _ in open(config.train[0]))
    seen: dict[str, set[bytes]] = collections.defaultdict(set)
    memory, longest = [], 0.0
    for epoch in range(1, epochs + 1):
        while json.loads(loader.get_state())["lanes"]["0"]["next"] < epoch * samples:
            start = time.monotonic()
            batch, stats = next(loader)
            longest = max(longest, time.monotonic() - start)
            for name in stats.sample_ids:
                seen[name].add(hashlib.sha256(b"".join(getattr(batch, f).tobytes() for f in FIELDS)).digest())
        memory.append(resident())
    loader.close()
    return dict(seen), memory, longest


@pytest.mark.parametrize(
    "mutants, epochs, frames", [(36, 1, 5000), pytest.param(1000, 5, 100_000, marks=pytest.mark.slow)]
)
def test_mutated_media(
    tmp_path: Path, media: Path, data_config: DataConfig, tokenizer: Tokenizer, mutants: int, epochs: int, frames: int
) -> None:
    both, healthy = annotate(tmp_path, media, mutants, 12, frames)
    files = {entry["id"]: entry for entry in map(json.loads, both.read_text().splitlines())}
    data_config = replace(data_config, packing_bins=0, packs_per_batch=1, num_workers=2, decode_seconds=SECONDS_A_FILE)
    data_config = replace(data_config, train=(str(both),))
    seen, memory, longest = run(data_config, tokenizer, Ledger(tmp_path / "ledger.jsonl"), epochs)
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    names = {entry["id"] for entry in entries}
    late = sum("not decoded within" in entry["reason"] for entry in entries)
    crashed = sum("crashed" in entry["reason"] for entry in entries)
    print(
        f"{mutants} mutants: {len(seen)} samples arrive, {len(names)} in the ledger ({late} too slow, {crashed} "
        f"crashed a decoder), longest wait {longest:.1f} s, MiB {[round(m) for m in memory]}"
    )
    assert longest < 3 * SECONDS_A_FILE  # two workers, and one that is replaced
    # Every file ends as a sample, always the same, or as one line with a reason.
    assert len(entries) == len(names) and not names & seen.keys() and names | seen.keys() == files.keys()
    assert all(len(arrays) == 1 for arrays in seen.values())
    good = {name: arrays for name, arrays in seen.items() if name.startswith("good")}
    assert len(good) == 12 and not any(name.startswith("hostile") for name in seen) and len(names) > mutants // 4
    for entry in entries:
        path = files[entry["id"]].get("video") or files[entry["id"]]["image"]
        assert entry["path"] == path and path in entry["reason"] and "\n" not in entry["reason"]
    data_config = replace(data_config, train=(str(healthy),))
    alone, _, _ = run(data_config, tokenizer, Ledger(), 1)
    assert alone == good  # as if the others never existed
    if epochs > 2:
        assert max(memory[1:]) < 1.1 * memory[1]
