"""Checks a stage's config before anything runs: values that would spoil a run, or end it hours later."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kangaroo_jax.config import EvalConfig, StageConfig
from kangaroo_jax.config_files import nearest
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.lora import is_factor
from kangaroo_jax.models.parameters import multiplier
from kangaroo_jax.models.quantized import FORMATS
from kangaroo_jax.models.stack import REMAT_POLICIES
from kangaroo_jax.training.guard import LEAST_NORMS
from kangaroo_jax.training.optimizer import KINDS, MOMENT_DTYPES

ON_NONFINITE = ("stop", "skip")
DTYPES = ("float32", "bfloat16", "float16")
_REMAT = ("auto", *REMAT_POLICIES)

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "model.dtype": DTYPES,
    "model.vision.remat": _REMAT,
    "model.llm.remat": _REMAT,
    "optimizer.kind": KINDS,
    "optimizer.moment_dtype": MOMENT_DTYPES,
    "optimizer.frozen_dtype": DTYPES,
    "lora.quantize": ("", *FORMATS),
    "train.on_nonfinite": ON_NONFINITE,
}
_AT_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("train.steps", "train.log_every", "train.checkpoint_every", "train.nonfinite_in_a_row"), 1),
    **dict.fromkeys(("train.keep_checkpoints", "train.keep_period", "train.accumulate"), 0),
    **dict.fromkeys(("train.checkpoint_minutes", "train.epochs"), 0.0),
    **dict.fromkeys(("data.tokens_per_pack", "data.packs_per_batch", "data.image_size"), 1),
    **dict.fromkeys(("data.min_frames", "data.max_frames", "data.long_min_frames", "data.long_max_frames"), 0),
    "data.frames_per_pack": 0,
    **dict.fromkeys(("data.packing_bins", "data.num_workers", "data.cache_mib", "data.media_cache_gib"), 0),
    **dict.fromkeys(("data.long_seconds", "data.decode_seconds"), 0.0),
    "data.max_sample_tokens": 1,
    **dict.fromkeys(("eval.every", "eval.patience"), 0),
    "lora.rank": 0,
    "optimizer.spike_factor": 0.0,
    "optimizer.spike_window": LEAST_NORMS,
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm"), 0.0),
    **dict.fromkeys((f"model.{part}.{key}" for part in ("vision", "llm") for key in ("width", "depth", "heads")), 1),
    **dict.fromkeys(("model.llm.kv_heads", "model.llm.head_dim", "model.llm.vocab_size", "model.llm.loss_chunk"), 1),
}
_ABOVE_ZERO = (
    "lora.alpha",
    "data.fps",
    "train.lost_seconds",
    "optimizer.eps",
    "optimizer.learning_rate",
    "model.llm.rope_theta",
)
_SHARES = ("optimizer.warmup_fraction", "optimizer.final_fraction")  # 0 to 1, both included
_DECAYS = ("optimizer.b1", "optimizer.b2", "optimizer.ema")  # 0 to 1, 1 not included


def check_config(config: StageConfig) -> None:
    """Raise UserError that names the first key with an invalid value, and the valid ones."""
    values = dict(config.flat())
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _bad(key, value, "must be a finite number")
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise _bad(key, values[key], f"one of {', '.join(choices)}{nearest(str(values[key]), choices)}")
    for key, least in _AT_LEAST.items():
        if values[key] < least:
            raise _bad(key, values[key], f"must be at least {least:g}")
    for key in _ABOVE_ZERO:
        if values[key] <= 0:
            raise _bad(key, values[key], "must be above 0")
    for key in _SHARES:
        if not 0 <= values[key] <= 1:
            raise _bad(key, values[key], "is a share, from 0 to 1")
    for key in _DECAYS:
        if not 0 <= values[key] < 1:
            raise _bad(key, values[key], "must be from 0 to below 1")
    if config.lora.rank and not config.init_from:
        raise UserError(f"config.lora.rank is {config.lora.rank}: needs config.init_from, the base that it adapts")
    if config.lora.quantize and not config.lora.rank:
        raise _bad("lora.quantize", config.lora.quantize, "needs config.lora.rank: rounded weights cannot train")
    _check_heads(config)
    _check_sizes(config)
    _check_rules(config.optimizer.trainable)
    _check_profile(config.train.profile)
    _check_eval(config.eval)
    for key in config.allow_changes:
        if key not in values:
            raise UserError(f"config.allow_changes names {key!r}, which is no key{nearest(str(key), values)}")


def check_trainable(config: StageConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise UserError if a parameter matches no rule of `optimizer.trainable`, or no parameter trains."""
    factors = [path for path in shapes if config.lora.rank and is_factor(path)]
    if still := [path for path in factors if multiplier(path, config.optimizer.trainable) is None]:
        raise UserError(
            f"config.optimizer.trainable freezes {still[0]}, which config.lora.targets makes; take what is frozen out "
            "of config.lora.targets"
        )
    if all(not multiplier(path, config.optimizer.trainable) for path in factors or shapes):
        raise UserError(
            "config.optimizer.trainable leaves nothing to train: every parameter is frozen, or has the rate 0; "
            'give at least one rule a multiplier, such as ("projector/.*", 1.0)'
        )


