"""Orbax checkpoints: weights, optimiser, data iterator and config, saved together or not at all.

    STAGE/checkpoints/STEP/{params,optimizer,data,config}      STAGE/tokenizer.*

`params` is a flat dictionary of every weight (trained in float32, frozen as stored), so that the next
stage, chat and conversion read it alone.
"""

import base64
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.conventions import UserError
from kangaroo_jax.models.kangaroo import Kangaroo
from kangaroo_jax.sharding import sharding
from kangaroo_jax.training.parameters import Binding, Params
from kangaroo_jax.training.step import TrainState

WRITING_SHARE = 0.1  # of an item of a checkpoint; what is being written is in memory twice


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, stage_dir: Path, state: TrainState, *, keep: int = 2) -> None:
        """Opens (and makes) `stage_dir/checkpoints`; keeps the last `keep`.

        The size of `state` says how much of a checkpoint is on its way to the disk at a time.
        """
        self.folder = Path(stage_dir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "params": _array_handler({**state.params, **state.frozen}),
                "optimizer": _array_handler(state.opt_state),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The last whole checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: bytes, config: Mapping[str, Any]) -> None:
        """Start saving; returns once the arrays are copied off the device."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave({**state.params, **state.frozen}),
                optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
                data=ocp.args.JsonSave({"iterator": base64.b64encode(data_state).decode()}),
                config=ocp.args.JsonSave(dict(config)),
            ),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, bytes]:
        """The last checkpoint in the shapes and shardings of `state`, and the data iterator's state."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = self._manager.restore(
            self.latest(),
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore({**abstract.params, **abstract.frozen}),
                optimizer=ocp.args.StandardRestore({"opt_state": abstract.opt_state, "step": abstract.step}),
                data=ocp.args.JsonRestore(),
            ),
        )
        params = restored["params"]
        new = TrainState(
            step=restored["optimizer"]["step"],
            params={k: params[k] for k in state.params},
            frozen={k: params[k] for k in state.frozen},
            opt_state=restored["optimizer"]["opt_state"],
        )
        return new, base64.b64decode(restored["data"]["iterator"])

    def wait(self) -> None:
        """Wait until what was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _array_handler(arrays: Any) -> ocp.StandardCheckpointHandler:
    """A handler that writes a tenth of this process's part of `arrays` at a time.

    Without a limit Orbax has all of it in memory twice. It refuses a shard that is not smaller than the limit,
    so that this is never below three of the largest.
    """
    shards = [s.data.nbytes for x in jax.tree.leaves(arrays) for s in x.addressable_shards if s.replica_id == 0]
    limit = max([2**20, 3 * max(shards, default=0), round(WRITING_SHARE * sum(shards))])
    return ocp.StandardCheckpointHandler(save_concurrent_gb=limit / 10**9)


def find(path: str | Path) -> Path:
    """The folder of one whole checkpoint: `path` is it, or a stage (or curriculum) that holds some.

    Of a stage the last step is taken; of a curriculum the last stage that has one. Raises UserError.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder; give a folder that kangaroo train or curriculum wrote")
    if (path / "params").is_dir():
        return path
    for candidate in (path, path / "checkpoints"):
        steps = (
            [p for p in candidate.iterdir() if p.name.isdigit() and (p / "params").is_dir()]
            if candidate.is_dir()
            else []
        )
        if steps:
            return max(steps, key=lambda p: int(p.name))
    stages = sorted(p.parent for p in path.glob("stage*/checkpoints"))
    for stage in reversed(stages):
        if any(p.name.isdigit() for p in (stage / "checkpoints").iterdir()):
            return find(stage)
    if any(path.glob("*.safetensors")):
        hint = f"kangaroo convert --from={path} --to=DIR makes a checkpoint of it"
        raise UserError(f"{path}: weights in the layout of Hugging Face; {hint}")
    raise UserError(f"{path}: holds no finished checkpoint (looked for STEP/params, checkpoints/STEP and stage*/)")


def check_shapes(found: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], where: Path) -> None:
    """Raise UserError that names the first tensor (in order of name) that is missing, surplus or of another shape."""
    for name in sorted({*found, *wanted}):
        if name not in found:
            raise UserError(
                f"{where}: tensor {name} is missing; the checkpoint is of another model, check config.model"
            )
        if name not in wanted:
            raise UserError(f"{where}: tensor {name} is not of this model; check config.model")
        if tuple(found[name].shape) != tuple(wanted[name].shape):
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(found[name].shape)}, the config wants "
                f"{tuple(wanted[name].shape)}; check config.model"
            )


