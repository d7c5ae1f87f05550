"""Reads checkpoints: finds a complete one, its config and tokenizer, and its weights for a model, which are checked.

STAGE/checkpoints/STEP/{params,optimizer,data,config,digests,frozen}      STAGE/tokenizer.*
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from kangaroo_jax.checkpoints.digests import changed
from kangaroo_jax.checkpoints.frozen import FOLDER, weight_folders
from kangaroo_jax.config import PRESETS, ModelConfig, RopeScaling, StageConfig, stage_config, tuples
from kangaroo_jax.data.chat_format import FORMAT_FILE
from kangaroo_jax.data.tokenizer import tokenizer_files
from kangaroo_jax.errors import EndsTogether, UserError
from kangaroo_jax.models.lora import is_factor
from kangaroo_jax.models.parameters import Binding, Params
from kangaroo_jax.models.quantized import SCALE
from kangaroo_jax.sharding import sharding
from kangaroo_jax.system.files import write_bytes
from kangaroo_jax.system.json_text import read_json

ITEMS = ("params", "optimizer", "data", "config")


class NotFinite(EndsTogether, UserError):
    """A loss, a gradient or a state is not finite; all processes find it at the same step."""


def damaged(folder: Path, reason: str) -> UserError:
    """The error for a damaged checkpoint; it names the one to use instead."""
    if folder.parent.name == FOLDER:
        return UserError(
            f"{folder}: these frozen weights are damaged ({reason}), which the checkpoints beside them need; copy them "
            "again from where they are whole, or begin anew in another workdir"
        )
    number = int(folder.name) if folder.name.isdigit() else 0
    older = [
        p
        for p in folder.parent.iterdir()
        if p.name.isdigit() and int(p.name) < number and all((p / item).is_dir() for item in ITEMS)
    ]
    if older:
        before = max(older, key=lambda p: int(p.name))
        advice = f"move {folder} away to go on from the one before it, {before}"
    elif number:
        advice = f"there is none before it: move {folder} away to begin anew"
    else:
        advice = "write it again"
    return UserError(f"{folder}: this checkpoint is damaged ({reason}); {advice}")


@contextlib.contextmanager
def named_if_damaged(folder: Path) -> Iterator[None]:
    """Turn any failure inside into a line that says the checkpoint is damaged. Raises UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Orbax, tensorstore and JSON have no common class for unreadable files
        if "RESOURCE_EXHAUSTED" in str(error):  # a device has too little memory; the files are not at fault
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise damaged(folder, f"{type(error).__name__}: {first[:160]}") from error


def restore_arrays(checkpoint: Path, item: str, folder: Path, target: Mapping[str, Any]) -> Params:
    """The weights in one of the folders of a checkpoint, compared with their digests. Raises UserError."""
    with named_if_damaged(_holder(folder)):
        params: Params = ocp.StandardCheckpointer().restore(folder, dict(target))
    check_digests(checkpoint, {item: params})
    return params


def check_digests(folder: Path, items: Mapping[str, Any]) -> None:
    """Raise UserError if arrays read from `folder` differ from those that were saved, or are not finite."""
    with named_if_damaged(folder):
        saved = saved_digests(folder)
        for item, tree in items.items():
            wrong, not_finite = changed(tree, saved.get(item, {}))
            if wrong:
                where = weight_folders(folder)[1] if item == FOLDER else folder
                raise damaged(where, f"{item}: {len(wrong)} arrays are not as they were saved, first {wrong[0]}")
            if not_finite:
                raise NotFinite(
                    f"{folder}: {item}: {not_finite[0]} is not finite, as are {len(not_finite) - 1} more arrays: it "
                    "can be neither trained nor used; take an earlier checkpoint"
                )


def saved_digests(folder: Path) -> Mapping[str, Any]:
    """Item -> array -> the sum that it had when it was saved; empty where none were kept."""
    return read_item(folder / "digests") if (folder / "digests").is_dir() else {}


def find(path: str | Path) -> Path:
    """The folder of one complete checkpoint: `path` itself, or one in the stage or curriculum at `path`.

    In a stage it is the best one, where it measured itself (its link `best`), else the last; in a curriculum, that of
    the last stage with a checkpoint. Raises UserError.
    """
    path = Path(path).resolve()
    if (path / "best" / "params").is_dir():
        return (path / "best").resolve()
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


def is_adapter(folder: Path) -> bool:
    """Whether the checkpoint `folder` holds the factors of an adapter alone."""
    metadata = folder / "params" / "_METADATA"
    if not metadata.is_file():
        return False
    entries = read_json(metadata).get("tree_metadata", {}).values()
    keys = [str(key.get("key")) for entry in entries for key in entry.get("key_metadata", [])]
    return bool(keys) and all(map(is_factor, keys))


def refuse_adapter(folder: Path) -> Path:
    """The folder. Raises UserError if it holds an adapter alone, where a whole model belongs."""
    if is_adapter(folder):
        raise UserError(
            f"{folder}: is itself an adapter, and holds no whole model; add it to its base first: "
            f"kangaroo convert --from={folder} --to=DIR --format=orbax"
        )
    return folder


def check_not_quantized(found: Iterable[str], where: Path) -> None:
    """Raise UserError where these are names of quantised weights, which can be neither trained nor converted."""
    if any(name.endswith(f"/{SCALE}") for name in found):
        raise UserError(f"{where}: its weights are quantised, for talking alone; give the checkpoint that they are of")


