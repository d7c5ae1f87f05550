"""Compares the config and tokenizer of a checkpoint with the current ones: some may change when a run goes on."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from kangaroo_jax.checkpoints.reading import find_tokenizer, load_stage
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.parameters import abstract_model, multiplier
from kangaroo_jax.training.state import rules_of

# Settings of how a model is computed, which change results only by rounding. Any other setting makes another model.
_COMPUTATION = ("preset", "dtype", "scan", "attention", "vision.remat", "llm.remat", "llm.loss_chunk")
_UNSAID = ("allow_changes",)
_LORA = ("lora.rank", "lora.alpha", "lora.rslora", "lora.targets", "lora.quantize")


def check_resume(folder: Path, config: StageConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Lines about differences from the checkpoint `folder`; `shapes` are those of the model of `config`.

    Raises UserError that names the first key that cannot change within a stage, or that makes another model and is
    not in `config.allow_changes`.
    """
    saved = load_stage(folder)
    before, now = dict(saved.flat()), dict(config.flat())
    differ = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    scaling = "model.llm.rope_scaling."
    if before[f"{scaling}factor"] == now[f"{scaling}factor"] == 1.0:
        differ = {key: values for key, values in differ.items() if not key.startswith(scaling)}  # no scaling
    for key, values in differ.items():
        if key.startswith("model.") and key.removeprefix("model.") not in _COMPUTATION:
            if dict(abstract_model(saved.model, saved.lora).shapes) != dict(shapes):
                raise _cannot(folder, key, *values)
            if key not in config.allow_changes:
                raise _not_asked(f"{folder}: config.{key} was {values[0]!r} and is now {values[1]!r}", key)
    for key in ("optimizer.kind", *_LORA, "optimizer.trainable"):
        if key in differ and (key != "optimizer.trainable" or _trained(saved, shapes) != _trained(config, shapes)):
            raise _cannot(folder, key, *differ[key])
    for key in ("optimizer.spike_factor", "optimizer.ema"):  # other numbers are fine, but not none in their place
        if key in differ and bool(before[key]) != bool(now[key]):
            raise _cannot(folder, key, *differ[key])
    if "optimizer.spike_window" in differ and now["optimizer.spike_factor"]:
        raise _cannot(folder, "optimizer.spike_window", *differ["optimizer.spike_window"])
    return [f"config.{key} was {a!r}, is now {b!r}" for key, (a, b) in differ.items() if key not in _UNSAID]


def _trained(config: StageConfig, shapes: Iterable[str]) -> set[str]:
    return {path for path in shapes if multiplier(path, rules_of(config)) is not None}


def check_tokenizer(folder: Path, config: StageConfig, tokenizer: Tokenizer) -> str:
    """A line if the tokenizer beside the checkpoint `folder` makes other tokens than `tokenizer`, else "".

    It is also "" if there is no tokenizer to compare. Raises UserError if they differ and "data.tokenizer" is not in
    `config.allow_changes`.
    """
    try:
        kept = find_tokenizer(folder)
    except UserError:
        return ""
    given = tokenizer_file(config.data.tokenizer)
    before = load_tokenizer(kept)
    same_files = kept.read_bytes() == given.read_bytes() and before.settings == tokenizer.settings
    if same_files or same_tokens(before, tokenizer):
        return ""
    what = "another tokenizer" if before.settings == tokenizer.settings else "a tokenizer with another chat template"
    line = f"{given}: is {what} than {kept}, with which the weights of {folder} were trained"
    if "data.tokenizer" not in config.allow_changes:
        raise _not_asked(line, "data.tokenizer")
    return line


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers, perhaps of different kinds, have the same pieces by id and the same chat format."""
    return (
        a.vocab_size == b.vocab_size
        and a.stop_ids == b.stop_ids
        and a.settings == b.settings
        and all(a.name(i) == b.name(i) and a.decode([i]) == b.decode([i]) for i in range(a.vocab_size))
    )


def _cannot(folder: Path, key: str, before: Any, now: Any) -> UserError:
    return UserError(
        f"{folder}: config.{key} was {before!r} and is now {now!r}: it cannot change within a stage; set it back, or "
        "begin in another workdir"
    )


def _not_asked(line: str, key: str) -> UserError:
    return UserError(f"{line}; set it back, or let it change on purpose with --config.allow_changes='(\"{key}\",)'")
