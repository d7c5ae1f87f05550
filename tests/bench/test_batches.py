"""`kangaroo bench batches` measures the batches that training would have."""

import json

import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.training.loop import open_loader, open_tokenizer
from tests.data.media import write_video


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict[str, str]:
    """Keys of a config for five videos, one of which is damaged, and a tokenizer."""
    folder = tmp_path_factory.mktemp("mine")
    lines = []
    for i in range(5):
        write_video(folder / f"{i}.mp4", 8 + 4 * i, 4)
        turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": f"It is {i}."}]
        lines.append(json.dumps({"id": str(i), "video": f"{i}.mp4", "conversations": turns}))
    (folder / "4.mp4").write_bytes((folder / "3.mp4").read_bytes()[:200])
    (folder / "mine.jsonl").write_text("\n".join(lines))
    train_sentencepiece(["user assistant system What is it? It is 0 1 2 3 4."] * 40, folder / "t.model", 330)
    return {"data.train": str(folder / "mine.jsonl"), "data.tokenizer": str(folder / "t.model")}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_they_are_those_of_training(flags, workers, capsys):
    flags = flags | {"data.num_workers": str(workers), "data.packs_per_batch": "2", "data.tokens_per_pack": "512"}
    words = [f"--config.{key}={value}" for key, value in flags.items()]
    assert cli.main(["bench", "batches", "--config=stage4_instruct:tiny", "--batches=3", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    changes = {"data.train": (flags["data.train"],), "data.tokenizer": flags["data.tokenizer"]}
    config = StageConfig.load("stage4_instruct:tiny").changed(
        changes | {"data.packs_per_batch": 2, "data.tokens_per_pack": 512}
    )
    loader = open_loader(config, open_tokenizer(config), Ledger(), range(2))
    measured = [next(loader)[1] for _ in range(4)][1:]
    assert found["useful_tokens"] == pytest.approx(sum(batch.tokens for batch in measured) / (3 * 2 * 512), abs=1e-4)
    frames = sum(batch.frames for batch in measured)
    assert found["useful_frames"] == pytest.approx(frames / (3 * 2 * config.data.frames_per_pack), abs=1e-4)
    assert frames and found["samples_skipped"] == measured[-1].skipped > 0
    assert found["seconds_a_batch"] <= 3 * frames / found["frames_a_second"]
    if workers:
        assert "frames_a_cpu" not in found
    else:
        speed, busy = found["frames_a_cpu"], found["cpus_busy"]
        rounding = 0.05 * busy + 0.005 * speed + 0.1
        assert speed * busy == pytest.approx(found["frames_a_second"], abs=rounding)


def test_what_is_missing_is_one_line(flags, capsys):
    assert cli.main(["bench", "batches", f"--config.data.train={flags['data.train']}"]) == 2
    error = capsys.readouterr().err
    assert "config.data.tokenizer is empty" in error and error.count("\n") == 1
