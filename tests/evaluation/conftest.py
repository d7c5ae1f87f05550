"""The files of a benchmark, made on demand, and a checkpoint that answers with random words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.conftest import make_checkpoint, tokenizer_file  # noqa: F401
from tests.evaluation.layouts import LAYOUTS, Maker, make_template


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def data(tmp_path_factory, template) -> Callable[[str], Path]:
    """Makes the folder that holds a benchmark's files as NAME/, once a session."""
    folder = tmp_path_factory.mktemp("data")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            (folder / name).mkdir()
            LAYOUTS[name][0](Maker(folder / name, template))
        return folder

    return make


@pytest.fixture
def maker(tmp_path, template) -> Maker:
    """Makes files in a folder of this test."""
    return Maker(tmp_path, template)
