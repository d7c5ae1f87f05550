"""`--api-key-file` is read alike by the server and the page."""

from pathlib import Path

import pytest

from kangaroo_jax.cli.keys import keys_in
from kangaroo_jax.cli.main import main

CONTENTS = {"one": b"word\n", "several": b"\xef\xbb\xbfword\r\n\r\n  other \n"}


def test_a_key_a_line(tmp_path: Path) -> None:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    assert keys_in("") == [] and keys_in(str(tmp_path / "one")) == ["word"]
    assert keys_in(str(tmp_path / "several")) == ["word", "other"]


@pytest.mark.parametrize("words", [["serve", "--checkpoint=/none"], ["web", "--server=http://127.0.0.1:9"]])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff\xfe\x00", "cannot be read (it is no text)"),
        (b" \n", "there is no key in it"),
        (b"two words\n", "key 1 is no word"),
        ("schlüssel\n".encode(), "key 1 is no word"),
    ],
)
def test_what_has_no_keys_is_one_line(words, content, says, tmp_path: Path, capsys) -> None:
    for package in {"serve": ("fastapi", "uvicorn", "prometheus_client"), "web": ("gradio", "openai")}[words[0]]:
        pytest.importorskip(package)
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    assert main([*words, f"--api-key-file={path}", "--port=0"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--api-key-file={path}: {says}" in said


def test_a_page_sends_one_key(tmp_path: Path, capsys) -> None:
    pytest.importorskip("gradio")
    (tmp_path / "keys").write_bytes(CONTENTS["several"])
    assert main(["web", "--server=http://127.0.0.1:9", f"--api-key-file={tmp_path}/keys", "--port=0"]) == 2
    assert "has 2 keys; the page sends one" in capsys.readouterr().err
