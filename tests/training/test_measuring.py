"""What is measured while a stage trains: held-out loss, scores, the best checkpoint, an early end; also after kills."""

import json
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.cli.evaluator import evaluator
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.held_out import HeldOutBatches
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_objects
from kangaroo_jax.training import loop, measuring
from kangaroo_jax.training.loop import train
from kangaroo_jax.training.measuring import best_of, history
from kangaroo_jax.training.metrics import read_metrics
from tests.training.conftest import COLOURS
from tests.training.test_loop import small_stage

pytestmark = pytest.mark.usefixtures("one_device")


class Scripted:
    """An evaluator whose scores are given."""

    def __init__(self, scores: list[float]) -> None:
        self.left, self.asked = list(scores), list[int]()

    def ask(self, checkpoint: Path, folder: Path, part: int, parts: int) -> None:
        assert reading.find(checkpoint) == checkpoint.resolve() and (part, parts) == (1, 1)
        self.asked.append(int(checkpoint.name))

    def scores(self, folder: Path) -> dict[str, float]:
        return {"quiz": self.left.pop(0)}


def measured_stage(corpus: Path, **keys):
    told = {"eval.every": 2, "eval.held_out": (str(corpus / "stage2.jsonl"),), "train.keep_checkpoints": 1, **keys}
    return small_stage("stage4_instruct", corpus, **told)


def test_measurements_stand_in_the_log_and_the_line_and_the_best_checkpoint_stays(corpus, tmp_path):
    lines, quiz = [], Scripted([0.5, 0.75, 0.75, 0.25])
    config = measured_stage(corpus, **{"eval.benchmarks": ("quiz.jsonl",), "eval.best": "quiz"})
    train(config, tmp_path, evaluator=lambda _: quiz, tell=lines.append)
    log = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 8))
    found = {line["step"]: line["eval"] for line in log if "eval" in line}
    assert list(found) == quiz.asked == [2, 4, 6, 7]
    assert [scores["quiz"] for scores in found.values()] == [0.5, 0.75, 0.75, 0.25]
    assert found[7]["loss"] < found[2]["loss"]
    assert (tmp_path / "best").resolve() == tmp_path / "checkpoints" / "4"
    assert reading.find(tmp_path / "best") == tmp_path / "checkpoints" / "4"
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [4, 7], "the last one and the best"
    said = next(line for line in lines if "after step 4" in line)
    assert "held-out loss" in said and "quiz 75.0%; the best so far" in said
    assert any("tok/s" in line and "quiz 75.0% at 4" in line for line in lines)


@pytest.mark.slow
def test_a_run_that_was_stopped_measures_and_chooses_as_one_that_was_left_alone(corpus, tmp_path, monkeypatch):
    config = measured_stage(corpus, **{"eval.best": "loss"})
    train(config, tmp_path / "alone", tell=lambda _: None)

    def kill(self, step, scores):
        raise KeyboardInterrupt  # the save is done, the measurement is lost

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kangaroo_jax.training.reporting.Reporter.measured", kill)
        train(config, tmp_path / "run", tell=lambda _: None)
    assert not history(tmp_path / "run", 7)
    train(config, tmp_path / "run", tell=lambda _: None)
    assert history(tmp_path / "run", 7) == history(tmp_path / "alone", 7) and len(history(tmp_path / "run", 7)) == 4
    assert (tmp_path / "run/best").readlink() == (tmp_path / "alone/best").readlink()
    train(config, tmp_path / "run", tell=lambda _: None)
    assert len([1 for line in read_metrics(tmp_path / "run/metrics.jsonl") if "eval" in line]) == 4, "nothing again"


def test_a_stage_ends_when_it_no_longer_gets_better_and_stays_ended(corpus, tmp_path):
    told = {"eval.every": 1, "eval.benchmarks": ("quiz",), "eval.held_out": (), "eval.patience": 2}
    config, quiz, lines = measured_stage(corpus, **told), Scripted([0.5, 0.4, 0.3]), []
    result = train(config, tmp_path, evaluator=lambda _: quiz, tell=lines.append)
    assert result.steps == 3 and quiz.asked == [1, 2, 3] and any("stops early" in line for line in lines)
    assert train(config, tmp_path, evaluator=lambda _: Scripted([]), tell=lambda _: None).steps == 3
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line] == [1, 2, 3]
    assert reading.find(tmp_path / "best").name == "1"


