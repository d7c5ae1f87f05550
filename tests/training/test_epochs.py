"""Epochs in place of steps: as many as it takes to draw the samples so often, however they are packed."""

import json
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.config import StageConfig, frames_per_group, tokens_per_group
from kangaroo_jax.data.batches.feed import LaneFeed, RecipeMaker
from kangaroo_jax.data.batches.loader import open_mixture
from kangaroo_jax.data.batches.mixture import Lane
from kangaroo_jax.data.batches.packing import Packer, PackItem
from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.training import loop
from kangaroo_jax.training.epochs import draws_a_step, with_epochs
from tests.training.test_loop import small_stage

SAMPLES = 60


@pytest.fixture(scope="module")
def stage(corpus, tmp_path_factory) -> StageConfig:
    """A stage of texts of 1 to 40 words, which are packed in rows of 1,024 tokens."""
    path, random = tmp_path_factory.mktemp("texts") / "texts.jsonl", np.random.default_rng(0)
    rows = []
    for number, words in enumerate(random.geometric(0.08, SAMPLES).clip(1, 40)):
        turns = [{"from": "human", "value": "red"}, {"from": "gpt", "value": " ".join(["green"] * int(words))}]
        rows.append(json.dumps({"id": f"{number}", "conversations": turns}) + "\n")
    path.write_text("".join(rows))
    keys = {"data.train": (str(path),), "data.packing_bins": 8, "data.packs_per_batch": 3, "data.frames_per_pack": 0}
    keys |= dict.fromkeys(("data.tokens_per_pack", "data.max_sample_tokens"), 1024)
    return StageConfig.from_config(small_stage("stage4_instruct", corpus, **keys, **{"train.epochs": 50.0}))


def used_in_rows(stage: StageConfig, rows: int) -> list[int]:
    """Samples in the first rows of a lane."""
    data, sizes = stage.data, (frames_per_group(stage.model), tokens_per_group(stage.model, stage.data.image_size))
    mixture, _ = open_mixture(data, stage.seed)
    maker = RecipeMaker(mixture, load_tokenizer(data.tokenizer), data, *sizes, ThreadDecoder(0))
    packer = Packer(data.tokens_per_pack, data.frames_per_pack, data.packing_bins)
    feed, found = LaneFeed(Lane(mixture, 0), maker, packer, None, 1), []
    while len(found) < rows:
        index, recipe = feed.take()
        if (row := packer.add(PackItem(index, recipe))) is not None:
            found.append(len(row))
    return found


def test_steps_draw_the_samples_as_often_as_is_said(stage):
    told: list[str] = []
    tokenizer = load_tokenizer(stage.data.tokenizer)
    steps = with_epochs(stage, tokenizer, told.append).train.steps
    used = used_in_rows(stage, 400)
    assert np.mean(used[:6]) < 0.8 * np.mean(used)  # rows are begun with the largest, so the first ones tell too little
    assert steps == pytest.approx(50 * SAMPLES / (3 * np.mean(used)), rel=0.05)
    drawn, samples = draws_a_step(stage, tokenizer)
    assert samples == SAMPLES and told == [
        f"stage4_instruct: 50 epochs of 60 samples are {steps} steps of {drawn:.1f} samples"
    ]


def test_a_run_takes_its_epochs_and_without_them_its_steps(stage, corpus, tmp_path, monkeypatch):
    def prepare(given, *_):
        raise UserError(f"{given.train.steps} steps")

    monkeypatch.setattr(loop, "prepare", prepare)
    config = small_stage("stage4_instruct", corpus, 7)
    with pytest.raises(UserError, match="^7 steps"):
        loop.train(config, tmp_path, tell=lambda line: None)
    config.data.update(train=stage.data.train, packing_bins=0)  # a row for each sample
    config.train.epochs = 1.5
    with pytest.raises(UserError, match="^90 steps"):
        loop.train(config, tmp_path, tell=lambda line: None)
    config.train.epochs = -1.0
    with pytest.raises(UserError, match=r"config.train.epochs is -1.0: must be at least 0"):
        loop.train(config, tmp_path, tell=lambda line: None)


def test_samples_of_which_none_can_be_used_are_one_line(stage, tmp_path: Path):
    turns = [{"from": "human", "value": "<video>\nred"}, {"from": "gpt", "value": "green"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a", "video": "none.mp4", "conversations": turns}) + "\n")
    gone = stage.changed({"data.train": (str(tmp_path / "x.jsonl"),)})
    with pytest.raises(UserError, match=r"^none of the 1 samples can be used, the last because: .*none.mp4") as error:
        with_epochs(gone, load_tokenizer(stage.data.tokenizer), lambda line: None)
    assert "\n" not in str(error.value)
