"""JSON of foreign files is read or refused in one line; what UTF-8 cannot hold is written all the same."""

import json
from pathlib import Path

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.json_text import json_line, json_lines, parse_json, read_objects, utf8

BAD = [
    ('{"a": 1,}', "x, line 1: not JSON (Illegal trailing comma before end of object, column 8)"),
    ("[1,\n 2,\n x]", "x, line 3: not JSON (Expecting value, column 2)"),
    (b'{"a": "\xe9"}', "x: not UTF-8 text (byte 7)"),
    ("[" * 100_000 + "]" * 100_000, "x: JSON that is nested too deep"),
    ('{"a": ' * 100_000 + "1" + "}" * 100_000, "x: JSON that is nested too deep"),
    ("9" * 5000, "x: JSON with an integer of more than 4,300 digits"),
]


@pytest.mark.parametrize("text, message", BAD, ids=range(len(BAD)))
def test_what_is_no_json_is_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_json(text, "x")
    if "trailing comma" not in message:  # Python 3.11 and 3.12 word this differently
        assert str(error.value) == message
    with pytest.raises(UserError, match="^x, line 7"):
        parse_json(text, "x", 7)


def test_what_is_json() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, NaN]}', "x")["a"][0] == 1
    assert parse_json("\ufeff[]", "x") == [] and parse_json('"\\ud83d"', "x") == "\ud83d"


@pytest.mark.parametrize("text", ["plain", "文件 é 😀", "latin-\udce9.mp4", "half \ud83d", "\udce9\udcff"])
def test_text_comes_back_whatever_it_holds(text: str, tmp_path: Path) -> None:
    assert json.loads(json_line({"a": text})) == {"a": text}
    write_json(tmp_path / "a.json", {"a": text})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": text}
    assert utf8(text).decode()


def test_lines_of_json_are_told_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "x\u2028y"}\n \n[1]\n{"a":'.encode())
    (_, first), *rest = json_lines(path)
    assert first == {"a": "x\u2028y"} and [where for where, _ in rest] == [f"{path}, line 3", f"{path}, line 4"]
    assert str(rest[0][1]).endswith("line 3: expected an object, found list") and "line 4: not JSON" in str(rest[1][1])
    rows = read_objects(path)
    assert next(rows) == first
    with pytest.raises(UserError, match="line 3"):
        next(rows)
    with pytest.raises(UserError, match="b.jsonl: cannot be read"):
        list(read_objects(tmp_path / "b.jsonl"))
