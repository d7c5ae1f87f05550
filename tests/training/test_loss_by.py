"""The loss by source and language: parts of the step's own loss, and nothing where it is not asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.models.losses import chunked_cross_entropy
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import read_metrics
from tests.training.test_loop import small_stage

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_gradient_by_a_weight_is_its_tokens_loss():
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(2, 7, 5)).astype(np.float32), random.normal(size=(5, 11)).astype(np.float32)
    targets = random.integers(0, 11, (2, 7))
    weights = random.choice([0.0, 0.5, 1.0], (2, 7)).astype(np.float32)
    each = jax.grad(lambda w: chunked_cross_entropy(hidden, head, targets, w, chunk=3)[0])(jnp.asarray(weights))
    logits = jax.nn.log_softmax(hidden @ head)
    expected = -np.take_along_axis(np.asarray(logits), targets[..., None], axis=-1)[..., 0] * (weights != 0)
    np.testing.assert_allclose(each, expected, atol=1e-5)


@pytest.mark.slow
def test_sources_losses_are_parts_of_the_steps(corpus, tmp_path):
    (tmp_path / "other.jsonl").write_text((corpus / "stage4.jsonl").read_text())
    sources = (str(corpus / "stage4.jsonl"), str(tmp_path / "other.jsonl"))
    keys = {"data.train": sources, "data.media_root": str(corpus), "train.log_every": 2}
    keys |= {"data.packs_per_batch": 2, "train.accumulate": 2}
    found = {}
    for name in ("with", "without"):
        told: list[str] = []
        stage = small_stage("stage4_instruct", corpus, 4, **keys, **{"train.loss_by_source": name == "with"})
        train(stage, tmp_path / name, tell=told.append)
        found[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        assert any(" loss " in line.partition("useful")[2] for line in told) == (name == "with")
    assert [line["loss"] for line in found["with"]] == [line["loss"] for line in found["without"]]
    assert [("losses" in line) for line in found["with"]] == [False, True, False, True]
    assert not any("losses" in line for line in found["without"])
    for line in found["with"][1::2]:
        losses = line["losses"]
        assert set(losses) == set(line["sources"]) and len(losses) >= 2
        assert min(losses.values()) <= line["loss"] + 1e-4 and line["loss"] <= max(losses.values()) + 1e-4