def _bad(key: str, value: Any, wanted: str) -> UserError:
    return UserError(f"config.{key} is {value!r}: {wanted}")


def _check_heads(config: StageConfig) -> None:
    vision, llm = config.model.vision, config.model.llm
    if vision.width % vision.heads:
        raise UserError(f"config.model.vision.width {vision.width} must be a multiple of its heads, {vision.heads}")
    if llm.heads % llm.kv_heads:
        raise UserError(f"config.model.llm.heads {llm.heads} must be a multiple of kv_heads, {llm.kv_heads}")
    if llm.head_dim % 2:
        raise UserError(f"config.model.llm.head_dim {llm.head_dim} must be even: rotary positions turn pairs")


def _check_sizes(config: StageConfig) -> None:
    kernel, data = config.model.patchify.kernel, dict(config.data.flat())
    if len(kernel) != 3 or not all(isinstance(size, int) and size >= 1 for size in kernel):
        raise _bad("model.patchify.kernel", kernel, "frames, rows and columns, each at least 1, such as (2, 2, 2)")
    for least, most in (("min_frames", "max_frames"), ("long_min_frames", "long_max_frames")):
        if data[least] > data[most]:
            raise _bad(f"data.{least}", data[least], f"must be at most data.{most}, {data[most]}")


def _check_rules(rules: Any) -> None:
    """Rules are pairs of a regular expression and a rate at least 0, or None."""
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise _bad("optimizer.trainable", rule, 'every rule is a pair, such as ("vision/.*", 0.1)')
        pattern, rate = rule
        try:
            re.compile(pattern)
        except re.error as error:
            raise _bad("optimizer.trainable", pattern, f"no regular expression ({error})") from None
        if rate is not None and not (isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0):
            raise _bad("optimizer.trainable", rate, f"the rate of {pattern!r} must be a number at least 0, or None")


def _check_eval(told: EvalConfig) -> None:
    if told.every and not told.held_out and not told.benchmarks:
        raise _bad("eval.every", told.every, "name what is measured: config.eval.held_out or config.eval.benchmarks")
    if not 0 < told.share <= 1:
        raise _bad("eval.share", told.share, "is a share, above 0 and at most 1")
    names = [Path(name).stem if name.endswith(".jsonl") else name for name in told.benchmarks]
    for name in names:
        if name == "loss" or names.count(name) > 1:
            raise _bad("eval.benchmarks", told.benchmarks, f"the name {name!r} is taken; rename its file")
    known = [*(["loss"] if told.held_out else []), *names]
    if told.every and told.best and told.best not in known:
        raise _bad("eval.best", told.best, f"one of {', '.join(known)}{nearest(told.best, known)}")


def _check_profile(profile: Any) -> None:
    steps = tuple(profile)
    if steps and not (len(steps) == 2 and all(isinstance(x, int) for x in steps) and 1 <= steps[0] <= steps[1]):
        raise _bad("train.profile", steps, "the first and the last step, such as (100, 105), or ()")
