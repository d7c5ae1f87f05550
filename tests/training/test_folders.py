"""What is found in a workdir: the last whole checkpoint, its tokenizer, its config; and what is said of what is not."""

import json
import math
import types

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from kangaroo_jax.checkpoints.reading import check_rope, check_shapes, find, find_tokenizer, keep_tokenizer, load_config
from kangaroo_jax.config import ModelConfig, stage_config
from kangaroo_jax.data.chat_format import FORMAT_FILE
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.errors import UserError
from kangaroo_jax.sharding import make_mesh, mesh_scope, mesh_text
from kangaroo_jax.training import loop
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.metrics import MetricLog, SampleLog, read_metrics
from kangaroo_jax.training.step import TrainState
from tests.data.test_chat_format import make


def steps(folder, *numbers, whole=True):
    for number in numbers:
        (folder / "checkpoints" / str(number) / ("params" if whole else "config")).mkdir(parents=True)
    return folder


def test_the_last_whole_step_is_found_by_its_number_from_any_folder_above_it(tmp_path):
    stage = steps(tmp_path / "stage2_video", 9, 100)
    steps(stage, 200, whole=False)  # begun, without weights
    (stage / "checkpoints" / "300.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    expected = stage / "checkpoints" / "100"
    for path in (stage, stage / "checkpoints", expected, str(stage)):
        assert find(path) == expected
    steps(tmp_path / "stage1_image", 500)
    (tmp_path / "stage3_refine" / "checkpoints").mkdir(parents=True)  # begun, nothing saved
    assert find(tmp_path) == expected  # the last stage that has one


def test_folders_without_a_checkpoint_are_one_line(tmp_path):
    with pytest.raises(UserError, match="none: no such checkpoint folder"):
        find(tmp_path / "none")
    (tmp_path / "stage1" / "checkpoints" / "tmp").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "stage1"):
        with pytest.raises(UserError, match="holds no finished checkpoint"):
            find(path)


def test_the_first_tensor_that_does_not_fit_is_named():
    shape = lambda *sizes: types.SimpleNamespace(shape=sizes)  # noqa: E731
    wanted = {"a": shape(2, 3), "b": shape(4)}
    check_shapes({"b": shape(4), "a": shape(2, 3)}, wanted, "FILE")
    for found, message in (
        ({"b": shape(4)}, "FILE: tensor a is missing"),
        ({**wanted, "aa": shape(1)}, "FILE: tensor aa is not of this model"),
        ({**wanted, "b": shape(5)}, r"FILE: tensor b has shape \(5,\), the config wants \(4,\)"),
    ):
        with pytest.raises(UserError, match=message):
            check_shapes(found, wanted, "FILE")


