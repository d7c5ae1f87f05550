"""Embeddings by our own vision encoder: what they are, what a fault in a batch costs, what the choice makes of them."""

import base64
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.curation import duplicates
from kangaroo_jax.curation.curate import Options, curate, plain_config, select_again
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.curation.engine.run import run_local
from kangaroo_jax.curation.engine.run_shard import ShardPlan
from kangaroo_jax.curation.engine.shards import all_scores, make_shards
from kangaroo_jax.curation.stages import BY_NAME, enabled
from kangaroo_jax.curation.stages.embedding import packed, unpacked, with_identity
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState
from tests.curation.rows import rows_of
from tests.curation.scoring.clips import breaking_batch_job


@pytest.fixture(scope="module")
def model(make_micro_config, make_random_model):
    """A config and a model of random weights."""
    config = make_micro_config()
    return config, make_random_model(config.model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model) -> Path:
    """What training would have written of it."""
    config, weights = model
    folder = tmp_path_factory.mktemp("embedding") / "stage1"
    params = abstract_model(ModelConfig.from_config(config.model)).flatten(weights)
    state = TrainState(jnp.int32(3), params, {}, {})
    checkpoints = Checkpoints(folder, state)
    checkpoints.save(state, b"{}", config.to_dict())
    checkpoints.close()
    return folder


def test_vectors_are_the_encoders_and_the_choice_uses_them(clips, config, checkpoint, model, tmp_path, capsys, tree):
    config.embedding.update(checkpoint=str(checkpoint), batch=4)
    run = Options(str(tmp_path / "out"), (str(clips),))
    curate(run, config)
    rows = list(all_scores(tmp_path / "out"))
    vectors = {}
    encode = jax.jit(lambda frames: model[1].vision(frames))
    for row in rows:
        frames = [load_image(tmp_path / "out/keyframes" / row["id"] / f"{k}.jpg", 16) for k in range(5)]
        means = np.asarray(encode(np.stack(frames))).mean(1)
        wanted = (means / np.linalg.norm(means, axis=1, keepdims=True)).mean(0)
        found = vectors[row["id"]] = unpacked(row["embedding"]["vector"]).astype(np.float64)
        assert found.shape == (24,) and np.abs(found).max() == 127
        np.testing.assert_allclose(found / 127, wanted / np.abs(wanted).max(), atol=0.5 / 127 + 1e-4)
    before = tree(tmp_path / "out")
    capsys.readouterr()
    curate(run, config)  # all is there: nothing is computed, and the bytes stay
    assert tree(tmp_path / "out") == before and "embedding" not in capsys.readouterr().out

    unit = np.stack([vectors[row["id"]] / np.linalg.norm(vectors[row["id"]]) for row in rows])
    cosines = np.sort((unit @ unit.T)[np.triu_indices(len(rows), 1)])
    config.select.duplicate_cosine = float((cosines[-1] + cosines[-2]) / 2)  # just the nearest two
    select_again(run, config)
    (dropped,) = rows_of(tmp_path / "out/dropped.jsonl")
    assert dropped["rule"] == "duplicate"


def test_a_clip_that_ends_the_process_costs_its_batch_nothing(clips, config, checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, clip in enumerate(sorted(clips.iterdir())):
        (folder / f"{'segv' if number == 2 else 'clip'}_{number}.mp4").symlink_to(clip)
    config.embedding.update(checkpoint=str(checkpoint), batch=8)
    plain = plain_config(config)
    plain["embedding"] = with_identity(plain["embedding"])
    stages = tuple(BY_NAME[name] for name in ("probe", "cuts", "keyframes", "embedding"))
    plan = ShardPlan(tmp_path / "out", stages, plain, breaking_batch_job)
    run_local(make_shards(read_inputs([str(folder)]), 64), plan, workers=1)
    failed = {row["id"]: row["failures"] for row in all_scores(plan.root) if row["failures"]}
    assert [(name[:4], failure) for name, failure in failed.items()] == [("segv", {"embedding": "crashed (SIGSEGV)"})]


def test_it_is_off_by_default_and_a_missing_checkpoint_is_one_line(config, clips, tmp_path):
    assert "embedding" not in {stage.name for stage in enabled(plain_config(config))}
    config.embedding.checkpoint = str(tmp_path / "none")
    with pytest.raises(UserError, match="no such checkpoint folder"):
        curate(Options(str(tmp_path / "out"), (str(clips),)), config)


def test_near_vectors_are_found_in_clusters_too(monkeypatch):
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((40, 64))
    vectors = np.repeat(middles, 5, axis=0) + 0.05 * rng.standard_normal((200, 64))
    rows = [
        {"probe": {"sha256": str(i)}, "start": 0, "end": 1, "item": str(i), "embedding": {"vector": packed(vector)}}
        for i, vector in enumerate(vectors)
    ]
    rows[7].pop("embedding")  # a clip that the stage failed on is like no other
    found = duplicates.groups(rows, most_bits=14, tables=2, least_cosine=0.95)
    assert found == [7 if i == 7 else i // 5 * 5 for i in range(200)]
    monkeypatch.setattr(duplicates, "_CLUSTER", 50)
    assert duplicates.groups(rows, most_bits=14, tables=2, least_cosine=0.95) == found
    assert duplicates.groups(rows, most_bits=14, tables=2) == list(range(200))


def test_packing_keeps_the_direction():
    vector = np.random.default_rng(0).standard_normal(300)
    assert len(base64.b64decode(packed(vector))) == 300
    found = unpacked(packed(vector)).astype(float)
    assert found @ vector / np.linalg.norm(found) / np.linalg.norm(vector) > 0.9999
    assert not unpacked(packed(np.zeros(4))).any()
