"""Answers held-out questions by generation, and measures the share of right answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.evaluation.asking import ask_model
from kangaroo_jax.evaluation.benchmarks.quickstart import QUICKSTART, read_file
from kangaroo_jax.evaluation.prompting import tasks_of
from kangaroo_jax.evaluation.samples import Samples
from kangaroo_jax.evaluation.scoring import is_correct, score
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.system.files import make_folder
from kangaroo_jax.system.json_text import read_objects
from kangaroo_jax.system.progress import Tell

_METRICS = {
    "image_mcq": {"split": "image", "format": "mcq"},
    "short_mcq": {"split": "short", "format": "mcq"},
    "long_mcq": {"split": "long", "format": "mcq"},
    "open_exact": {"split": "short", "format": "open"},
    "long_open_exact": {"split": "long", "format": "open"},
    "en_mcq": {"split": "short", "format": "mcq", "language": "en"},
    "zh_mcq": {"split": "short", "format": "mcq", "language": "zh"},
}


@dataclasses.dataclass(frozen=True)
class Answers:
    """Records of evaluation files, each with its `split`, `prediction` and whether it is `correct`."""

    records: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return {"metrics": self.metrics(), "by_kind": self.by_kind(), "records": list(self.records)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Answers":
        """The answers that `to_json` wrote."""
        return cls(tuple(value["records"]))

    def share(self, **wanted: str) -> float:
        """Share of right answers among records with these values (`split`, `format`, `language`, ...)."""
        chosen = [r["correct"] for r in self._of(wanted)]
        return sum(chosen) / max(len(chosen), 1)

    def _of(self, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
        return [r for r in self.records if all(r[key] == value for key, value in wanted.items())]

    def metrics(self) -> dict[str, float]:
        """Shares of right answers to what was asked; `open_exact`, `en_mcq` and `zh_mcq` cover the short clips only."""
        return {name: self.share(**wanted) for name, wanted in _METRICS.items() if self._of(wanted)}

    def by_kind(self) -> dict[str, dict[str, float]]:
        """`split/kind` -> accuracy and count of its multiple-choice questions."""
        table = {}
        for split in dict.fromkeys(r["split"] for r in self.records):
            rows = [r for r in self.records if r["split"] == split]
            for name, entry in score(rows, [r["prediction"] for r in rows])["by_kind"].items():
                if name.startswith("mcq/"):
                    table[f"{split}/{name.removeprefix('mcq/')}"] = {k: entry[k] for k in ("accuracy", "count")}
        return table


def evaluate(
    checkpoint: str | Path,
    files: Mapping[str, Path],
    workdir: Path,
    *,
    max_new_tokens: int = 16,
    at_a_time: int = 16,
    dtype: str | None = None,
    languages: Sequence[str] = ("en", "zh"),
    tell: Tell = print,
) -> Answers:
    """Answer the questions of `files` (split -> JSONL) with a checkpoint, greedily, and mark the answers.

    Each record is a LLaVA conversation that ends with the true answer, and has `answer`, `options`,
    `format`, `question_kind` and `language`. Frames are sampled as in the stage that wrote the checkpoint. Answers are
    kept in `workdir/samples.jsonl`, and a question that has one there is not asked again (`samples`). `dtype` is what
    the model computes in; None is the checkpoint's. Questions in other `languages` are left out.

    Raises:
        UserError: the checkpoint or a medium cannot be read.
    """
    marked = []
    with Samples(make_folder(workdir)) as samples, Kangaroo.load(checkpoint, dtype=dtype) as model:
        for split, path in files.items():
            benchmark = dataclasses.replace(QUICKSTART, name=split)
            asked = [
                (record, question)
                for record, question in zip(read_objects(path), read_file(path), strict=True)
                if record["language"] in languages
            ]
            questions = [question for _, question in asked]
            tasks = tasks_of(benchmark, questions, max_new_tokens=max_new_tokens)
            ask_model(model, tasks, samples, at_a_time=at_a_time, strict=True)
            for record, question in asked:
                prediction = samples.latest[split, "", question.id]["text"]
                correct = is_correct(record, prediction)
                marked.append({**record, "split": split, "prediction": prediction, "correct": correct})
            right = sum(r["correct"] for r in marked if r["split"] == split)
            tell(f"answered {len(questions)} {split} questions, {right} right")
    return Answers(tuple(marked))
