"""Writes frozen weights: once in a stage, named by every checkpoint of it.

    STAGE/checkpoints/frozen/NAME/      STAGE/checkpoints/STEP/frozen: {"folder": NAME}

NAME is a hash of the sums over the bits of its arrays (`digests.py`), which are also in every checkpoint's `digests`.
The folder gets its name when it is complete, and is never deleted: checkpoints that were moved away may need it.
"""

import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from kangaroo_jax.checkpoints.digests import Digests
from kangaroo_jax.checkpoints.frozen import FOLDER, name_of
from kangaroo_jax.models.parameters import Params
from kangaroo_jax.training.distributed import is_main

_UNFINISHED = "*.orbax-checkpoint-tmp*"


class FrozenWriter:
    """Writes a stage's frozen weights in the background, from all hosts, unless they are already there."""

    def __init__(self, checkpoints: Path, handler: Any) -> None:
        """`checkpoints`: the folder of checkpoints; `handler` writes the arrays."""
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
        """Wait until the weights are on disk."""
        self._writer.wait_until_finished()

    def close(self) -> None:
        """Wait, and end the threads."""
        self._writer.close()
