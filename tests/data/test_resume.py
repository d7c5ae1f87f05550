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

from kangaroo_jax.data.batches.loader import merge_states
from kangaroo_jax.data.tokenizer import Tokenizer, train_sentencepiece
from tests.data.media import write_video

pytestmark = pytest.mark.alone

ROWS = 12


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


def keep_last_state(folder: Path, hosts: int, batches: int) -> int:
    """The last batch whose state all hosts have kept becomes the run's state, as a checkpoint would.

    Returns its number; 0 if there is none since the last time.
    """
    for batch in range(batches, 0, -1):
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


def run_with_kills(folder: Path, setups: list[tuple[int, int]], rng: random.Random, batches: int) -> list[int]:
    """Run to the end with a kill at a random moment of each setup (hosts, workers) but the last.

    One kill of four comes while the loader is being opened or restored, the others some batches later. Returns the
    batch from which each start went on.
    """
    went_on = []
    for i, (hosts, workers) in enumerate(setups):
        state = folder / "state.json"
        went_on.append(json.loads(state.read_text())["batch"] if state.exists() else 0)
        processes = start(folder, hosts, workers, batches)
        try:
            if i < len(setups) - 1:
                wait_for_kill(folder, processes, rng)
                for process in rng.sample(processes, len(processes)):
                    process.send_signal(signal.SIGKILL)
            codes = [process.wait(timeout=600) for process in processes]
            assert codes == [0] * hosts if i == len(setups) - 1 else -signal.SIGKILL in codes
        finally:
            for process in processes:
                process.kill()
        keep_last_state(folder, hosts, batches)
    return went_on


def wait_for_kill(folder: Path, processes: list[subprocess.Popen], rng: random.Random) -> None:
    """Until a random moment after the start, or after one to three batches of a random host."""
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0.0, 6.0))
        return
    target, host = rng.randint(1, 3), rng.randrange(len(processes))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        if len(list((folder / "states").glob(f"*-{host}.json"))) >= target:
            break
        time.sleep(0.005)
    time.sleep(rng.random() * 0.05)


def uninterrupted(corpus: Path, folder: Path, batches: int) -> dict[tuple[int, int], set[str]]:
    """The rows of a run that nothing stopped."""
    new_run(corpus, folder)
    (process,) = start(folder, 1, 0, batches)
    assert process.wait(timeout=600) == 0
    rows = rows_of(folder)
    assert len(rows) == batches * ROWS and all(len(digests) == 1 for digests in rows.values())
    return rows


@pytest.mark.parametrize(
    "kills", [2, pytest.param(int(os.environ.get("KANGAROO_TEST_KILLS", "6")), marks=pytest.mark.slow)]
)
def test_killed_runs_give_the_same_batches(corpus: Path, tmp_path: Path, tokenizer: Tokenizer, kills: int) -> None:
    """Every start has other hosts and decoding processes; each row of each batch is ever written with one content."""
    folder, rng, batches = new_run(corpus, tmp_path / "run"), random.Random(kills), 4 + 4 * kills
    hosts, workers = ((1, 2), (0,)) if kills == 2 else ((1, 2, 3, 4), (0, 1, 2, 4))
    setups = [(rng.choice(hosts), rng.choice(workers)) for _ in range(kills + 1)]
    went_on = run_with_kills(folder, setups, rng, batches)
    print(f"{kills} kills; (hosts, workers) and the batch it began at: {list(zip(setups, went_on, strict=True))}")
    assert went_on == sorted(went_on) and went_on[-1] > 0
    assert rows_of(folder) == uninterrupted(corpus, tmp_path / "whole", batches)
