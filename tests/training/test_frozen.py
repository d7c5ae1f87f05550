"""Frozen weights: written once, whole or not at all, read with every checkpoint, named where they are missing."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kangaroo_jax.checkpoints.digests import digests
from kangaroo_jax.checkpoints.frozen import weight_folders
from kangaroo_jax.checkpoints.reading import find, load_params
from kangaroo_jax.checkpoints.stored import Stored
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.curation.stages.embedding import load_encoder
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.training.checkpoint import Checkpoints
from kangaroo_jax.training.step import TrainState


def state_of(step: int, params: dict, frozen: dict) -> TrainState:
    return TrainState(jnp.int32(step), params, frozen, {"mu": params})


def small(step: int, frozen: float = 1.0, dtype=jnp.bfloat16) -> TrainState:
    return state_of(step, {"a": jnp.full(4, step, jnp.float32)}, {"b": jnp.full(8, frozen, dtype)})


def save(folder: Path, *states: TrainState) -> Path:
    checkpoints = Checkpoints(folder, states[0])
    for state in states:
        checkpoints.save(state, b"x", {})
    checkpoints.close()
    return folder / "checkpoints"


def restored(folder: Path, like: TrainState) -> TrainState:
    checkpoints = Checkpoints(folder, like)
    try:
        return checkpoints.restore(jax.tree.map(jnp.zeros_like, like))[0]
    finally:
        checkpoints.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_frozen_weights_are_written_once_and_come_back_with_every_checkpoint(tmp_path):
    folder = save(tmp_path, small(1), small(2))
    (frozen,) = (folder / "frozen").iterdir()
    assert all(weight_folders(folder / step) == [folder / step / "params", frozen] for step in ("1", "2"))
    assert set(Stored(folder / "2" / "params").specs) == {"a"} and set(Stored(frozen).specs) == {"b"}
    written = {path: path.stat().st_mtime_ns for path in frozen.rglob("*")}
    save(tmp_path, small(3))  # another process of the same stage
    assert {path: path.stat().st_mtime_ns for path in frozen.rglob("*")} == written
    for step in (3, 2):
        found = restored(tmp_path, small(0))
        np.testing.assert_array_equal(found.params["a"], small(step).params["a"])
        np.testing.assert_array_equal(found.frozen["b"], small(step).frozen["b"])
        shutil.rmtree(folder / str(step))


def test_what_a_kill_has_left_is_cleared_and_no_checkpoint_is_whole_before_the_frozen_weights(tmp_path):
    folder = tmp_path / "checkpoints" / "frozen"
    name = next((save(tmp_path / "twin", small(1)) / "frozen").iterdir()).name
    for left in (f"{name}.orbax-checkpoint-tmp", "0123456789abcdef.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "twin" / "checkpoints" / "frozen" / name, folder / left)
        next(path for path in (folder / left).rglob("*") if path.is_file()).write_bytes(b"half")
    save(tmp_path, small(1))
    assert names(folder) == [name]
    np.testing.assert_array_equal(restored(tmp_path, small(0)).frozen["b"], small(1).frozen["b"])


def test_what_cannot_be_cleared_stops_no_save(tmp_path):
    folder = tmp_path / "checkpoints" / "frozen"
    folder.mkdir(parents=True)
    (folder / "other.orbax-checkpoint-tmp").touch()  # a file, in place of a folder
    save(tmp_path, small(1))
    assert len(names(folder)) == 2


def test_frozen_weights_that_are_stored_otherwise_have_a_folder_of_their_own(tmp_path):
    folder = save(tmp_path, small(1), small(2))
    save(tmp_path, small(3, dtype=jnp.float32))
    assert len(names(folder / "frozen")) == 2
    assert weight_folders(folder / "2")[1] != weight_folders(folder / "3")[1]


def test_missing_and_foreign_frozen_weights_are_one_line(tmp_path):
    folder, other = save(tmp_path / "one", small(1)), save(tmp_path / "two", small(1, frozen=2.0))
    frozen = weight_folders(folder / "1")[1]
    shutil.rmtree(frozen)
    for read in (lambda: restored(tmp_path / "one", small(0)), lambda: weight_folders(find(tmp_path / "one"))):
        with pytest.raises(UserError, match=f"1: its frozen weights are missing, {frozen}; copy that folder") as error:
            read()
        assert "\n" not in str(error.value)
    shutil.copytree(weight_folders(other / "1")[1], frozen)
    with pytest.raises(UserError, match=f"{frozen}: these frozen weights are damaged .*first b.*; copy them"):
        restored(tmp_path / "one", small(0))
    for path in frozen.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=f"{frozen}: these frozen weights are damaged") as error:
        restored(tmp_path / "one", small(0))
    assert "\n" not in str(error.value)
    for text in ("{", json.dumps({"folder": "../../two"}), "[]"):
        (folder / "1" / "frozen" / "metadata").write_text(text)
        with pytest.raises(UserError, match="does not say which frozen weights"):
            weight_folders(folder / "1")


def older(folder: Path, state: TrainState) -> None:
    """A checkpoint as older versions wrote it: all weights in `params`."""
    both, optimizer = {**state.params, **state.frozen}, {"opt_state": state.opt_state, "step": state.step}
    sums = {"params": digests(both)[0], "optimizer": digests(optimizer)[0]}
    json_save = ocp.args.JsonSave
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(both),
                optimizer=ocp.args.StandardSave(optimizer),
                data=json_save({"iterator": ""}),
                config=json_save({}),
                digests=json_save(sums),
            ),
        )


def test_a_checkpoint_that_holds_all_goes_on_as_one_that_does_not(tmp_path):
    older(tmp_path, small(1))
    found = restored(tmp_path, small(0))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(small(1))))
    folder = save(tmp_path, small(2))
    assert len(weight_folders(folder / "1")) == 1 and len(weight_folders(folder / "2")) == 2
    found = restored(tmp_path, small(0))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(small(2))))


def test_every_reader_of_weights_has_both(tmp_path, micro_config, make_random_model):
    binding = abstract_model(ModelConfig.from_config(micro_config.model))
    params = binding.flatten(make_random_model(micro_config.model))
    frozen = {k: v for k, v in params.items() if k.startswith("llm/") or k.endswith("bias")}
    folder = save(tmp_path, state_of(1, {k: v for k, v in params.items() if k not in frozen}, frozen))
    found, stored = load_params(tmp_path, binding), Stored(*weight_folders(folder / "1"))
    _, encoder = load_encoder(str(tmp_path), ModelConfig.from_config(micro_config.model))
    assert list(found) == list(binding.shapes) and stored.specs.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(stored.read(name, tuple(slice(0, n) for n in value.shape)), value)
        if name.startswith("vision/"):
            np.testing.assert_array_equal(encoder[name.removeprefix("vision/")], value)
    shutil.copytree(folder / "1", tmp_path / "alone" / "1")
    with pytest.raises(UserError, match="its frozen weights are missing"):
        load_params(tmp_path / "alone" / "1", binding)
    shutil.copytree(folder / "frozen", tmp_path / "alone" / "frozen")
    assert load_params(tmp_path / "alone" / "1", binding).keys() == params.keys()