def test_the_tokenizer_is_kept_beside_the_checkpoints_and_found_from_them(tmp_path):
    source, stage = tmp_path / "other.model", steps(tmp_path / "stage", 3)
    texts = ["A red square moves to the left.", "A blue disc stands still."]
    first, second, third = (
        train_sentencepiece(texts, tmp_path / f"{size}.model", vocab_size=size).read_bytes() for size in (290, 292, 294)
    )
    source.write_bytes(first)
    keep_tokenizer(source, stage)
    assert (stage / "tokenizer.model").read_bytes() == first
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    make(folder, "smol")
    keep_tokenizer(folder, stage)  # that of a folder with its chat format, in place of the other
    assert {path.name for path in stage.iterdir()} == {"checkpoints", "tokenizer.json", FORMAT_FILE}
    for data in (second, third):  # of another suffix than what is there, and of the same
        source.write_bytes(data)
        keep_tokenizer(str(source), stage)
        assert (stage / "tokenizer.model").read_bytes() == data
    assert sorted(path.name for path in stage.iterdir()) == ["checkpoints", "tokenizer.model"]
    for folder in (stage / "checkpoints" / "3", stage / "checkpoints", stage):
        assert find_tokenizer(folder) == stage / "tokenizer.model"
    (stage / "checkpoints" / "3" / "tokenizer.json").write_text("{}")
    assert find_tokenizer(stage / "checkpoints" / "3").name == "tokenizer.json"  # the nearest
    with pytest.raises(UserError, match=r"no tokenizer\.\* beside the checkpoint"):
        find_tokenizer(tmp_path / "stage" / "checkpoints" / "a" / "b")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that has a config and no weights; and that config."""
    folder, config = tmp_path_factory.mktemp("saved"), stage_config("tiny")
    (folder / "7" / "params").mkdir(parents=True)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "7" / "config", args=ocp.args.JsonSave(config.to_dict()))
    return folder, config


@pytest.mark.parametrize("config", [[], {"model": []}, {"model": {}, "data": 1}, {"data": {}}])
def test_a_config_of_another_shape_is_damage(config, tmp_path):
    (tmp_path / "7" / "params").mkdir(parents=True)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(tmp_path / "7" / "config", args=ocp.args.JsonSave(config))
    with pytest.raises(UserError, match="this checkpoint is damaged .*(no section|no model)"):
        load_config(tmp_path)


def test_a_config_comes_back_with_its_tuples_and_cannot_get_a_new_key(saved):
    folder, config = saved
    found = load_config(folder)
    assert found.to_dict() == config.to_dict() and isinstance(found.model.patchify.kernel, tuple)
    assert isinstance(found.optimizer.trainable[0], tuple)
    with pytest.raises(AttributeError):
        found.model.wrong = 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision.rope_theta", 20_000.0),
        ("vision.rope_reference_grid", 5),
        ("tpe.theta", 500.0),
        ("llm.rope_theta", 5e5),
        ("llm.rope_scaling.factor", 8.0),
    ],
)
def test_every_setting_that_turns_angles_is_compared(saved, key, value):
    folder, config = saved
    model = config.model.copy_and_resolve_references()
    model.llm.rope_scaling.low_freq_factor = 3.0  # nothing, as long as the factor is 1
    check_rope(folder, ModelConfig.from_config(model))
    model.update_from_flattened_dict({key: value})
    name = key.removesuffix(".factor")
    with pytest.raises(UserError, match=rf"7: config\.model\.{name} of the checkpoint is .*--config\.model\.{name}"):
        check_rope(folder, ModelConfig.from_config(model))


def test_what_a_stage_runs_on_is_said_in_words():
    assert mesh_text(make_mesh((1, 1, 1, 1), jax.devices()[:1])) == "1 cpu device"
    expected = "8 cpu devices, data 1, fsdp 2, context 2, tensor 2"
    assert mesh_text(make_mesh((1, 2, 2, 2), jax.devices()[:8])) == expected


def test_on_several_devices_their_mesh_is_set_and_on_one_there_is_none():
    for shape in ((1, 1, 1, 1), (1, 2, 2, 2)):
        mesh = make_mesh(shape, jax.devices()[: math.prod(shape)])
        with mesh_scope(mesh):
            assert jax.sharding.get_abstract_mesh().empty == (shape == (1, 1, 1, 1))


def test_what_hosts_of_before_wrote_after_the_step_is_dropped_too(tmp_path):
    """Host 1 is no more; a folder of one process goes on after step 2."""
    lines = [json.dumps({"step": step, "skipped_steps": step, "stepping": 10.0 * step}) for step in (1, 2, 3)]
    for name in ("metrics.jsonl", "metrics.1.jsonl", "samples.jsonl", "samples.1.jsonl"):
        last = json.dumps({"step": 4, "elapsed": 50.0})
        (tmp_path / name).write_text("\n".join([*lines, last]) + "\n")
    log, samples = MetricLog(tmp_path), SampleLog(tmp_path)
    before = loop.rewind(tmp_path, log, samples, 2)
    assert before == {
        "skipped_steps": 2,
        "spikes": 0,
        "stepping": 20.0,
        "elapsed": 50.0,
    }  # time that has passed has passed
    log.close(), samples.close()
    for path in tmp_path.iterdir():
        assert [line["step"] for line in read_metrics(path)] == [1, 2], path


def test_the_last_checkpoints_are_kept_and_no_more(tmp_path):
    state = TrainState(jnp.int32(0), {"a": jnp.ones(3)}, {}, {"count": jnp.int32(0)})
    checkpoints = Checkpoints(tmp_path, state, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(TrainState(jnp.int32(step), state.params, {}, state.opt_state), b"", {})
        checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
