"""Held-out questions: what the model is asked, how its answers are marked, and what shares are made of the marks."""

import json

import pytest

from kangaroo_jax.evaluation import answering
from kangaroo_jax.evaluation.answering import Answers, evaluate
from kangaroo_jax.evaluation.asking import head_of
from kangaroo_jax.evaluation.prompting import Task
from kangaroo_jax.evaluation.samples import Samples


def record(question: str, answer: str, kind: str, options=(), language: str = "en") -> dict:
    """A line of an evaluation file: a question about an image, whose true answer ends it."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"truth: {answer}"}]
    style = "mcq" if options else "open"
    names = {"answer": answer, "options": list(options), "format": style, "question_kind": kind, "language": language}
    return {"id": question, "image": "ring.jpg", "conversations": turns, **names}


TWO = ("red", "blue")
SHORT = [
    record("Which?", "A", "colour", TWO),
    record("哪个?", "B", "colour", TWO, "zh"),
    record("How many?", "B", "number", TWO),
    record("What shape?", "a ring", "shape"),
]
LONG = [record("Which first?", "B", "order", TWO), record("What first?", "ring", "order")]
SAID = {
    "Which?": "A. red",
    "哪个?": "A",
    "How many?": "no idea",
    "What shape?": "Ring.",
    "Which first?": "blue (B)",
    "What first?": "a coin",
}
RIGHT = {"Which?", "What shape?", "Which first?"}


class Scripted:
    """A model that says what `SAID` has for a question, and remembers what it was asked, and how."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Task], dict]] = []

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, tasks: list[Task], samples: Samples, **options) -> None:
        self.asked.append((tasks, options))
        for task in tasks:
            samples.add({**head_of(task), "key": task.question.id, "text": SAID[task.question.text]})


@pytest.fixture
def files(tmp_path):
    """Two files of questions."""
    paths = {split: tmp_path / f"{split}.jsonl" for split in ("short", "long")}
    for path, records in zip(paths.values(), (SHORT, LONG), strict=True):
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return paths


@pytest.fixture
def model(monkeypatch):
    """The scripted model, in place of `runs/x`."""
    model = Scripted()
    monkeypatch.setattr(answering.Kangaroo, "load", lambda path, dtype: {"runs/x": model}[path])
    monkeypatch.setattr(answering, "ask_model", lambda model, *given, **options: model.ask(*given, **options))
    return model


@pytest.fixture
def evaluated(tmp_path, files, model):
    """(answers, model, lines told) of an evaluation of two files."""
    told: list[str] = []
    answers = evaluate("runs/x", files, tmp_path / "eval", max_new_tokens=5, at_a_time=3, tell=told.append)
    return answers, model, told


def test_questions_in_other_languages_are_not_asked_and_not_in_the_shares(tmp_path, files, model):
    answers = evaluate("runs/x", files, tmp_path / "eval", languages=("en",), tell=lambda line: None)
    assert [[task.question.text for task in tasks] for tasks, _ in model.asked] == [
        ["Which?", "How many?", "What shape?"],
        ["Which first?", "What first?"],
    ]
    assert [r["id"] for r in answers.records] == ["Which?", "How many?", "What shape?", "Which first?", "What first?"]
    assert answers.metrics()["short_mcq"] == 0.5 and "zh_mcq" not in answers.metrics()


def test_the_model_is_asked_without_the_true_answer(evaluated):
    _, model, _ = evaluated
    assert [len(tasks) for tasks, _ in model.asked] == [4, 2]
    for tasks, options in model.asked:
        assert options == {"at_a_time": 3, "strict": True}
        for task in tasks:
            told = task.wording.prompt(task.question)
            assert told == task.question.text and "truth" not in told and len(task.question.media) == 1
            assert task.max_new_tokens == 5


def test_each_record_has_its_split_its_prediction_and_its_mark(evaluated):
    answers, _, told = evaluated
    assert [r["split"] for r in answers.records] == ["short"] * 4 + ["long"] * 2
    for found, given in zip(answers.records, SHORT + LONG, strict=True):
        assert {key: found[key] for key in given} == given
        assert found["prediction"] == SAID[given["id"]] and found["correct"] is (given["id"] in RIGHT)
    assert told == ["answered 4 short questions, 2 right", "answered 2 long questions, 1 right"]


def test_shares_are_of_their_split_format_and_language(evaluated):
    answers, _, _ = evaluated
    assert answers.metrics() == {  # nothing was asked about images
        "short_mcq": pytest.approx(1 / 3),
        "long_mcq": 1.0,
        "open_exact": 1.0,
        "long_open_exact": 0.0,
        "en_mcq": 0.5,
        "zh_mcq": 0.0,
    }
    assert answers.share() == 0.5 and answers.share(split="none") == 0.0
    assert answers.share(question_kind="order", split="long") == 0.5


def test_kinds_are_of_multiple_choice_questions_and_each_split(evaluated):
    answers, _, _ = evaluated
    assert answers.by_kind() == {
        "short/colour": {"accuracy": 0.5, "count": 2},
        "short/number": {"accuracy": 0.0, "count": 1},
        "long/order": {"accuracy": 1.0, "count": 1},
    }


def test_answers_come_back_from_a_file_as_they_were(evaluated):
    answers, _, _ = evaluated
    plain = json.loads(json.dumps(answers.to_json()))
    assert plain["metrics"] == answers.metrics() and plain["by_kind"] == answers.by_kind()
    assert Answers.from_json(plain) == answers


def test_no_answers_are_shares_of_nothing():
    assert Answers(()).metrics() == {} == Answers(()).by_kind()
