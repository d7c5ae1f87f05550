"""Runs the stages one after another, each from the last one's weights; restartable at any point in any stage."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.config import STAGES, StageConfig
from kangaroo_jax.config_files import load_config
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.distributed import barrier, is_main
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.measuring import MakeEvaluator

AfterStage = Callable[[str, ConfigDict, Path], None]
Adjust = Callable[[str, ConfigDict], None]
Explained = Callable[[StageConfig], contextlib.AbstractContextManager[Any]]


def run(
    preset: str,
    workdir: str | Path,
    *,
    data: str | Path,
    tokenizer: str | Path,
    stages: Sequence[str] = STAGES,
    init_from: str | Path = "",
    overrides: Mapping[str, Any] | None = None,
    adjust: Adjust | None = None,
    after_stage: AfterStage | None = None,
    evaluator: MakeEvaluator | None = None,
    explained: Explained = contextlib.nullcontext,
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """Run `stages` in order; a finished stage is not run again, an interrupted one goes on from its last checkpoint.

    Args:
        preset: a preset of `config.PRESETS`.
        workdir: every stage gets a folder of its name here.
        data: folder of `stage1.jsonl` ... `stage5.jsonl` (the number is that of the stage's name) and their media.
        tokenizer: the tokenizer's file.
        stages: names of files in `configs/`.
        init_from: checkpoint that the first stage starts from; "" is a fresh start.
        overrides: config keys ("optimizer.learning_rate") set in every stage.
        adjust: called with a stage's name and config before it runs, to change what an override cannot.
        after_stage: called after each finished stage: (name, config, stage folder).
        evaluator: see `train`.
        explained: entered around each stage, given its config; says what an error means.
        tell: prints a line.

    Returns:
        For each stage its record (`done.json`): name, steps, seconds, useful_token_share.

    Raises:
        UserError: data is missing, an override is unknown, or a checkpoint does not fit.
    """
    workdir, previous, records = Path(workdir), str(init_from), []
    for name in stages:
        folder = workdir / name
        config = stage(name, preset, data=data, tokenizer=tokenizer, init_from=previous, overrides=overrides)
        if adjust is not None:
            adjust(name, config)
        if not (folder / "done.json").exists():
            with explained(StageConfig.from_config(config)):
                result = train(config, folder, evaluator=evaluator, tell=tell)
            record = {
                "name": name,
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "useful_token_share": round(result.useful_token_share, 4),
            }
            if is_main():
                write_json(folder / "done.json", record)
            barrier(f"{name} done")
        if after_stage is not None and is_main():
            after_stage(name, config, folder)
        records.append(json.loads((folder / "done.json").read_text(encoding="utf-8")))
        previous = str(folder)
    return records


def stage(
    name: str,
    preset: str,
    *,
    data: str | Path,
    tokenizer: str | Path,
    init_from: str,
    overrides: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """The config of a stage with its data, tokenizer and first weights filled in. Raises UserError."""
    config = load_config(f"{name}:{preset}")
    number = name.removeprefix("stage").split("_", 1)[0]
    annotations = Path(data) / f"stage{number}.jsonl"
    if not annotations.is_file():
        raise UserError(f"{annotations}: no such file; --data is a folder with stage1.jsonl ... stage5.jsonl")
    config.data.train = (str(annotations),)
    config.data.tokenizer = str(tokenizer)
    config.init_from = init_from
    for key, value in (overrides or {}).items():
        try:
            config.update_from_flattened_dict({key: value})
        except KeyError as error:
            raise UserError(f"config.{key}: no such key ({error})") from error
    return config