# What decides which angle a position has: no shape shows it, and weights of another setting give another model.
ROPE_SETTINGS = ("vision.rope_theta", "vision.rope_reference_grid", "tpe.theta", "llm.rope_theta", "llm.rope_scaling")


def check_rope(path: str | Path, model: ml_collections.ConfigDict) -> None:
    """Raise UserError that names the first rope setting in which a checkpoint's config differs from `model`.

    `llm.rope_scaling` with factor 1 is none, whatever the rest of it says, as is none at all (older checkpoints).
    """
    folder = find(path)
    found, wanted = load_config(folder).model, model
    for name in ROPE_SETTINGS:
        part, key = name.split(".")
        before, now = found[part].get(key), wanted[part].get(key)
        if key == "rope_scaling":
            before, now = ({} if not x or x["factor"] == 1.0 else x.to_dict() for x in (before, now))
        if before != now:
            raise UserError(
                f"{folder}: config.model.{name} of the checkpoint is {before or 'none'}, of this config "
                f"{now or 'none'}; its weights were trained with the former: set --config.model.{name}, or "
                "--config.init_other_rope=True to change it on purpose"
            )


def load_params(path: str | Path, binding: Binding, mesh: Mesh | None = None) -> Params:
    """The weights of a checkpoint for the model of `binding`, sharded over `mesh` where one is given.

    Raises UserError for a missing folder or a checkpoint of another model, naming the first wrong tensor.
    """
    folder = find(path) / "params"
    found = ocp.StandardCheckpointHandler().metadata(folder).tree  # a checkpointer warns that one item is no whole step
    check_shapes(found, binding.shapes, folder.parent)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(
            found[name].shape,
            found[name].dtype,
            sharding=sharding(mesh, binding.axes[name], found[name].shape) if mesh else device,
        )
        for name in binding.shapes
    }
    return ocp.StandardCheckpointer().restore(folder, target)


def load_config(path: str | Path) -> ml_collections.ConfigDict:
    """The config that a checkpoint was trained with. Raises UserError."""
    folder = find(path) / "config"
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            plain = reader.restore(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder}: damaged, no config of a checkpoint ({' '.join(str(error).split())[:160]})"
        ) from None
    if not isinstance(plain, dict) or not all(isinstance(plain.get(key), dict) for key in ("model", "data")):
        raise UserError(f"{folder}: damaged, no config of a checkpoint (it has no model and data)")
    return ml_collections.ConfigDict(_tuples(plain)).lock()


def _tuples(value: Any) -> Any:
    """JSON knows lists only; every sequence of a config is a tuple."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def abstract_model(config: ml_collections.ConfigDict) -> Binding:
    """The structure of the model of `config.model`, with nothing allocated."""
    return Binding(nnx.eval_shape(lambda: Kangaroo(config, rngs=nnx.Rngs(0))))


def load_for_inference(path: str | Path) -> tuple[Kangaroo, ml_collections.ConfigDict, Path]:
    """(model, config, tokenizer file) of a checkpoint, stage or curriculum folder. Raises UserError."""
    folder = find(path)
    config = load_config(folder)
    binding = abstract_model(config.model)
    model = binding.bind(load_params(folder, binding))
    return model, config, find_tokenizer(folder)


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer file kept beside the checkpoints of a stage. Raises UserError."""
    for parent in (folder, *folder.parents[:2]):
        files = sorted(parent.glob("tokenizer.*"))
        if files:
            return files[0]
    raise UserError(
        f"{folder}: no tokenizer.* beside the checkpoint; copy the one it was trained with to {folder.parent}"
    )


def keep_tokenizer(source: str | Path, stage_dir: Path) -> None:
    """Copy the tokenizer's file beside the checkpoints (once)."""
    source = Path(source)
    target = stage_dir / f"tokenizer{source.suffix}"
    if not target.exists():
        temporary = target.with_suffix(".tmp")
        shutil.copyfile(source, temporary)
        temporary.rename(target)


def zeros_like(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Arrays of the given shapes, for tests and templates."""
    return {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
