"""`kangaroo finetune`: tables and folders are understood or refused in one line, splits are by video, runs learn."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks.quickstart import read_file
from kangaroo_jax.finetune.foresight import warnings
from kangaroo_jax.finetune.run import text_of
from kangaroo_jax.finetune.split import missing_labels, split, video_groups
from kangaroo_jax.finetune.table import Example, read_examples


def quiet(_: str) -> None:
    """Nothing is said."""


def write_clip(path: Path, seed: int, quality: str = "18") -> Path:
    """A few noisy blocks, the same for the same seed."""
    random = np.random.default_rng(seed)
    picture = np.kron(random.integers(0, 256, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_h264(path, (np.roll(picture, 2 * i, 1) for i in range(12)), 4, {"crf": quality})


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Folder of c0.mp4 ... c9.mp4, and copy.mp4, which looks as c0.mp4."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(10):
        write_clip(folder / f"c{number}.mp4", number)
    write_clip(folder / "copy.mp4", 0, quality="30")
    return folder


def table(folder: Path, *rows: tuple[str, ...], header: str = "video,question,answer", name: str = "mine.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return path


def rows_of(clips: Path, count: int = 10) -> list[tuple[str, ...]]:
    return [(str(clips / f"c{i}.mp4"), "Which?", "left" if i % 2 else "right") for i in range(count)]


def answered(example: Example, answer: str) -> Example:
    *before, last = example.conversation.turns
    turns = (*before, dataclasses.replace(last, text=answer))
    return dataclasses.replace(example, conversation=dataclasses.replace(example.conversation, turns=turns))


def test_columns_are_found_by_name_and_said(clips, tmp_path):
    path = table(tmp_path, *rows_of(clips, 2), header="File_Name,Prompt,Label")
    said: list[str] = []
    first, second = read_examples(path, said.append)
    assert (first.question, first.answer, second.answer) == ("<video>\nWhich?", "right", "left")
    assert first.video == str(clips / "c0.mp4")
    assert "video is column 'File_Name', question is column 'Prompt', answer is column 'Label'" in said[0]


@pytest.mark.parametrize("kind", ["table", "labels", "lines"])
def test_paths_that_are_seen_from_here_are_found_from_elsewhere(kind, clips, tmp_path, monkeypatch):
    """A run writes them into files of its own, in another folder."""
    for label in ("cat", "dog"):
        (tmp_path / "labels" / label).mkdir(parents=True)
        shutil.copy(clips / "c0.mp4", tmp_path / "labels" / label)
    table(tmp_path, ("labels/cat/c0.mp4", "Which?", "cat"))
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "it"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"video": "labels/cat/c0.mp4", "conversations": turns}) + "\n")
    monkeypatch.chdir(tmp_path)
    data = {"table": "mine.csv", "labels": "labels", "lines": "mine.jsonl"}[kind]
    assert read_examples(data, quiet)[0].video == str(tmp_path / "labels" / "cat" / "c0.mp4")


def test_other_tables_and_folders_of_labels(clips, tmp_path):
    tabs = tmp_path / "mine.tsv"
    tabs.write_text(f"video\tfrage\tanswer\tstart\tend\tsplit\n{clips}/c0.mp4\tWo?\tda\t0.5\t2\ttest\n")
    (example,) = read_examples(tabs, quiet, columns={"question": "frage"})
    medium = example.conversation.media[0]
    assert (medium.start, medium.end, example.held_out) == (0.5, 2.0, True)
    semicolons = tmp_path / "half.csv"
    semicolons.write_text(f"video;answer\n{clips}/c0.mp4;a, b\n")
    assert read_examples(semicolons, quiet, question="What?")[0].answer == "a, b"
    for number, label in enumerate(("cat", "big_dog")):
        (tmp_path / "labels" / label).mkdir(parents=True)
        shutil.copy(clips / f"c{number}.mp4", tmp_path / "labels" / label)
    found = read_examples(tmp_path / "labels", quiet)
    assert [e.answer for e in found] == ["big dog", "cat"]
    assert found[0].question == "<video>\nWhich of these is it: big dog, cat?"
    lines = tmp_path / "mine.jsonl"
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "it"}]
    lines.write_text(json.dumps({"id": "a", "video": str(clips / "c0.mp4"), "conversations": turns}) + "\n")
    assert read_examples(lines, quiet)[0].answer == "it"


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "video,questoin,answer",
            [("c0.mp4", "?", "a")],
            "has no column for the question .*nearest is 'questoin': --columns",
        ),
        ("video,answer", [("c0.mp4", "a")], r"has no column for the question .*or --question='...' asks the same"),
        ("clip,question,answer", [("c0.mp4", "?", "")], "mine.csv, line 2: its answer is empty"),
        ("video,question,answer", [("none.mp4", "?", "a")], "line 2: .*none.mp4: no such file; paths are seen from"),
        ("video,question,answer", [("c0.mp4", "?")], "line 2: has fewer fields than the header"),
        ("video,question,answer,start", [("c0.mp4", "?", "a", "x")], "line 2: its start is 'x', no number of seconds"),
        ("video,question,answer,start", [("c0.mp4", "?", "a", "nan")], "line 2: its start is 'nan', no second of a"),
        ("video,question,answer,end", [("c0.mp4", "?", "a", "-1")], "line 2: its end is '-1', no second of a video"),
        (
            "video,question,answer,start,end",
            [("c0.mp4", "?", "a", "5", "2")],
            "line 2: its end, 2, is not after its start, 5",
        ),
        (
            "video,question,answer",
            [("c0.mp4", "?", "a"), ("c0.mp4", "?", "b")],
            "line 3: c0.mp4 is listed twice with other answers: 'b' here, 'a' in line 2; keep one",
        ),
        ("video,question,answer", [], "holds no examples"),
        ("video,question,answer", [("", " ", "")], "holds no examples"),  # as a spreadsheet leaves a row
        ("", [], "mine.csv: is empty; kangaroo data init writes a table"),
    ],
)
def test_a_wrong_table_is_one_line(clips, header, rows, message):
    path = table(clips, *rows, header=header)
    with pytest.raises(UserError, match=message) as error:
        read_examples(path, quiet)
    assert "\n" not in str(error.value)


def test_near_duplicates_stay_on_one_side(clips, tmp_path):
    rows = [*rows_of(clips), (str(clips / "copy.mp4"), "Which?", "right")]
    examples = read_examples(table(tmp_path, *rows), quiet)
    groups = video_groups(examples, quiet)
    assert groups[str(clips / "copy.mp4")] == groups[str(clips / "c0.mp4")] and len(set(groups.values())) == 10
    for seed in range(5):
        learnt, asked = split(examples, seed, quiet)
        assert not {groups[e.video] for e in learnt} & {groups[e.video] for e in asked}
        assert {e.answer for e in asked} == {"left", "right"} and len(asked) < len(learnt)
        assert missing_labels(learnt, asked) == []
    assert split(examples, 1, quiet) == split(examples, 1, quiet)


def test_the_same_videos_are_held_out_where_all_lies_elsewhere(clips, tmp_path):
    asked = set[tuple[str, ...]]()
    for number in range(4):  # if places counted, all four would be the same once in 15,000 times
        moved = shutil.copytree(clips, tmp_path / str(number) / clips.name)
        found = split(read_examples(table(moved, *rows_of(moved)), quiet), 0, quiet)[1]
        asked.add(tuple(sorted(Path(example.video).name for example in found)))
    assert len(asked) == 1
    others = {
        tuple(sorted(e.video for e in split(read_examples(moved / "mine.csv", quiet), n, quiet)[1])) for n in range(4)
    }
    assert len(others) > 1, "seeds split otherwise"


def test_videos_that_cannot_be_read_are_told_and_split_all_the_same(tmp_path):
    for label in ("cat", "dog"):
        for number in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{label}{number}.mp4").write_bytes(b"no video" * 50)
    told: list[str] = []
    learnt, asked = split(read_examples(tmp_path, quiet), 0, told.append)
    assert len(learnt) == len(asked) == 2
    (line,) = told
    assert line.startswith("warning: 4 of 4 videos cannot be read, and teach nothing; the first: ") and "cat0" in line


def test_a_splits_column_is_kept_and_labels_of_one_side_are_said(clips, tmp_path):
    rows = [(*row, "test" if i == 0 else "train") for i, row in enumerate(rows_of(clips))]
    learnt, asked = split(read_examples(table(tmp_path, *rows, header="video,question,answer,split"), quiet), 0, quiet)
    assert [Path(e.video).name for e in asked] == ["c0.mp4"] and len(learnt) == 9
    assert missing_labels(learnt, asked) == ["never in the held-out part, so not measured: 'left'"]
    assert missing_labels(asked, learnt) == ["in the held-out part, but never trained: 'left'"]
    (line,) = missing_labels([*asked, answered(learnt[0], "a" * 61)], asked)
    assert line == f"never in the held-out part, so not measured: '{'a' * 60}...'"
    (line,) = missing_labels(asked, [*asked, answered(learnt[0], "a" * 61)])
    assert line == f"in the held-out part, but never trained: '{'a' * 60}...'"
    one = read_examples(table(tmp_path, *rows_of(clips, 1)), quiet)
    with pytest.raises(UserError, match="^1 different video: none would be (held out|trained on); give more"):
        split(one, 0, quiet)


class Words:
    """A tokenizer of whole words; unknown ones are bytes."""

    known = ("left", "right")

    def encode(self, text: str) -> list[int]:
        return [self.known.index(word) if word in self.known else 99 for word in text.split()]

    def name(self, token: int) -> str:
        return "<0x41>" if token == 99 else self.known[token]


def test_what_is_likely_to_go_wrong_is_said(clips, tmp_path):
    rows = [*rows_of(clips, 9)[::2], *rows_of(clips, 2), (str(clips / "c5.mp4"), "Which?", "striped")]
    examples = read_examples(table(tmp_path, *dict.fromkeys(rows)), quiet)
    said = warnings(examples, [], (), Words(), adapter=True)
    wanted = (
        "without --replay the model forgets",
        "7 videos to learn from",
        "'right' is the answer of 5 examples, 'striped' of 1: the model will",
        "striped",
    )
    assert all(any(want in line for line in said) for want in wanted) and len(said) == 4
    assert not any(
        "striped" in line and "tokens" in line for line in warnings(examples, [], (), Words(), adapter=False)
    )
    one, other = (answered(examples[0], letter * 61) for letter in "ab")
    _, few, uneven, strange = warnings([one] * 4 + [other], [], (), Words(), adapter=True)
    short, shorter = (f"'{letter * 60}...'" for letter in "ab")
    assert few.startswith("1 video to learn from") and f"never seen to write: 2 ({short}, {shorter}); an" in strange
    assert uneven.startswith(f"{short} is the answer of 4 examples, {shorter} of 1: the model will prefer the former")


def test_options_of_a_record_are_kept_for_scoring(clips, tmp_path):
    turns = [{"from": "human", "value": "<video>\nWhat?\nA. a bolt\nB. a hole"}, {"from": "gpt", "value": "a hole B"}]
    record = {"id": "x", "video": str(clips / "c1.mp4"), "conversations": turns}
    lines = [{**record, "options": ["a bolt", "a hole"], "answer": "B"}, {**record, "video": str(clips / "c2.mp4")}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "out.jsonl").write_text(text_of(read_examples(tmp_path / "mine.jsonl", quiet)))
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["options"], first["answer"]) == (["a bolt", "a hole"], "B")
    assert "options" not in second and second["answer"] == "a hole B"
    assert [q.kind for q in read_file(tmp_path / "out.jsonl")] == ["choice", "exact"]


def test_a_template_is_written_and_explained(tmp_path, capsys):
    assert cli.main(["data", "init", str(tmp_path / "mine.csv")]) == 0
    told = capsys.readouterr().out
    assert all(f"{name} " in told for name in ("video", "question", "answer", "start", "end", "split"))
    assert (tmp_path / "mine.csv").read_text().startswith("video,question,answer,start,end,split\n")
    assert cli.main(["data", "init", str(tmp_path / "mine.csv")]) == 2
    assert "exists already" in capsys.readouterr().err
