"""Runs that are killed for real go on with the very batches of a run that was not, on any number of hosts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kangaroo_jax.data.loader import merge_states
from kangaroo_jax.data.tokenizer import Tokenizer, train_sentencepiece
from tests.data.media import write_video

BATCHES, ROWS = 10, 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, media: Path) -> Path:
    """Three sources of text, photos and videos, one video of which is cut short, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    cut = write_video(folder / "cut.mp4", 20, 4, options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * 0.7)])
    rng = random.Random(1)
    for source, count in (("short", 40), ("long", 25), ("text", 30)):
        lines = []
        for i in range(count):
            name = {"short": rng.choice(["2s.mp4", "photo.jpg"]), "long": "20s.mp4", "text": ""}[source]
            path = str(cut) if source == "short" and i == 3 else str(media / name)
            kind = "image" if name.endswith("jpg") else "video"
            item = {"id": f"{source}{i}"} | ({kind: path} if name else {})
            ask = (f"<{kind}>\n" if name else "") + "What moves first?" * rng.randint(1, 3)
            item["conversations"] = [{"from": "human", "value": ask}, {"from": "gpt", "value": f"number {i}"}]
            lines.append(json.dumps(item))
        (folder / f"{source}.jsonl").write_text("\n".join(lines))
    texts = ["user assistant system What moves first? number 0123456789"] * 40
    train_sentencepiece(texts, folder / "tokenizer.model", 290)
    data = {"min_frames": 4, "max_frames": 8, "long_seconds": 10.0, "long_min_frames": 12, "long_max_frames": 16}
    data |= {"tokens_per_pack": 256, "frames_per_pack": 24, "packs_per_batch": ROWS, "packing_bins": 2, "cache_mib": 0}
    data |= {"train": [str(folder / f"{n}.jsonl") for n in ("short%50", "long", "text%200")], "image_size": 32}
    data["train"] = [f"{folder}/short.jsonl%50", f"{folder}/long.jsonl", f"{folder}/text.jsonl%200"]
    (folder / "config.json").write_text(json.dumps({"data": data | {"weights": [2, 1, 0.5]}, "seed": 3}))
    return folder


def new_run(corpus: Path, folder: Path) -> Path:
    (folder / "states").mkdir(parents=True)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(corpus / name, folder / name)
    return folder


def start(folder: Path, hosts: int, workers: int, batches: int) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "tests.data.resume_host", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return [
        subprocess.Popen(
            [*command, *map(str, (host, hosts, batches, workers))], env=environment, stdout=subprocess.PIPE
        )
        for host in range(hosts)
    ]


def rows_of(folder: Path) -> dict[tuple[int, int], set[str]]:
    """All digests that were ever written of each row of each batch."""
    rows: dict[tuple[int, int], set[str]] = {}
    for file in folder.glob("rows-*.txt"):
        for line in file.read_text().splitlines():
            parts = line.split()
            if len(parts) >= 3 and len(parts[2]) == 24:  # a line cut off by the kill
                rows.setdefault((int(parts[0]), int(parts[1])), set()).add(parts[2])
    return rows


def keep_last_state(folder: Path, hosts: int) -> int:
    """The last batch whose state all hosts have kept becomes the run's state, as a checkpoint would."""
    for batch in range(BATCHES, 0, -1):
        files = [folder / "states" / f"{batch}-{host}.json" for host in range(hosts)]
        if all(file.exists() for file in files):
            state = merge_states([file.read_bytes() for file in files])
            (folder / "state.json").write_text(json.dumps({"batch": batch, "state": state.decode()}))
            break
    else:
        batch = 0
    for file in (folder / "states").iterdir():
        file.unlink()
    return batch


def run_with_kills(folder: Path, setups: list[tuple[int, int]], rng: random.Random) -> int:
    """Run to the end with a kill after a random number of batches in each setup (hosts, workers) but the last."""
    kills = 0
    for i, (hosts, workers) in enumerate(setups):
        processes = start(folder, hosts, workers, BATCHES)
        try:
            if i < len(setups) - 1:
                target = rng.randint(1, 3)
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline and any(p.poll() is None for p in processes):
                    if len(list((folder / "states").glob("*-0.json"))) >= target:
                        break
                    time.sleep(0.005)
                time.sleep(rng.random() * 0.05)
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                kills += 1
            for process in processes:
                process.wait(timeout=240)
        finally:
            for process in processes:
                process.kill()
        keep_last_state(folder, hosts)
    return kills


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict:
    folder = new_run(corpus, tmp_path_factory.mktemp("runs") / "whole")
    (process,) = start(folder, 1, 0, BATCHES)
    assert process.wait(timeout=240) == 0
    rows = rows_of(folder)
    assert len(rows) == BATCHES * ROWS and all(len(digests) == 1 for digests in rows.values())
    return rows


@pytest.mark.parametrize(
    "setups",
    [
        [(1, 0), (2, 0), (1, 0)],
        pytest.param([(4, 0), (1, 2), (3, 0), (2, 1), (1, 4)], marks=pytest.mark.slow),
    ],
    ids=["two kills", "four kills"],
)
def test_killed_runs_give_the_same_batches(whole: dict, corpus: Path, tmp_path: Path, setups: list) -> None:
    folder = new_run(corpus, tmp_path / "run")
    assert run_with_kills(folder, setups, random.Random(len(setups))) == len(setups) - 1
    assert rows_of(folder) == whole
