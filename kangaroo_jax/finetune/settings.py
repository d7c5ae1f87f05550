"""Chooses a stage's settings for fine-tuning: what trains, how fast, in which packs, for how many steps."""

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.frozen import weight_folders
from kangaroo_jax.checkpoints.stored import Stored, stored_form
from kangaroo_jax.errors import UserError

MEASUREMENTS = 5  # of the held-out part in a run
LEAST_STEPS = 250  # of a tiny model, which learns by steps
_RATES = {"tiny": 2e-3, "base_100m": 1e-3, "kangaroo_8b": 1e-4}  # ten times those of full training
_TOKENS, _FRAMES = 10_240, 64  # most of a pack, which fit one chip beside 8B's weights
_PACKS = 4


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user asks for; 0 and "" are left to `make_stage`."""

    rank: int = 16
    alpha: float = 32.0
    targets: str = ""
    quantize: str = ""
    full: bool = False
    keep_state: bool = False
    freeze: tuple[str, ...] = ()
    epochs: float = 0.0
    learning_rate: float = 0.0
    packs: int = 0
    frames: int = 0
    patience: int = 3
    seed: int = 0


def make_stage(
    base: Path, train: Path, held_out: Path, questions: Path | None, replay: Sequence[str], wishes: Wishes
) -> ConfigDict:
    """The stage's config without its number of steps, see `with_steps`.

    Args:
        base: folder of a checkpoint with a whole model.
        train, held_out: annotation files of the examples.
        questions: the held-out examples whose answers can be scored; None where there are none.
        replay: annotation files of what the base has learnt, drawn as often as the examples.
        wishes: what the user asks for.

    Raises:
        UserError: the base is an adapter or no checkpoint, or the rank is impossible.
    """
    folder = reading.refuse_adapter(reading.find(base))
    config = ConfigDict(reading.load_config(folder).to_dict())
    preset = config.model.preset
    if not wishes.full and wishes.rank < 1:
        raise UserError("--rank=0: an adapter has a rank of at least 1; --full trains the weights themselves")
    stored = stored_form(Stored(*weight_folders(folder))) or ""
    config.stage, config.init_from, config.seed = "finetune", str(folder), wishes.seed
    config.allow_changes, config.init_other_rope = (), False
    lora = {"rank": 0 if wishes.full else wishes.rank, "alpha": wishes.alpha, "quantize": wishes.quantize or stored}
    lora["keep_state"] = wishes.keep_state or wishes.full
    if wishes.targets:
        lora["targets"] = wishes.targets
    config.lora.update(lora)
    rate = wishes.learning_rate or _RATES.get(preset, 1e-4) * (0.1 if wishes.full else 1.0)
    rules = (*((pattern, None) for pattern in wishes.freeze), (".*", 1.0))
    config.optimizer.update(kind="adamw", learning_rate=rate, trainable=rules, weight_decay=0.0)
    config.optimizer.update(warmup_fraction=0.05, final_fraction=0.1, frozen_dtype=config.model.dtype)

    data = config.data
    data.update(train=(str(train), *replay), weights=(1.0, *(1.0 / len(replay),) * len(replay)) if replay else ())
    data.update(tokenizer=str(reading.find_tokenizer(folder)), media_root="", registry="", shuffle=True)
    data.update(loss_on="assistant", strict=False)
    most = wishes.frames or (0 if preset == "tiny" else _FRAMES)
    if most:
        for key in ("max_frames", "long_max_frames", "min_frames", "long_min_frames"):
            data[key] = min(data[key], most)
        data.frames_per_pack = min(data.frames_per_pack, most) if preset != "tiny" else data.frames_per_pack
    if preset != "tiny":
        data.tokens_per_pack = min(data.tokens_per_pack, _TOKENS)
        data.max_sample_tokens = min(data.max_sample_tokens, data.tokens_per_pack)
    devices = jax.device_count()
    packs = wishes.packs or (2 if preset == "tiny" else _PACKS)
    data.packs_per_batch = -(-packs // devices) * devices
    config.train.update(epochs=0.0, mesh=(), accumulate=0, profile=(), log_every=10, keep_checkpoints=1, keep_period=0)
    config.train.update(tensorboard=importlib.util.find_spec("tensorboard") is not None)
    config.eval.update(held_out=(str(held_out),), best="loss", patience=wishes.patience, share=1.0, data="", prompt="")
    config.eval.benchmarks = (str(questions),) if questions is not None else ()
    return config


def with_steps(config: ConfigDict, own: int, own_in_a_step: float, epochs: float) -> None:
    """Set the number of steps for `epochs` over the user's `own` examples, and when the held-out part is measured."""
    an_epoch = own / max(own_in_a_step, 1e-9)
    steps = math.ceil((epochs or 3.0) * an_epoch)
    if not epochs and config.model.preset == "tiny":
        steps = max(steps, LEAST_STEPS)
    every = math.ceil(steps / MEASUREMENTS)
    config.train.update(steps=steps, checkpoint_every=every)
    config.eval.every = every
