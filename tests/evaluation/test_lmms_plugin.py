"""lmms-eval as it is asks through the plug-in what `kangaroo eval` asks, and scores planted answers alike.

It runs where lmms-eval can be imported (docs/evaluation.md says how to install it), and is skipped elsewhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from kangaroo_jax.cli.main import main
from tests.evaluation.test_marking import result

TASK = """
task: local_videomme
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/videomme/test-00000-of-00001.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function utils.videomme_doc_to_visual
doc_to_text: !function utils.videomme_doc_to_text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 16
process_results: !function utils.videomme_process_results
metric_list:
  - metric: videomme_perception_score
    aggregation: !function utils.videomme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer with the option's letter from the given choices directly."
"""


def rows_of(workdir: Path) -> dict[str, tuple]:
    """What was asked (tokens, media, seconds, settings) and answered, by the identity of the answer."""
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    return {row["key"]: (row["identity"], row["frame_times"], row["text"]) for row in rows}


@pytest.mark.slow
def test_the_harness_asks_and_scores_what_kangaroo_eval_does(make_checkpoint, data, tmp_path):
    folder, checkpoint = data("video-mme"), make_checkpoint("float32")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "local.yaml").write_text(TASK.format(folder=folder / "video-mme"))
    (tmp_path / "task" / "utils.py").write_text("from lmms_eval.tasks.videomme.utils import *\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "videomme").symlink_to(folder / "video-mme")
    told = f"checkpoint={checkpoint},workdir={tmp_path / 'theirs'},frames=4"
    words = [
        "--model=kangaroo",
        f"--model_args={told}",
        "--tasks=local_videomme",
        f"--include_path={tmp_path / 'task'}",
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lmms_eval", *words, f"--output_path={tmp_path / 'out'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ours = [f"--checkpoint={checkpoint}", "--benchmark=video-mme", f"--data={folder}", f"--workdir={tmp_path / 'ours'}"]
    assert main(["eval", *ours, "--prompt=lmms-eval", "--frames=4"]) == 0
    assert rows_of(tmp_path / "theirs") == rows_of(tmp_path / "ours") and len(rows_of(tmp_path / "ours")) == 6
    theirs = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())["results"]["local_videomme"]
    found = json.loads((tmp_path / "ours" / "results.json").read_text())["results"][0]["protocols"]["lmms-eval"]
    score = next(value for key, value in theirs.items() if key.startswith("videomme_perception_score,"))
    assert score == pytest.approx(100 * found["score"], abs=1e-4)


def test_planted_answers_get_the_harness_score(data, monkeypatch):
    from lmms_eval.tasks.videomme import utils

    planted = ["B. blue", "The answer is D", "Answer: c", "", "It is Blue (B)", "(D)"]
    found = result("video-mme", data, planted)
    docs = [{"question_id": str(n), "duration": "short", "domain": "Knowledge"} for n in range(6)]
    docs = [doc | {"sub_category": "Law", "task_type": "Counting Problem", "videoID": "x"} for doc in docs]
    told = [
        utils.videomme_process_results(doc | {"answer": "BD"[number % 2]}, [text])["videomme_perception_score"]
        for number, (doc, text) in enumerate(zip(docs, planted, strict=True))
    ]
    assert utils.videomme_aggregate_results(told) == pytest.approx(
        100 * found["protocols"]["lmms-eval"]["score"], abs=1e-4
    )
