"""Open answers that a judge marks: what it is asked, how its reply is read, and what becomes of the score."""

import json

import pytest

from kangaroo_jax.cli.main import main
from kangaroo_jax.evaluation.benchmarks.rubrics import RUBRICS
from kangaroo_jax.evaluation.benchmarks.table import BENCHMARKS
from kangaroo_jax.evaluation.checking import questions_of
from tests.evaluation.test_asking_server import run, server  # noqa: F401

pytestmark = pytest.mark.alone


@pytest.fixture
def judge(server):  # noqa: F811
    """Another server that marks."""
    import threading

    from tests.evaluation.test_asking_server import Fake

    fake = Fake()
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.mark.parametrize(
    ("rubric", "reply", "score"),
    [
        ("similarity", 'It says the same. {"score": 3}', 3.0),
        ("similarity", '{"score": 4}', None),
        ("similarity", '{"score": true}', None),
        ("similarity", "3", None),
        ("sub_scene", '{"a": 1} so\n```json\n{"accuracy": 2, "relevance": 5}\n```', 7.0),
        ("sub_scene", '{"accuracy": 2}', None),
        ("summary", '{"completeness": 1, "reliability": 1}', 2.0),
        ("caption", "B", 1.0),
        ("caption", "A.", 0.0),
        ("caption", "None", 0.0),
        ("caption", "I cannot say", None),
    ],
)
def test_replies_are_marks_or_none(rubric, reply, score, data):
    names = {"similarity": "mmbench-video", "caption": "tempcompass"}
    questions = questions_of(BENCHMARKS[names.get(rubric, "mlvu")], data(names.get(rubric, "mlvu")))
    question = next(q for q in questions if q.rubric == rubric)
    assert RUBRICS[rubric].score(question, reply) == score
    told = RUBRICS[rubric].asked(question, "It {moves}.")
    assert "It {moves}." in told and "{{" not in told


def test_a_judge_marks_once_and_is_named(server, judge, data, tmp_path, capsys):  # noqa: F811
    judge.told = {1: (200, 'Yes. {"score": 3}'), 2: (200, "no marks")}
    flags = (f"--judge={judge.address}", "--judge-model=marker", "--frames=2", "--at-a-time=1")
    words = (server, data("mmbench-video"), tmp_path, "mmbench-video")
    none = run(*words, *flags[2:])
    assert (none["score"], none["counted"], none["unjudged"]) == (None, 0, 2)
    run(*words, *flags)
    result = json.loads((tmp_path / "results.json").read_text())["results"][0]["judged"]
    assert (result["judges"], result["rubrics"], result["most"]) == (["marker"], ["similarity 1"], 3.0)
    assert (result["score"], result["judged"], result["not_judged"]) == (3.0, 1, 1)
    assert result["groups"]["dimension"] == {
        "OCR": {"score": 3.0, "questions": 1},
        "Counting": {"score": 3.0, "questions": 1},
    }
    assert "judged        3.00 of 3" in capsys.readouterr().out
    asked = judge.seen[0]["messages"]
    assert asked[1]["content"].startswith(
        "Question: What\nhappens?\nTrue answer: A ring moves.\nAnswer to mark: B. blue\n"
    )
    judge.told = {}
    count = len(judge.seen)
    assert main(["eval", f"--workdir={tmp_path}", "--rescore", *flags[:2]]) == 0
    assert len(judge.seen) == count + 1  # only the reply without marks
    assert main(["eval", f"--workdir={tmp_path}", "--rescore"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())["results"][0]["judged"]
    assert again == result and "2.0" not in str(again["score"])


def test_captions_count_in_the_average_of_tempcompass(server, judge, data, tmp_path):  # noqa: F811
    judge.told = dict.fromkeys(range(1, 9), (200, "B"))
    flags = (f"--judge={judge.address}", "--judge-model=marker", "--frames=2")
    score = run(server, data("tempcompass"), tmp_path, "tempcompass", *flags)
    # Every answer is "B. blue": right in three of multiple choice and none of six others; three captions are judged B.
    assert score["counted"] == 12 and score["score"] == pytest.approx(6 / 12) and score["unjudged"] == 0
