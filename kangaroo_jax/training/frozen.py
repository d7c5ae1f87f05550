"""Frozen weights: written once in a stage, and named by every checkpoint of it.

    STAGE/checkpoints/frozen/NAME/      STAGE/checkpoints/STEP/frozen: {"folder": NAME}

NAME is a hash of the sums over the bits of its arrays (`digests.py`), which every checkpoint's `digests` hold as well.
The folder takes its name when it is whole, and is never deleted: checkpoints that were moved away may need it.
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
