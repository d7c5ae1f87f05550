"""Orbax checkpoints: weights, optimiser, data iterator and config, saved together or not at all.

    STAGE/checkpoints/STEP/{params,ema,optimizer,data,config,digests,frozen,base}      STAGE/tokenizer.*

`params` is a flat dictionary of the trained weights (float32). Frozen weights (in their stored type) are written once
in a stage, and `frozen` names their folder (`frozen.py`); `weight_folders` returns both. Checkpoints of older versions
hold all weights in `params`. `ema` is the average of the trained weights, where there is one. An adapter's frozen
weights are its base's: `base` names it (`checkpoints.adapters`), and nothing of it is written. `digests` are sums over
the bits of all arrays, compared at reading; older ones lack them.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kangaroo_jax.checkpoints.adapters import BASE, Base
from kangaroo_jax.checkpoints.digests import Digests, digests
from kangaroo_jax.checkpoints.frozen import EMA, FOLDER, weight_folders
from kangaroo_jax.checkpoints.reading import ITEMS, NotFinite, check_digests, damaged, named_if_damaged, restore_arrays
from kangaroo_jax.errors import UserError
from kangaroo_jax.training.array_writing import array_handler
from kangaroo_jax.training.frozen import FrozenWriter
from kangaroo_jax.training.guard import with_ema, without_ema
from kangaroo_jax.training.step import TrainState


class Best:
    """Preserves the checkpoint of one step, whatever else is deleted: a policy of Orbax."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint is to stay."""
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, stage_dir: Path, state: TrainState, *, keep: int = 2, period: int = 0) -> None:
        """Open (or make) `stage_dir/checkpoints`; keep the last `keep` (0: all) and multiples of `period`.

        The size of `state`, which may be abstract, limits how much of a checkpoint is written at a time.
        """
        self.folder = Path(stage_dir).resolve() / "checkpoints"
        self.begun: int | None = None  # step of this process's last save
        self.best = Best()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
                [
                    ocp.checkpoint_managers.LatestN(keep or None),
                    *([ocp.checkpoint_managers.EveryNSteps(period)] if period else []),
                    self.best,
                ]
            ),
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "params": array_handler(state.params),
                EMA: array_handler(state.params),
                "optimizer": array_handler(state.opt_state),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                "digests": ocp.JsonCheckpointHandler(),
                FOLDER: ocp.JsonCheckpointHandler(),
                BASE: ocp.JsonCheckpointHandler(),
            },
        )
        self._frozen = FrozenWriter(self.folder, array_handler(state.frozen))
        self._frozen_sums: Digests | None = None  # digests of the frozen weights that `keep_frozen` wrote
        self._base: Base | None = None

    def latest(self) -> int | None:
        """The last checkpoint's step, None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def latest_folder(self) -> Path | None:
        """The last checkpoint's folder, None if there is none. Raises UserError if a part of it is missing."""
        step = self.latest()
        if step is None:
            return None
        folder = self.folder / str(step)
        missing = [item for item in ITEMS if not (folder / item).is_dir()]
        if missing:
            raise damaged(folder, f"{', '.join(missing)} missing")
        weight_folders(folder)
        return folder

    def keep_frozen(self, state: TrainState) -> None:
        """Start writing the stage's frozen weights; `save` does it if this was not called. See `frozen.py`.

        Returns once they are copied off the devices. Raises NotFinite if they are not finite.
        """
        self._frozen_sums = self._sums({FOLDER: state.frozen}, int(state.step))[FOLDER]
        if state.frozen:
            self._frozen_name = self._frozen.write(state.frozen, self._frozen_sums)

    def keep_base(self, base: Base) -> None:
        """The stage's frozen weights are those of a checkpoint, which is named in place of being written."""
        self._base = base

    def _sums(self, items: Mapping[str, Any], step: int) -> dict[str, Digests]:
        """The digests of each item. Raises NotFinite."""
        sums, not_finite = {}, []
        for item, tree in items.items():
            sums[item], wrong = digests(tree)
            not_finite += wrong
        if not_finite:
            raise NotFinite(
                f"step {step}: {not_finite[0]} is not finite, as are {len(not_finite) - 1} more arrays; the "
                f"state is not saved, and the checkpoints in {self.folder} stay as they are"
            )
        return sums

    def save(self, state: TrainState, data_state: bytes, config: Mapping[str, Any]) -> None:
        """Start saving; returns once the arrays are copied off the devices.

        Raises NotFinite, and saves nothing, if the state is not finite.
        """
        if self._frozen_sums is None and self._base is None:
            self.keep_frozen(state)
        opt_state, ema = without_ema(state.opt_state)
        optimizer = {"opt_state": opt_state, "step": state.step}
        self.begun = int(state.step)
        averages = {EMA: ema} if ema else {}
        sums = self._sums({"params": state.params, **averages, "optimizer": optimizer}, self.begun)
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in averages.items()}
        if self._base is not None:
            items[BASE] = ocp.args.JsonSave(self._base.to_json())
        if self._frozen_sums:
            self._frozen.wait()
            sums[FOLDER] = self._frozen_sums
            items[FOLDER] = ocp.args.JsonSave({"folder": self._frozen_name})
        self._manager.save(
            self.begun,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(optimizer),
                data=ocp.args.JsonSave({"iterator": base64.b64encode(data_state).decode()}),
                config=ocp.args.JsonSave(dict(config)),
                digests=ocp.args.JsonSave(sums),
                **items,
            ),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, bytes]:
        """The last checkpoint in the shapes and shardings of `state` (perhaps abstract), and the data's state.

        After `keep_base` the frozen weights of `state` stay. Raises UserError if it is damaged, naming the one before.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        folder = self.latest_folder()
        if folder is None:
            raise UserError(f"{self.folder}: holds no checkpoint")
        own, *apart = weight_folders(folder)
        opt_state, ema = without_ema(abstract.opt_state)
        averages = {EMA: ema} if ema else {}
        with named_if_damaged(folder):
            restored = self._manager.restore(
                self.latest(),
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(
                        abstract.params if apart or self._base else {**abstract.params, **abstract.frozen}
                    ),
                    optimizer=ocp.args.StandardRestore({"opt_state": opt_state, "step": abstract.step}),
                    data=ocp.args.JsonRestore(),
                    **{item: ocp.args.StandardRestore(tree) for item, tree in averages.items()},
                ),
            )
            iterator = base64.b64decode(restored["data"]["iterator"])
        check_digests(folder, {item: restored[item] for item in ("params", *averages, "optimizer")})
        params = {**(state.frozen if self._base else {}), **restored["params"]}
        if apart:
            params |= restore_arrays(folder, FOLDER, apart[0], abstract.frozen)
        new = TrainState(
            step=restored["optimizer"]["step"],
            params={k: params[k] for k in state.params},
            frozen={k: params[k] for k in state.frozen},
            opt_state=with_ema(restored["optimizer"]["opt_state"], restored[EMA] if ema else {}),
        )
        return new, iterator

    def wait(self) -> None:
        """Wait until the saves that were started are on disk."""
        self._frozen.wait()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the folder."""
        self._frozen.close()
        self._manager.wait_until_finished()
        self._manager.close()
