"""Scores a checkpoint on benchmarks while its stage trains: `config.eval.benchmarks`, the evaluator of the loop."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.asking import ask_model
from kangaroo_jax.evaluation.benchmarks.files import is_there
from kangaroo_jax.evaluation.benchmarks.question import Question
from kangaroo_jax.evaluation.results import result_of
from kangaroo_jax.evaluation.running import Settings, Share, read_questions, tasks_in
from kangaroo_jax.evaluation.samples import Samples


class BenchmarkEvaluator:
    """Asks every checkpoint the same share of the questions; see `training.measuring.Evaluator`."""

    def __init__(self, config: StageConfig) -> None:
        """Read the questions. Raises UserError: a file or a name is wrong, or a question cannot be scored here."""
        told = config.eval
        self._settings = Settings(told.benchmarks, told.data, told.prompt)
        self._asked = [(one, some_of(questions, told.share)) for one, questions in read_questions(self._settings)]
        for benchmark, questions in self._asked:
            if all(question.answer is None or question.kind == "open" for question in questions):
                raise UserError(f"config.eval.benchmarks: {benchmark.name} has no public answers that need no judge")
            missing = [medium.path for q in questions for medium in q.media if not is_there(medium)]
            if missing:
                raise UserError(f"config.eval.benchmarks: {benchmark.name}: {missing[0]}: there is no such file")

    def ask(self, checkpoint: Path, folder: Path, part: int, parts: int) -> None:
        """Answer a part of the questions with a checkpoint's weights, on this process's first device."""
        from kangaroo_jax.inference.chat import Kangaroo
        from kangaroo_jax.inference.requests import EngineError

        share = Share(part, parts)
        with Samples(folder, share.name) as samples, Kangaroo.load(checkpoint) as model:
            try:
                for benchmark, questions in self._asked:
                    ask_model(
                        model, [t for t in tasks_in(benchmark, questions, self._settings) if share.has(t)], samples
                    )
            except EngineError as error:
                raise UserError(f"{checkpoint}: the model cannot go on ({error}); run this again to go on") from None

    def scores(self, folder: Path) -> dict[str, float]:
        """Benchmark -> its strict score."""
        with Samples(folder) as samples:
            results = [result_of(one, questions, samples, self._settings.of(one)) for one, questions in self._asked]
        return {result["benchmark"]: float(result["protocols"]["strict"]["score"]) for result in results}


def some_of(questions: Sequence[Question], share: float) -> list[Question]:
    """A share of the questions, at least one, in their order: the same whenever it is asked for."""

    def drawn(number: int) -> str:
        return hashlib.sha256(questions[number].id.encode()).hexdigest()

    count = max(1, round(share * len(questions)))
    return [questions[number] for number in sorted(sorted(range(len(questions)), key=drawn)[:count])]
