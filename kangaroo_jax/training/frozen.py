"""Frozen weights: written once in a stage, and named by every checkpoint of it.

    STAGE/checkpoints/frozen/NAME/      STAGE/checkpoints/STEP/frozen: {"folder": NAME}

NAME is a hash of the sums over the bits of its arrays (`digests.py`), which every checkpoint's `digests` hold as well.
The folder takes its name when it is whole, and is never deleted: checkpoints that were moved away may need it.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import Params
from kangaroo_jax.training.digests import Digests
from kangaroo_jax.training.distributed import is_main

FOLDER = "frozen"  # beside the checkpoints; in a checkpoint the item that names which one is its
_UNFINISHED = "*.orbax-checkpoint-tmp*"


def weight_folders(checkpoint: Path) -> list[Path]:
    """The folders that hold the weights of a checkpoint: its own `params`, and where some are frozen, theirs.

    Checkpoints of older versions, and those of `kangaroo convert`, hold all in `params`. Raises UserError where the
    frozen weights are not beside it.
    """
    params, reference = checkpoint / "params", checkpoint / FOLDER
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


class FrozenWriter:
    """Writes the frozen weights of a stage in the background, from all hosts, unless they are there already."""

    def __init__(self, checkpoints: Path, handler: Any) -> None:
        """`checkpoints`: the folder that holds them; `handler`: what writes the arrays."""
        self._folder = checkpoints / FOLDER
        self._writer = ocp.AsyncCheckpointer(handler)

    def write(self, frozen: Params, sums: Digests) -> str:
        """Start writing; returns the folder's name once the arrays are copied off the devices."""
        name = name_of(sums)
        if not (self._folder / name).is_dir():
            if is_main():
                for left in self._folder.glob(_UNFINISHED):
                    shutil.rmtree(left, ignore_errors=True)
            self._writer.save(self._folder / name, args=ocp.args.StandardSave(frozen))
        return name

    def wait(self) -> None:
        """Wait until they are on disk."""
        self._writer.wait_until_finished()

    def close(self) -> None:
        """Wait, and end the threads."""
        self._writer.close()
