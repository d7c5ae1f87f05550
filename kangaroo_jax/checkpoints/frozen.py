"""Finds frozen weights: they are stored once in a stage, and every checkpoint names them (see `training.frozen`)."""

import hashlib
import json
import re
from pathlib import Path

from kangaroo_jax.checkpoints.digests import Digests
from kangaroo_jax.errors import UserError

EMA = "ema"  # the item of a checkpoint with the average of the weights that train
FOLDER = "frozen"  # the folder beside the checkpoints, and the item in a checkpoint that names its subfolder


def weight_folders(checkpoint: Path, ema: bool = False) -> list[Path]:
    """The folders with the weights of a checkpoint: its own `params`, and that of frozen weights if there are some.

    With `ema` the average of the trained weights stands in place of `params`; UserError where none was kept.

    Checkpoints of older versions and of `kangaroo convert` hold all weights in `params`. Raises UserError if the
    frozen weights are not beside it.
    """
    params, reference = checkpoint / (EMA if ema else "params"), checkpoint / FOLDER
    if ema and not params.is_dir():
        raise UserError(f"{checkpoint}: holds no average of its weights; train with --config.optimizer.ema=0.999")
    if not reference.is_dir():
        return [params]
    try:
        name = json.loads((reference / "metadata").read_text(encoding="utf-8"))["folder"]
        known = bool(re.fullmatch("[0-9a-f]{16}", name))
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{reference}: does not say which frozen weights are the checkpoint's; copy it again")
    frozen = checkpoint.parent / FOLDER / name
    if not frozen.is_dir():
        raise UserError(
            f"{checkpoint}: its frozen weights are missing, {frozen}; copy that folder from beside the checkpoints "
            "where it was trained"
        )
    return [params, frozen]


def name_of(sums: Digests) -> str:
    """The name of the folder of frozen weights with these sums."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
