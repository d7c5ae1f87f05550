"""`.eval_results/NAME.yaml`: a score as a model's page on Hugging Face and its benchmark's leaderboard read it.

The format is that of https://huggingface.co/docs/hub/eval-results; JSON is YAML, so that no package is needed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.evaluation.benchmarks.question import Benchmark
from kangaroo_jax.system.files import make_folder, write_json

FOLDER = ".eval_results"
_WHOLE = 0.99  # share of a benchmark's known questions that its files have: some numbers are of papers, not of files
_DATASET = re.compile(r"huggingface\.co/datasets/([\w.-]+/[\w.-]*\w)")


def write_model_page(workdir: Path, benchmark: Benchmark, result: Mapping[str, Any]) -> Path | None:
    """Write the strict score of a whole benchmark, in percent; returns the file's path.

    None, and no file, where the benchmark has no data set there, a part of its questions was in the files or asked, or
    none counts.
    """
    dataset, strict = _DATASET.search(benchmark.fetch), result["protocols"]["strict"]
    path = workdir / FOLDER / f"{benchmark.name}.yaml"
    partly = strict["unasked"] or result["settings"].get("limit") or result["questions"] < _WHOLE * benchmark.questions
    if not dataset or not strict["counted"] or partly:
        path.unlink(missing_ok=True)  # of an earlier score
        return None
    told = ", ".join(f"{key} {value}" for key, value in result["settings"].items() if value)
    make_folder(path.parent)
    entry = {
        "dataset": {"id": dataset[1], "task_id": "default"},
        "value": round(100 * strict["score"], 2),
        "notes": f"{benchmark.name}, read strictly, every failure wrong; {told}",
    }
    return write_json(path, [entry])
