"""The sections of a stage's config as frozen dataclasses, and the ConfigDicts that users change."""

import dataclasses
from pathlib import Path

import pytest

from kangaroo_jax.checkpoints.reading import completed
from kangaroo_jax.config import PRESETS, ModelConfig, StageConfig, model_config, stage_config, to_plain
from kangaroo_jax.errors import UserError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_becomes_its_dataclass_and_back(preset):
    config = stage_config(preset)
    stage = StageConfig.from_config(config)
    assert dataclasses.asdict(stage) == config.to_dict()
    assert hash(stage) == hash(StageConfig.from_config(stage_config(preset)))
    assert stage.model == ModelConfig.from_config(model_config(preset))


def test_what_a_stage_file_changes_arrives():
    stage = StageConfig.load("stage1_image_pretrain:kangaroo_8b")
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


def test_a_changed_copy_leaves_the_first_as_it_was_and_every_key_is_listed():
    stage = StageConfig()
    other = stage.changed({"model.llm.rope_scaling.factor": 8.0, "data.fps": 2.0, "seed": 3})
    differ = {key: value for key, value in other.flat() if dict(stage.flat())[key] != value}
    assert differ == {"model.llm.rope_scaling.factor": 8.0, "data.fps": 2.0, "seed": 3}
    assert to_plain(other) == dataclasses.asdict(other) and list(to_plain(other)) == sorted(to_plain(other))


def test_a_key_that_a_stage_file_invents_is_named(tmp_path):
    text = "from kangaroo_jax.config import stage_config\ndef get_config(preset='tiny'):\n"
    (tmp_path / "mine.py").write_text(text + "    c = stage_config(preset)\n    c.data.fsp = 2.0\n    return c\n")
    with pytest.raises(UserError, match=r"config.data: there is no key 'fsp' \(did you mean 'fps'\?\)"):
        StageConfig.load(str(tmp_path / "mine.py"))


def test_a_kept_config_of_another_version_is_completed():
    kept = {"model": {"preset": "tiny", "llm": {"depth": 2}}, "data": {"fps": 2.0, "sampler": "old"}, "lora": {"r": 4}}
    stage = StageConfig.from_config(completed(kept, Path("CHECKPOINT")))
    assert (stage.model.llm.depth, stage.model.llm.width, stage.data.fps) == (2, 64, 2.0)
    kept["model"]["llm"]["mixture"] = 8
    with pytest.raises(UserError, match="CHECKPOINT: config.model.llm.mixture of the checkpoint is a setting"):
        completed(kept, Path("CHECKPOINT"))
