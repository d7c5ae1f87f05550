"""`kangaroo quickstart --ablate`: the same run without one part of the design at a time.

Each variant starts from the last checkpoint that it shares with the complete run, trains the same number of
steps, and answers the same held-out questions.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.config import STAGES, ModelConfig, tokens_per_group
from kangaroo_jax.corpus.make import Corpus
from kangaroo_jax.evaluation.answering import Answers
from kangaroo_jax.quickstart.evaluating import evaluate_stage
from kangaroo_jax.quickstart.recipe import WARMUP, Recipe, Start
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training import curriculum
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.metrics import read_metrics

PACKING_STEPS = 30  # steps of each side of the packing comparison


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run without one part: the stages that it trains again, its starting point, and its change to the config."""

    name: str
    stages: tuple[str, ...]
    start: str  # a stage's folder in the complete run; "" is what that run began with
    change: Callable[[ConfigDict], None]


def without_times(config: ConfigDict) -> None:
    """No temporal position encoding."""
    config.model.tpe.enabled = False


def without_patchify(config: ConfigDict) -> None:
    """No patchify: every patch of every frame is a token, with as many frames as then fit the same pack."""
    config.model.patchify.enabled = False
    grid_tokens = tokens_per_group(ModelConfig.from_config(config.model), config.data.image_size) + 1
    room = (config.data.tokens_per_pack - 200) // grid_tokens // 2 * 2  # 200 tokens are left for the text
    for key in ("min_frames", "max_frames", "long_min_frames", "long_max_frames", "frames_per_pack"):
        config.data[key] = min(config.data[key], room)


def without_curriculum(config: ConfigDict) -> None:
    """No curriculum: the data and shapes of the last stage from the start, with all weights training."""
    config.optimizer.trainable = ((".*", 1.0),)


def without_freezing(config: ConfigDict) -> None:
    """No frozen decoder: in every stage it trains as in the last two."""
    rules = config.optimizer.trainable
    config.optimizer.trainable = tuple(rule for rule in rules if rule[0] != ".*") + (("llm/.*", 0.2), (".*", 1.0))


_TIMES = Variant("without temporal position encoding", STAGES[1:], STAGES[0], without_times)
VARIANTS = {
    "tiny": (
        _TIMES,
        Variant("without patchify", STAGES[2:], STAGES[1], without_patchify),
        Variant("without curriculum", STAGES[4:], WARMUP, without_curriculum),
    ),
    "smol": (_TIMES, Variant("with a decoder that trains from stage 1 on", STAGES, "", without_freezing)),
}


def run(
    workdir: Path,
    recipe: Recipe,
    corpus: Corpus,
    data: Path,
    start: Start,
    *,
    seed: int,
    adjust: curriculum.Adjust,
    tell: Tell = print,
) -> list[dict[str, Any]]:
    """Train and evaluate every variant of the finished quickstart in `workdir`; rows for the table of the report.

    `data` is the folder of stage files that the complete run read, `start` what it began with,
    `adjust` changed its stages. A row has `name`,
    `steps` and `metrics`; the rows on packing have samples and steps a minute. Finished variants are not run again.
    """
    rows = [row("complete", workdir / STAGES[-1], steps_of(workdir, STAGES))]
    for variant in VARIANTS[recipe.name]:
        folder = workdir / "ablations" / variant.name.replace(" ", "_")
        total = steps_of(workdir, STAGES)

        def change(name: str, config: ConfigDict, variant: Variant = variant, total: int = total) -> None:
            adjust(name, config)
            done = json.loads((workdir / name / "done.json").read_text(encoding="utf-8"))
            config.train.steps = total if variant.change is without_curriculum else done["steps"]
            variant.change(config)

        curriculum.run(
            recipe.name,
            folder,
            data=data,
            tokenizer=start.tokenizer,
            stages=variant.stages,
            init_from=workdir / variant.start if variant.start else start.init_from,
            overrides={"seed": seed},
            adjust=change,
            tell=tell,
        )
        last = folder / variant.stages[-1]
        evaluate_stage(last.name, last, corpus, recipe, tell)
        rows.append(row(variant.name, last, total))
        tell(f"{variant.name}: {rows[-1]['metrics']}")
    rows += packing_rows(workdir, recipe, data, start.tokenizer, tell)
    return rows


def steps_of(workdir: Path, stages: Sequence[str]) -> int:
    """Training steps of these stages of the complete run."""
    return sum(json.loads((workdir / name / "done.json").read_text(encoding="utf-8"))["steps"] for name in stages)


def row(name: str, stage: Path, steps: int) -> dict[str, Any]:
    """A line of the table; `time_questions` is the share of right answers to questions about times."""
    answers = Answers.from_json(json.loads((stage / "eval.json").read_text(encoding="utf-8")))
    timed = [r["correct"] for r in answers.records if r["question_kind"] in ("duration", "second_t")]
    metrics = {key: round(answers.metrics()[key], 4) for key in ("short_mcq", "long_mcq", "open_exact")}
    metrics["time_questions"] = round(sum(timed) / max(len(timed), 1), 4)
    return {"name": name, "steps": steps, "metrics": metrics}


def packing_rows(workdir: Path, recipe: Recipe, data: Path, tokenizer: Path, tell: Tell) -> list[dict[str, Any]]:
    """Samples and steps a minute of stage 4 with and without packing, from the logs of a few steps each."""
    rows = []
    for name, bins in (("with packing", None), ("without packing", 0)):
        folder = workdir / "ablations" / name.replace(" ", "_")
        config = curriculum.stage(
            STAGES[3],
            recipe.name,
            data=data,
            tokenizer=tokenizer,
            init_from=str(workdir / "stage3_refine"),
        )
        config.data.packing_bins = config.data.packing_bins if bins is None else bins
        config.train.update(steps=PACKING_STEPS, checkpoint_every=PACKING_STEPS)
        train(config, folder, tell=tell)
        lines = read_metrics(folder / "metrics.jsonl")[5:]  # after the compilation
        minutes = sum(line["seconds"] for line in lines) / 60
        samples = sum(line["samples"] for line in lines)
        places = config.data.packs_per_batch * config.data.tokens_per_pack
        rows.append(
            {
                "name": name,
                "steps_per_minute": round(len(lines) / minutes, 1),
                "samples_per_minute": round(samples / minutes, 1),
                "useful_token_share": round(sum(line["tokens"] for line in lines) / places / len(lines), 3),
            }
        )
    return rows
