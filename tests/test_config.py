"""The sections of a stage's config as frozen dataclasses, and the ConfigDicts that users change."""

import dataclasses
from pathlib import Path

import pytest

from kangaroo_jax.checkpoints.reading import completed
from kangaroo_jax.config import PRESETS, ModelConfig, StageConfig, model_config, stage_config
from kangaroo_jax.config_files import load_config
from kangaroo_jax.errors import UserError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_becomes_its_dataclass_and_back(preset):
    config = stage_config(preset)
    stage = StageConfig.from_config(config)
    assert dataclasses.asdict(stage) == config.to_dict()
    assert hash(stage) == hash(StageConfig.from_config(stage_config(preset)))
    assert stage.model == ModelConfig.from_config(model_config(preset))


def test_what_a_stage_file_changes_arrives():
    stage = StageConfig.from_config(load_config("stage1_image_pretrain:kangaroo_8b"))
    assert not stage.model.patchify.enabled
    assert (stage.data.loss_on, stage.data.image_size) == ("caption", 224)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llm.widht", 3, r"config.model.llm: there is no key 'widht' \(did you mean 'width'\?\)"),
        ("llm.rope_scaling.base", 1.0, "config.model.llm.rope_scaling: there is no key 'base'"),
        ("vision.depth", None, "config.model.vision.depth is None: must be a whole number"),
        ("llm.depth", 2.5, "config.model.llm.depth is 2.5: must be a whole number"),
        ("scan", 1, "config.model.scan is 1: must be True or False"),
        ("llm.depth", True, "config.model.llm.depth is True: must be a whole number"),
        ("vision", "eva", "config.model.vision is 'eva': must be a section"),
    ],
)
def test_a_key_that_a_section_has_not_or_that_is_no_such_thing_is_named(key, value, message):
    plain = model_config("tiny").to_dict()
    *sections, last = key.split(".")
    section = plain
    for name in sections:
        section = section[name]
    section[last] = value
    with pytest.raises(UserError, match=message):
        ModelConfig.from_config(plain)


def test_a_key_that_is_missing_is_named():
    plain = model_config("tiny").to_dict()
    del plain["special_ids"]["eov"]
    with pytest.raises(UserError, match="config.model.special_ids.eov is missing"):
        ModelConfig.from_config(plain)


def test_whole_numbers_and_lists_do_for_fractions_and_tuples():
    config = model_config("tiny").to_dict()
    config["llm"]["rope_theta"], config["patchify"]["kernel"] = 10_000, [2, 2, 2]
    model = ModelConfig.from_config(config)
    assert isinstance(model.llm.rope_theta, float) and model.patchify.kernel == (2, 2, 2)
    assert model == ModelConfig.from_config(model_config("tiny"))


def test_a_kept_config_of_another_version_is_completed():
    kept = {"model": {"preset": "tiny", "llm": {"depth": 2}}, "data": {"fps": 2.0, "sampler": "old"}, "lora": {"r": 4}}
    config = completed(kept, Path("CHECKPOINT"))
    stage = StageConfig.from_config({key: value for key, value in config.items() if key != "lora"})
    assert (stage.model.llm.depth, stage.model.llm.width, stage.data.fps, config.lora.r) == (2, 64, 2.0, 4)
    kept["model"]["llm"]["mixture"] = 8
    with pytest.raises(UserError, match="CHECKPOINT: config.model.llm.mixture of the checkpoint is a setting"):
        completed(kept, Path("CHECKPOINT"))
