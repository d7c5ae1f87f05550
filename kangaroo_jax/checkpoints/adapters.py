"""Adapters as training and `kangaroo convert` keep them: `params` has the factors alone (see `models.lora`).

    STEP/base: {"path": folder of the base's checkpoint, "digest": ..., "sums": of each of its arrays}

The base is never written again. Its sums are those of `digests.py`, of the arrays as they are stored, so that another
base is known by its first tensor. An adapter that was converted has no `base`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.digests import Digests, RunningDigest, differs
from kangaroo_jax.checkpoints.frozen import EMA, name_of, weight_folders
from kangaroo_jax.checkpoints.stored import Stored
from kangaroo_jax.errors import UserError

BASE = "base"  # the item of a checkpoint that names the base


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter adapts."""

    path: Path  # folder of the checkpoint
    sums: Digests  # of its arrays, as they are stored

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return {"path": str(self.path), "digest": name_of(self.sums), "sums": self.sums}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Base":
        """What `to_json` gave."""
        sums = {str(name): (int(value[0]), str(value[1])) for name, value in kept["sums"].items()}
        return cls(Path(kept["path"]), sums)

    def check(self, found: Mapping[str, Any], where: Path, adapter: Path) -> None:
        """Raise UserError that names the first tensor of the base at `where`, of these sums, which is another."""
        for name in sorted({*found, *self.sums}):
            if name not in found or name not in self.sums or tuple(found[name]) != tuple(self.sums[name]):
                raise UserError(
                    f"{where}: is another base than the one that {adapter} adapts, which was {self.path} (digest "
                    f"{name_of(self.sums)}): first tensor {name}; give that one"
                )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A kept adapter.

    Attributes:
        folder: of its checkpoint.
        rank: of its factors.
        scale: what their product is multiplied by.
        base: what it adapts, as training knows it; None for an adapter that was converted.
        stored: its factors.
    """

    folder: Path
    rank: int
    scale: float
    base: Base | None
    stored: Stored

    @property
    def maps(self) -> tuple[str, ...]:
        """Paths of the adapted linear maps, without `/kernel`."""
        return tuple(sorted({name.rpartition("/")[0] for name in self.stored.specs}))


def open_adapter(path: str | Path, ema: bool = False) -> Adapter:
    """The adapter that a run or `kangaroo convert` left in `path`, or with `ema` the average of its factors.

    Raises UserError if it is none, or is damaged.
    """
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: is PEFT's adapter; kangaroo convert --from={path} --base=MODEL --to=DIR makes one of ours of it"
        )
    folder = reading.find(path)
    if not reading.is_adapter(folder):
        raise UserError(f"{folder}: holds a whole model, no adapter; give the folder of a run with config.lora.rank")
    with reading.named_if_damaged(folder):
        settings = reading.kept_config(folder).get("lora", {})
        rank, alpha = settings.get("rank", settings.get("r")), settings.get("alpha", settings.get("lora_alpha"))
        scale = alpha / (rank**0.5 if settings.get("rslora", settings.get("use_rslora")) else rank)
        stored = Stored(*weight_folders(folder, ema))
    _check_digests(folder, stored, EMA if ema else "params")
    return Adapter(folder, rank, scale, kept_base(folder), stored)


def _check_digests(folder: Path, stored: Stored, item: str) -> None:
    saved = reading.saved_digests(folder).get(item, {})
    for name, value in stored_sums(stored).items():
        if name in saved and differs(value, saved[name]):
            raise reading.damaged(folder, f"{item}: {name} is not as it was saved")


def stored_sums(stored: Stored) -> Digests:
    """The sum of every array, read a layer at a time."""
    sums: Digests = {}
    for name in stored.specs:
        running = RunningDigest()
        for part in stored.layers(name):
            running.add(part)
        sums[name] = running.value
    return sums


def kept_base(folder: Path) -> Base | None:
    """The base that the adapter's checkpoint names. Raises UserError if it is damaged."""
    if not (folder / BASE).is_dir():
        return None
    with reading.named_if_damaged(folder):
        return Base.from_json(reading.read_item(folder / BASE))


def find_base(adapter: Path, kept: Base, given: str | Path = "") -> Path:
    """The folder of the base that an adapter names: where it was, or `given` where it is not there any more.

    Raises UserError if it is gone.
    """
    if (kept.path / "params").is_dir():
        return kept.path
    if given and Path(given).is_dir():
        return reading.refuse_adapter(reading.find(given))
    raise UserError(
        f"{adapter}: its base, {kept.path}, is gone; copy it back there, or say where it is now: "
        "--checkpoint=BASE --lora=THIS to use it, --config.init_from=BASE to train on"
    )


def check_base(folder: Path, adapter: Adapter) -> None:
    """Compare the base at `folder` with the one that the adapter names, by the sums that are kept with both.

    A base without kept sums is read. Raises UserError that names the first tensor that differs.
    """
    if adapter.base is None:
        return
    saved = reading.saved_digests(folder)
    sums = {**saved.get("frozen", {}), **saved.get("params", {})}
    stored = Stored(*weight_folders(folder))
    if not set(stored.specs) <= set(sums):
        sums = stored_sums(stored)
    adapter.base.check({name: sums[name] for name in stored.specs}, folder, adapter.folder)
