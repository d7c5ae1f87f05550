"""What a finished run of an adapter keeps: the factors of its best checkpoint, and nothing that only training needs.

    STAGE/adapter/{params,config,digests,base}      STAGE/best -> adapter

The factors have the type in which the model computes, so that answers are those of the float32 ones bit for bit. All
of it is there before a checkpoint is deleted: a run that is killed meanwhile finishes when it is given again.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.adapters import BASE
from kangaroo_jax.checkpoints.digests import digests
from kangaroo_jax.checkpoints.frozen import EMA
from kangaroo_jax.config import StageConfig, to_plain
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.lora import is_factor
from kangaroo_jax.models.parameters import abstract_model
from kangaroo_jax.sharding import make_mesh, sharding
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.distributed import barrier, is_main
from kangaroo_jax.training.measuring import link_best
from kangaroo_jax.training.metrics import read_metrics
from kangaroo_jax.training.resume import check_resume

ADAPTER = "adapter"


def finish_adapter(config: StageConfig, workdir: Path, tell: Tell) -> None:
    """Keep the factors of the best checkpoint of a finished stage alone. Every host must call it; again does nothing.

    `config` is a resolved one. Raises UserError if the best checkpoint is damaged.
    """
    kept = workdir.resolve() / ADAPTER
    if not kept.is_dir():
        _write(config, reading.find(workdir), kept, make_mesh(config.train.mesh, jax.devices()))
    barrier(f"{config.stage} keeps its factors")
    if not is_main():
        return
    link_best(workdir, ADAPTER)
    if (workdir / "checkpoints").is_dir():
        shutil.rmtree(workdir / "checkpoints")
        tell(f"{config.stage}: keeps the factors of its best checkpoint in {workdir / ADAPTER}, and no state to go on")


def _write(config: StageConfig, best: Path, kept: Path, mesh: Mesh) -> None:
    """Write the factors of the checkpoint `best` to `kept`, which is there whole or not at all."""
    binding = abstract_model(config.model, config.lora)
    target = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, binding.axes[path], x.shape))
        for path, x in binding.shapes.items()
        if is_factor(path)
    }
    arrays = {}
    for item in [item for item in ("params", EMA) if (best / item).is_dir()]:
        factors = reading.restore_arrays(best, item, best / item, target)
        arrays[item] = {path: x.astype(jnp.dtype(config.model.dtype)) for path, x in factors.items()}
    json = {
        "config": to_plain(reading.load_stage(best)),
        "digests": {item: digests(factors)[0] for item, factors in arrays.items()},
        BASE: reading.read_item(best / BASE),
    }
    handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in arrays}
    handlers |= {item: ocp.JsonCheckpointHandler() for item in json}
    items: dict[str, Any] = {item: ocp.args.StandardSave(factors) for item, factors in arrays.items()}
    items |= {item: ocp.args.JsonSave(value) for item, value in json.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
        writer.save(kept, args=ocp.args.Composite(**items))


def finished(config: StageConfig, workdir: Path, tell: Tell) -> int | None:
    """The last step of a stage that `finish_adapter` finished, None of one that it did not.

    `tell` is told which settings are others than it was trained with. Raises UserError if more steps are asked for
    than it made (nothing is left to go on from), or another adapter.
    """
    kept = workdir / ADAPTER
    if not (kept / "params").is_dir():
        return None
    steps = reading.load_stage(kept).train.steps
    if config.train.steps > steps:
        raise UserError(
            f"{workdir}: is finished after {steps} steps and keeps its factors alone: it cannot go on to "
            f"{config.train.steps}; begin in another workdir, with --config.lora.keep_state=True to go on later"
        )
    differences = check_resume(kept, config, abstract_model(config.model, config.lora).shapes)
    for line in differences:
        tell(f"{config.stage}: {line}")
    # One that no longer got better ended before the last of its steps.
    last = max((line["step"] for line in read_metrics(workdir / "metrics.jsonl")), default=steps)
    stays = ", and stays as it was trained: other settings need another workdir" * bool(differences)
    tell(f"{config.stage}: is finished after step {min(last, steps)}{stays}")
    return min(last, steps)