# Settings of the rotation angles: shapes don't show them, and the same weights with others are another model.
ROPE_SETTINGS = ("vision.rope_theta", "vision.rope_reference_grid", "tpe.theta", "llm.rope_theta", "llm.rope_scaling")


def check_rope(path: str | Path, model: ModelConfig) -> None:
    """Raise UserError that names the first rope setting in which a checkpoint's config differs from `model`.

    `llm.rope_scaling` with factor 1 counts as no scaling.
    """
    folder = find(path)
    found = load_stage(folder).model
    for name in ROPE_SETTINGS:
        before, now = _rope(found, name), _rope(model, name)
        if before != now:
            raise UserError(
                f"{folder}: config.model.{name} of the checkpoint is {before or 'none'}, of this config "
                f"{now or 'none'}; its weights were trained with the former: set --config.model.{name}, or "
                "--config.init_other_rope=True to change it on purpose"
            )


def _rope(model: ModelConfig, name: str) -> Any:
    """One of ROPE_SETTINGS; {} for a scaling that scales nothing."""
    value: Any = operator.attrgetter(name)(model)
    if isinstance(value, RopeScaling):
        return {} if value.factor == 1.0 else dataclasses.asdict(value)
    return value


def load_params(path: str | Path, binding: Binding, mesh: Mesh | None = None) -> Params:
    """The weights of a checkpoint for the model of `binding`, sharded over `mesh` if it is given.

    Raises UserError for a missing folder or a checkpoint of another model, naming the first wrong tensor.
    """
    checkpoint = refuse_adapter(find(path))
    folders = weight_folders(checkpoint)
    stored = [_stored(folder) for folder in folders]
    found = {name: leaf for tree in stored for name, leaf in tree.items()}
    check_not_quantized(found, checkpoint)
    check_shapes(found, binding.shapes, checkpoint)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=sharding(mesh, binding.axes[name], leaf.shape) if mesh else device,
        )
        for name, leaf in found.items()
    }
    params: Params = {}
    for item, folder, tree in zip(("params", FOLDER), folders, stored, strict=False):
        params |= restore_arrays(checkpoint, item, folder, {name: target[name] for name in tree})
    return {name: params[name] for name in binding.shapes}


def _stored(folder: Path) -> Mapping[str, Any]:
    """Name -> shape and dtype of every array in a folder of weights. Raises UserError."""
    with named_if_damaged(_holder(folder)):
        # Uses the handler, because a checkpointer warns that one item is not a whole step.
        tree: Mapping[str, Any] = ocp.StandardCheckpointHandler().metadata(folder).tree
        return tree


def _holder(weights: Path) -> Path:
    """The folder to report as damaged for a folder of weights: its checkpoint, or itself."""
    return weights if weights.parent.name == FOLDER else weights.parent


def load_config(path: str | Path) -> ml_collections.ConfigDict:
    """The config that a checkpoint was trained with; missing keys come from its preset.

    Raises UserError if it is damaged, or its model has a setting that this version does not know.
    """
    folder = find(path)
    return completed(kept_config(folder), folder).lock()


def kept_config(folder: Path) -> dict[str, Any]:
    """The config in the checkpoint `folder` as it is written. Raises UserError if it is damaged."""
    with named_if_damaged(folder):
        plain = tuples(read_item(folder / "config"))
    if not isinstance(plain, dict) or not all(isinstance(plain.get(key, {}), dict) for key in ("model", "data")):
        raise damaged(folder, "config: its model or data is no section")
    if "model" not in plain:
        raise damaged(folder, "config: it has no model")
    return plain


def load_stage(path: str | Path) -> StageConfig:
    """`load_config` as a `StageConfig`. Raises UserError."""
    folder, config = find(path), load_config(path)
    try:
        return StageConfig.from_config(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def completed(plain: Mapping[str, Any], where: Path) -> ml_collections.ConfigDict:
    """The config that an earlier version kept in `where`; missing keys come from its preset.

    Unknown keys outside of the model are left out. Raises UserError for an unknown setting of the model.
    """
    preset = plain["model"].get("preset")
    known = stage_config(preset if preset in PRESETS else PRESETS[0]).to_dict()
    for name in unknown_keys(plain["model"], known["model"]):
        raise UserError(
            f"{where}: config.model.{name} of the checkpoint is a setting that this version does not know; use the "
            "version that wrote it, or a later one"
        )
    return ml_collections.ConfigDict(_filled(plain, known))


def unknown_keys(found: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of `found` that `known` lacks."""
    for key, value in found.items():
        if key not in known:
            yield key
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping):
            yield from (f"{key}.{inner}" for inner in unknown_keys(value, known[key]))


def _filled(found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `known`, with the values of `found` if it has them."""
    filled = {key: found.get(key, value) for key, value in known.items()}
    sections = [key for key, value in known.items() if isinstance(value, Mapping) and isinstance(filled[key], Mapping)]
    return {**filled, **{key: _filled(filled[key], known[key]) for key in sections}}


def read_item(folder: Path) -> Any:
    """What a checkpoint keeps as JSON in the folder of an item."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder)


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
    """Copy the tokenizer's files beside the checkpoints, replacing another one there."""
    files = tokenizer_files(source)
    for name, data in files.items():
        if not (stage_dir / name).exists() or (stage_dir / name).read_bytes() != data:
            write_bytes(stage_dir / name, data)
    for other in (*stage_dir.glob("tokenizer.*"), stage_dir / FORMAT_FILE):
        if other.name not in files:
            other.unlink(missing_ok=True)
