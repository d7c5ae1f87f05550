"""The one check of a stage's config before anything runs."""

import math

import pytest

from kangaroo_jax.config import STAGES, StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.check import check_config, check_trainable

BAD = [
    ("train.steps", 0, "config.train.steps is 0: must be at least 1"),
    ("train.log_every", 0, "at least 1"),
    ("train.checkpoint_every", 0, "at least 1"),
    ("train.keep_checkpoints", -1, "at least 0"),
    ("train.on_nonfinite", "skp", "one of stop, skip .did you mean 'skip'"),
    ("train.lost_seconds", 0.0, "must be above 0"),
    ("train.profile", (5, 2), "the first and the last step"),
    ("data.packs_per_batch", 0, "at least 1"),
    ("data.fps", math.nan, "config.data.fps is nan: must be a finite number"),
    ("optimizer.learning_rate", math.nan, "must be a finite number"),
    ("optimizer.learning_rate", -1.0, "at least 0"),
    ("optimizer.warmup_fraction", 2.0, "is a share, from 0 to 1"),
    ("optimizer.b2", 1.0, "below 1"),
    ("optimizer.clip_norm", -1.0, "at least 0"),
    ("optimizer.kind", "adam", "one of adamw, adafactor, muon"),
    ("optimizer.frozen_dtype", "half", "one of float32, bfloat16, float16"),
    ("optimizer.trainable", (("(", 1.0),), "no regular expression"),
    ("optimizer.trainable", (".*", 1.0), "every rule is a pair"),
    ("optimizer.trainable", ((".*", math.inf),), "must be a number at least 0, or None"),
    ("model.dtype", "half", "one of float32"),
    ("model.llm.remat", "fulll", "did you mean 'full'"),
    ("model.patchify.kernel", (0, 2, 2), "frames, rows and columns, each at least 1"),
    ("model.patchify.kernel", (2, 2), r"config.model.patchify.kernel is \(2, 2\): frames, rows and columns"),
    ("data.min_frames", 65, "config.data.min_frames is 65: must be at most data.max_frames"),
    ("data.long_min_frames", 999, "must be at most data.long_max_frames"),
    ("model.llm.kv_heads", 3, "config.model.llm.heads 4 must be a multiple of kv_heads, 3"),
    ("model.vision.heads", 5, "config.model.vision.width 96 must be a multiple of its heads, 5"),
    ("allow_changes", ("llm.rope_theta",), "which is no key .did you mean 'model.llm.rope_theta'"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_a_value_that_cannot_be_meant_is_one_line_that_names_its_key(key, value, message):
    config = StageConfig.load("stage4_instruct:tiny").changed({key: value})
    with pytest.raises(UserError, match=message) as error:
        check_config(config)
    assert "\n" not in str(error.value) and key.split(".")[-1] in str(error.value)


def test_every_stage_passes_and_something_must_train():
    for name in (*STAGES, "hour_video"):
        for preset in ("kangaroo_8b", "base_100m", "tiny"):
            check_config(StageConfig.load(f"{name}:{preset}"))
    check_config(StageConfig.load("stage0_text_warmup:tiny"))
    config = StageConfig.load("stage4_instruct:tiny")
    shapes = abstract_model(config.model).shapes
    check_trainable(config, shapes)
    for rules, message in (
        (((".*", None),), "leaves nothing to train"),
        (((".*", 0.0),), "leaves nothing to train"),
        ((("vision/.*", 1.0),), "no rule of config.optimizer.trainable matches the parameter"),
    ):
        with pytest.raises(UserError, match=message):
            check_trainable(config.changed({"optimizer.trainable": rules}), shapes)
