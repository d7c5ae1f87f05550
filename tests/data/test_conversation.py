"""LLaVA annotations: what is read, and that every mistake names its file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn
from kangaroo_jax.data.annotations.sources import AnnotationFile, read_conversations
from kangaroo_jax.errors import UserError


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = [
    {"id": 7, "video": "a.mp4", "conversations": talk("<video>\nQ", "A"), "start": 1, "end": 2.5, "fps": 2},
    {"id": "x", "image": ["1.jpg", "2.jpg"], "conversations": talk("<image> and <image>?", "A", "Q2", "A2")},
    {"id": "t", "conversations": talk("Hello 你好", "Hi"), "dataset": "extra keys are fine"},
    {
        "id": "m",
        "video": ["/v/b.mp4", "c.mp4"],
        "image": "p.png",
        "max_frames": [4, None],
        "conversations": [{"from": "system", "value": "Be brief."}, *talk("<video><image>", "A", "<video>Q", "A")],
    },
]


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in items) + "\n")
    return path


@pytest.mark.parametrize("kind", ["list", "jsonl", "jsonl with a mark and blank lines"])
def test_reads_both_layouts(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    if kind == "list":
        path.write_text(json.dumps(GOOD, indent=1))
    elif kind == "jsonl":
        write_jsonl(path, GOOD)
    else:
        path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(item).encode() for item in GOOD))
    a, x, t, m = read_conversations([path])
    root = str(tmp_path)
    assert a == Conversation(
        "7", (Turn("user", "<video>\nQ"), Turn("assistant", "A")), (Media("video", f"{root}/a.mp4", 1.0, 2.5, 2.0),)
    )
    assert [medium.path for medium in x.media] == [f"{root}/1.jpg", f"{root}/2.jpg"] and len(x.turns) == 4
    assert t.media == () and t.turns[0].text == "Hello 你好"
    assert [(n.kind, n.path, n.max_frames) for n in m.media] == [
        ("video", "/v/b.mp4", 4),
        ("image", f"{root}/p.png", None),
        ("video", f"{root}/c.mp4", None),
    ]
    assert m.turns[0].role == "system"


def test_random_access_and_media_root(tmp_path: Path) -> None:
    file = AnnotationFile(write_jsonl(tmp_path / "a.jsonl", GOOD), media_root="/data")
    assert len(file) == 4
    assert [file[i].id for i in (3, 0, 2, 1)] == ["m", "7", "t", "x"]
    assert file[0].media[0].path == "/data/a.mp4"


def test_split_answer() -> None:
    conversation = Conversation("1", (Turn("user", "Q"), Turn("assistant", "A")))
    prompt, answer = conversation.split_answer()
    assert prompt.turns == (Turn("user", "Q"),) and answer == "A"
    with pytest.raises(ValueError, match="does not end"):
        prompt.split_answer()


@pytest.mark.parametrize(
    "line, words",
    [
        ("{no json", "not JSON"),
        ('"text"', "expected an object"),
        ({"id": 1}, "'conversations' must be a list"),
        ({"conversations": []}, "'conversations' must be a list"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1 needs 'from'"),
        ({"conversations": [{"from": "human"}]}, "turn 1 needs 'from'"),
        ({"conversations": ["hello"]}, "turn 1 needs 'from'"),
        ({"conversations": talk("Q", "A")[::-1]}, "must alternate"),
        ({"conversations": [*talk("Q"), *talk("Q")]}, "must alternate"),
        ({"video": "a.mp4", "conversations": talk("Q", "A")}, "0 <video> tags in the human turns, but 1 files"),
        ({"video": "a.mp4", "conversations": talk("<video><video>", "A")}, "2 <video> tags"),
        ({"conversations": talk("<image>", "A")}, "1 <image> tags in the human turns, but 0 files in 'image'"),
        ({"video": "a.mp4", "conversations": talk("<image><image>", "A")}, "<image> tags"),
        ({"video": 5, "conversations": talk("<video>", "A")}, "'video' must be a path"),
        ({"video": [None], "conversations": talk("<video>", "A")}, "'video' must be a path"),
        ({"video": "a", "fps": -1, "conversations": talk("<video>", "A")}, "'fps' must be a positive number"),
        ({"video": "a", "fps": "2", "conversations": talk("<video>", "A")}, "'fps' must be a positive number"),
        ({"video": "a", "max_frames": 2.5, "conversations": talk("<video>", "A")}, "'max_frames' must be"),
        ({"video": "a", "start": [1, 2], "conversations": talk("<video>", "A")}, "'start' has 2 values for 1 videos"),
        ({"video": "a", "start": 3, "end": 3, "conversations": talk("<video>", "A")}, "'start' 3 is not before"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, line: Any, words: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD[2], "", line, GOOD[2]])
    with pytest.raises(UserError) as error:
        AnnotationFile(path)
    text = str(error.value)
    assert text.startswith(f"{path}, line 3: ") and words in text and "\n" not in text
    if not isinstance(line, str):
        path.write_text(json.dumps([GOOD[2], line]))
        with pytest.raises(UserError) as error:
            AnnotationFile(path)
        assert str(error.value).startswith(f"{path}, item 2: ")


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="cannot read"):
        AnnotationFile(path)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no conversations"):
        AnnotationFile(path)
    path.write_text('[\n{"id": 1},\n{"id": 2\n]')
    with pytest.raises(UserError, match=r"line 4: not JSON"):
        AnnotationFile(path)
    path.write_bytes(b'{"id": "\xff\xfe"}')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        AnnotationFile(path)