def quiz_of(corpus: Path, path: Path) -> Path:
    """Questions about the corpus's clips, each with four options."""
    rows = []
    for number, (name, letter) in enumerate((colour, seconds) for colour in COLOURS for seconds in (2, 5)):
        asked = "<video>\nWhat colour is it?\nA. red\nB. green\nC. blue\nD. yellow"
        answer = "ABCD"[list(COLOURS).index(name)]
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        clip = str(corpus / f"{name}_{letter}s.mp4")
        row = {"id": str(number), "video": clip, "conversations": turns, "answer": answer}
        rows.append({**row, "options": list(COLOURS)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_every_checkpoint_is_asked_the_same_share_of_a_benchmark(corpus, tmp_path):
    quiz = quiz_of(corpus, tmp_path / "quiz.jsonl")
    told = {"eval.every": 4, "eval.benchmarks": (str(quiz),), "eval.share": 0.5, "eval.held_out": ()}
    config = measured_stage(corpus, **told)
    train(config, tmp_path / "run", evaluator=evaluator, tell=lambda _: None)
    scores = history(tmp_path / "run", 7)
    assert list(scores) == [4, 7] and all(0 <= found["quiz"] <= 1 for found in scores.values())
    rows = [read_objects(tmp_path / f"run/eval/{step}/samples.jsonl") for step in (4, 7)]
    asked = [{row["id"]: row["identity"]["weights"] for row in some} for some in rows]
    assert len(asked[0]) == 4 and asked[0].keys() == asked[1].keys()
    assert len({*asked[0].values(), *asked[1].values()}) == 2, "each step was asked with its own weights"
    quiz.write_text(quiz.read_text().replace("red_2s", "nowhere"))
    with pytest.raises(UserError, match="nowhere.mp4: there is no such file"):
        train(measured_stage(corpus, **{"eval.benchmarks": (str(quiz),)}), tmp_path / "b", evaluator=evaluator)


def test_nothing_is_opened_where_nothing_is_measured(corpus, tmp_path, monkeypatch):
    for name in ("HeldOutBatches", "make_loss"):
        monkeypatch.setattr(loop, name, lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(measuring, "history", lambda *_: pytest.fail("read"))
    config = small_stage("stage4_instruct", corpus, **{"eval.benchmarks": ("quiz",), "eval.held_out": ("nowhere",)})
    train(config, tmp_path, evaluator=lambda _: pytest.fail("made"), tell=lambda _: None)
    assert not (tmp_path / "best").exists()


def test_the_held_out_loss_counts_every_sample_once_whatever_the_batch(corpus, tmp_path):
    config = measured_stage(corpus, **{"eval.held_out": (str(corpus / "stage4.jsonl"),)})
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    sizes = dict(frames_per_group=2, tokens_per_group=4)
    data = StageConfig.from_config(config).data
    totals = []
    for packs in (1, 3):
        some = data.changed({"packs_per_batch": packs})
        ledger = Ledger(tmp_path / f"{packs}.jsonl")
        batches = HeldOutBatches(config.eval.held_out, some, tokenizer, **sizes, ledger=ledger, rows=range(packs))
        read = [list(batches), list(batches)]
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(*read, strict=True)), "each pass is the same"
        assert ledger.count == 0 and all(len(batch.tokens) == packs for batch in read[0])
        totals.append([sum(float(batch.weights.sum()) for batch in read[0]), batches.samples])
    assert totals[0] == totals[1] and totals[0][1] == 24


def test_the_best_is_the_lowest_loss_or_the_highest_score_and_the_first_of_equals():
    scores = {2: {"loss": 3.0, "quiz": 0.5}, 4: {"loss": 1.0, "quiz": 0.5}, 6: {"loss": 2.0, "quiz": 0.1}}
    assert [best_of(scores, name) for name in ("", "loss", "quiz", "other")] == [4, 4, 2, None]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"eval.held_out": ()}, "config.eval.every is 2: name what is measured"),
        ({"eval.share": 0.0}, "config.eval.share is 0.0: is a share"),
        ({"eval.best": "lost"}, "config.eval.best is 'lost': one of loss (did you mean 'loss'?)"),
        ({"eval.benchmarks": ("a/x.jsonl", "b/x.jsonl")}, "the name 'x' is taken"),
        ({"eval.held_out": ("nowhere.jsonl",)}, "nowhere.jsonl"),
    ],
)
def test_a_wrong_key_is_one_line_before_anything_is_trained(corpus, tmp_path, keys, told):
    with pytest.raises(UserError) as caught:
        train(measured_stage(corpus, **keys), tmp_path, tell=lambda _: None)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("checkpoints/*"))
