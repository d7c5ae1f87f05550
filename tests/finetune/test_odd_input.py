"""What spreadsheets, systems and people leave in tables and folders is understood, or refused in one line."""

import csv
import shutil
from pathlib import Path

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.finetune.foresight import warnings
from kangaroo_jax.finetune.split import look_alikes, refuse_shared, split
from kangaroo_jax.finetune.table import read_examples
from tests.finetune.test_finetune import Words, clips, quiet, rows_of, table  # noqa: F401 - a fixture


def written(clips: Path, tmp_path: Path, text: str) -> Path:  # noqa: F811
    path = tmp_path / "mine.csv"
    path.write_bytes(text.replace("CLIPS", str(clips)).encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffvideo,question,answer\r\nCLIPS/c0.mp4,Which?,left\r\n",
        "video,question,answer\rCLIPS/c0.mp4,Which?,left\r",
        "video\tquestion\tanswer\nCLIPS/c0.mp4\tWhich?\tleft\n",
        "video|question|answer\nCLIPS/c0.mp4|Which?|left\n",
        "sep=;\nvideo;question;answer\nCLIPS/c0.mp4;Which?;left\n",
        "\n,,\n  \nvideo,question,answer\nCLIPS/c0.mp4,Which?,left\n",
        'video, question, answer\nCLIPS/c0.mp4, "Which?", "left"\n',
        '"video" ,question ,answer,\nCLIPS/c0.mp4,Which?,left,\n',
    ],
)
def test_a_table_of_any_program_is_the_same(text, clips, tmp_path):  # noqa: F811
    (example,) = read_examples(written(clips, tmp_path, text), quiet)
    assert (example.video, example.question, example.answer) == (f"{clips}/c0.mp4", "<video>\nWhich?", "left")


def test_names_of_files_may_be_any_and_fields_have_several_lines(clips, tmp_path):  # noqa: F811
    name = "ein Film, 猫 #1%20.mp4"
    shutil.copy(clips / "c0.mp4", tmp_path / name)
    text = f'视频,问题,答案\n"{name}","Wie\nviele?","zwei\noder drei"\n'
    columns = {"video": "视频", "question": "问题", "answer": "答案"}
    (example,) = read_examples(written(clips, tmp_path, text), quiet, columns=columns)
    assert (example.video, example.question) == (str(tmp_path / name), "<video>\nWie\nviele?")
    assert example.answer == "zwei\noder drei"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,question,answer,answer\nCLIPS/c0.mp4,?,a,b\n", "mine.csv: 2 columns are called 'answer'|may both be"),
        ("video,question,Label,label\nCLIPS/c0.mp4,?,a,b\n", "its columns 'Label' and 'label' may both be the answer"),
        ("video,question,answer\n.,?,a\n", "line 2: .*: is no file; paths are seen from"),
        ("video,question,answer\nfile://CLIPS/c0.mp4,?,a\n", "line 2: .*: no such file; paths are seen from"),
        ("\n\nvideo,question,answer\nCLIPS/c0.mp4,?,\n", "line 4: its answer is empty"),
        ("video,question,answer\nCLIPS/c0.mp4,?," + "a" * 200_000, r"line 2: not a readable table \(field larger"),
        ("video,question,answer\nCLIPS/c0.mp4,?,a\nCLIPS/../LAST/c0.mp4,?,b\n", "line 3: c0.mp4 is listed twice"),
        (
            "视频,问题,答案\nCLIPS/c0.mp4,?,a\n",
            "has no column for the video .*; its columns are '视频', '问题', '答案'",
        ),
        (b"v\0ideo".decode() + ",question\n", "has no column for the video|not a readable"),
    ],
)
def test_a_wrong_table_names_its_line(text, message, clips, tmp_path):  # noqa: F811
    path = written(clips, tmp_path, text.replace("LAST", clips.name))
    csv.field_size_limit(131_072)  # Python's own, which readers of other files have raised in this process
    with pytest.raises(UserError, match=message) as error:
        read_examples(path, quiet)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.xlsx", b"PK\3\4", "mine.xlsx: is a spreadsheet; save it as CSV"),
        ("mine.csv", "video,answer\n".encode("utf-16"), "mine.csv: is UTF-16 text; save the table as UTF-8"),
        ("mine.csv", "video,größe\n".encode("latin-1"), r"not UTF-8 text \(byte 8\); save the table as UTF-8"),
        ("mine.csv", b"\n \n", "mine.csv: is empty; kangaroo data init writes a table"),
    ],
)
def test_what_is_no_table_is_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / name, quiet)


def folder_of(clips: Path, root: Path, **labels: int) -> Path:  # noqa: F811
    for number, (label, count) in enumerate(labels.items()):
        (root / label).mkdir(parents=True)
        for i in range(count):
            shutil.copy(clips / f"c{2 * number + i}.mp4", root / label)
    return root


