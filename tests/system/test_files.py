"""Whole or not at all, however many write."""

import threading
from pathlib import Path

import pytest

from kangaroo_jax.system.files import write_json, write_text


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path, errors = tmp_path / "a.json", []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                write_text(path, f"{number}" * 100_000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = path.read_text()
    assert not errors and len(text) == 100_000 and len(set(text)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "a", "text")
    with pytest.raises(TypeError):
        write_json(tmp_path / "b", object())
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
