"""Answers the held-out questions with the model of a stage."""

import json
from pathlib import Path

from kangaroo_jax.config import STAGES
from kangaroo_jax.corpus.make import Corpus
from kangaroo_jax.evaluation.answering import Answers, evaluate
from kangaroo_jax.quickstart.recipe import ANSWERS_DTYPE, Recipe
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.progress import Tell


def evaluate_stage(name: str, folder: Path, corpus: Corpus, recipe: Recipe, tell: Tell) -> Answers:
    """The answers of stage `name`, whose checkpoint is in `folder`; they are kept in its `eval.json`.

    Questions are asked in the languages that the stages have taught so far.
    """
    path = folder / "eval.json"
    if path.exists():
        return Answers.from_json(json.loads(path.read_text(encoding="utf-8")))
    taught = recipe.mixture.chinese[: STAGES.index(name) + 1]
    answers = evaluate(
        folder,
        corpus.eval_files,
        folder / "eval",
        max_new_tokens=recipe.answer_tokens,
        dtype=ANSWERS_DTYPE,
        languages=("en", "zh") if any(taught) else ("en",),
        tell=tell,
    )
    write_json(path, answers.to_json())
    tell(f"{name}: " + ", ".join(f"{key} {value:.0%}" for key, value in answers.metrics().items()))
    return answers