def test_what_systems_leave_in_folders_is_passed_over(clips, tmp_path):  # noqa: F811
    root = folder_of(clips, tmp_path, cat=2, dog=2)
    for name in (".DS_Store", "cat/.DS_Store", "cat/._c0.mp4", "dog/Thumbs.db"):
        (root / name).write_bytes(b"x" * 100)
    for name in ("__MACOSX", ".git"):
        (root / name).mkdir()
    (root / "cat" / "loop").symlink_to(root)
    (root / "dog" / "gone.mp4").symlink_to(root / "nowhere.mp4")
    (root / "itself").symlink_to(root / "itself")
    assert [e.answer for e in read_examples(root, quiet)] == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("a_b", "a b"), "a_b: is the same label as 'a b'; put their videos in one folder"),
        (("Cat", "cat"), "cat: is the same label as 'Cat'"),
        (("_", "cat"), "_: its name is the answer to learn; give it letters"),
        (("train", "test"), "are parts of a split, no labels; give --data=.*/train --held-out=.*/test$"),
        (("test", "held_out"), "are parts of a split, no labels; give --data=FOLDER"),
    ],
)
def test_folders_that_are_no_labels_are_one_line(labels, message, clips, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=message) as error:
        read_examples(folder_of(clips, tmp_path, **dict.fromkeys(labels, 1)), quiet)
    assert "\n" not in str(error.value)


def test_a_clip_that_is_in_two_labels_is_said(clips, tmp_path):  # noqa: F811
    root = folder_of(clips, tmp_path, cat=2, dog=2)
    shutil.copy(clips / "copy.mp4", root / "dog" / "again.mp4")
    told: list[str] = []
    split(read_examples(root, quiet), 0, told.append)
    (line,) = (line for line in told if line.startswith("warning"))
    assert "videos that look the same as another, but have another answer: 1; the first: " in line
    assert "cat/c0.mp4 is 'cat'" in line and "dog/again.mp4 is 'dog'" in line
    (root / "dog" / "again.mp4").unlink()
    told.clear()
    split(read_examples(root, quiet), 0, told.append)
    assert not told


def test_a_part_of_a_file_is_not_trained_on_and_held_out(clips, tmp_path):  # noqa: F811
    header = "video,question,answer,start,end"
    (tmp_path / "link.mp4").symlink_to(clips / "c0.mp4")

    def of(*rows: tuple[str, ...]) -> list:
        return read_examples(table(tmp_path, *rows, header=header), quiet)

    learnt = of((str(clips / "c0.mp4"), "?", "a", "", "2"), (str(clips / "c1.mp4"), "?", "a", "", ""))
    refuse_shared(learnt, of((str(clips / "c2.mp4"), "?", "a", "", ""), ("link.mp4", "?", "b", "2", "")))
    for row in (("link.mp4", "?", "b", "1", "3"), (str(clips / "c1.mp4"), "?", "a", "1", "2")):
        with pytest.raises(UserError, match=r"^files of .* in --data, too: 1, the first .*(link|c1)\.mp4"):
            refuse_shared(learnt, of(row))


def test_a_copy_of_what_is_trained_on_is_said(clips, tmp_path):  # noqa: F811
    header = "video,question,answer,start,end"

    def of(*rows: tuple[str, ...]) -> list:
        return read_examples(table(tmp_path, *rows, header=header), quiet)

    learnt = of(*((str(clips / f"c{i}.mp4"), "?", "a", "", "1") for i in range(2)))
    part, other = (str(clips / "c0.mp4"), "?", "a", "1", "2"), (str(clips / "c5.mp4"), "?", "a", "", "")
    assert look_alikes(learnt, of(part, other), quiet) == []  # a part of the same file is no copy
    (line,) = look_alikes(learnt, of((str(clips / "copy.mp4"), "?", "a", "", ""), other), quiet)
    assert line.startswith("videos held out that look the same as one that is trained on: 1; the first: ")
    assert line.endswith(f"{clips / 'copy.mp4'} as {clips / 'c0.mp4'}")


def test_an_example_that_no_sample_can_hold_is_said(clips, tmp_path):  # noqa: F811
    rows = [*rows_of(clips, 3), (str(clips / "c3.mp4"), "Which?", "left " * 30)]
    examples = read_examples(table(tmp_path, *rows), quiet)
    said = [warnings(examples, [], ("replay",)[:0], Words(), adapter=False, room=room) for room in (0, 100, 25)]
    assert [sum("longer than the" in line for line in lines) for lines in said] == [0, 0, 1]
    (line,) = (line for line in said[2] if "longer than the" in line)
    assert line.startswith("examples longer than the 25 tokens") and line.endswith("mine.csv, line 5")
