"""The stages one after another, with a stand-in for training: what each begins from, what is not run again."""

import json

import pytest

from kangaroo_jax.config import STAGES
from kangaroo_jax.errors import UserError
from kangaroo_jax.training import curriculum
from kangaroo_jax.training.curriculum import run, stage
from kangaroo_jax.training.loop import Result


@pytest.fixture
def trained(monkeypatch) -> list[tuple]:
    """(stage, what it began from, folder) of every stage that was trained."""
    calls: list[tuple] = []

    def train(config, workdir, *, evaluator, tell):
        workdir.mkdir(parents=True)
        calls.append((config.stage, config.init_from, workdir))
        return Result(workdir, config.train.steps, 12.345, 0.98765)

    monkeypatch.setattr(curriculum, "train", train)
    return calls


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"stage{number}.jsonl").write_text("{}\n")
    return folder


def test_each_stage_begins_from_the_last_and_leaves_a_record(trained, data, tmp_path):
    seen: list[tuple] = []
    records = run(
        "tiny",
        tmp_path / "run",
        data=data,
        tokenizer="t.model",
        init_from="weights",
        overrides={"train.steps": 7},
        adjust=lambda name, config: config.train.update(log_every=1 if name == STAGES[0] else 2),
        after_stage=lambda name, config, folder: seen.append((name, config.train.log_every, folder)),
    )
    assert [call[0] for call in trained] == list(STAGES)
    assert [call[1] for call in trained] == ["weights", *(str(tmp_path / "run" / name) for name in STAGES[:-1])]
    assert [call[2] for call in trained] == [tmp_path / "run" / name for name in STAGES]
    assert seen == [(name, 1 if i == 0 else 2, tmp_path / "run" / name) for i, name in enumerate(STAGES)]
    expected = {"name": STAGES[0], "steps": 7, "seconds": 12.3, "useful_token_share": 0.9877}
    assert records[0] == expected == json.loads((tmp_path / "run" / STAGES[0] / "done.json").read_text())


def test_a_finished_stage_is_not_run_again_and_the_next_begins_from_it(trained, data, tmp_path):
    options = dict(data=data, tokenizer="t.model", stages=STAGES[1:3])
    run("tiny", tmp_path, **options)
    (tmp_path / STAGES[2] / "done.json").unlink()
    (tmp_path / STAGES[2]).rmdir()
    trained.clear()
    again = run("tiny", tmp_path, **options)
    assert trained == [(STAGES[2], str(tmp_path / STAGES[1]), tmp_path / STAGES[2])]
    assert [record["name"] for record in again] == list(STAGES[1:3])


def test_a_stage_has_the_data_of_its_number(data):
    config = stage("stage3_refine", "tiny", data=data, tokenizer="t.model", init_from="x", overrides={"seed": 5})
    assert config.data.train == (str(data / "stage3.jsonl"),)
    assert (config.data.tokenizer, config.init_from, config.seed, config.stage) == ("t.model", "x", 5, "stage3_refine")
    (data / "stage3.jsonl").unlink()
    with pytest.raises(UserError, match="stage3.jsonl: no such file"):
        stage("stage3_refine", "tiny", data=data, tokenizer="t.model", init_from="")
    with pytest.raises(UserError, match="config.train.stepz: no such key"):
        stage("stage1_image_pretrain", "tiny", data=data, tokenizer="", init_from="", overrides={"train.stepz": 1})


def test_only_the_main_process_writes_records(trained, data, tmp_path, monkeypatch):
    waited: list[str] = []
    monkeypatch.setattr(curriculum, "is_main", lambda: False)

    def barrier(name):  # where another process writes the record
        waited.append(name)
        (tmp_path / STAGES[0] / "done.json").write_text('{"name": "other"}')

    monkeypatch.setattr(curriculum, "barrier", barrier)
    found = run(
        "tiny", tmp_path, data=data, tokenizer="t", stages=STAGES[:1], after_stage=lambda *_: pytest.fail("not here")
    )
    assert found == [{"name": "other"}] and waited == [f"{STAGES[0]} done"]
