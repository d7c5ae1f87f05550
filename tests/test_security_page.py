"""docs/security.md: each promise names tests, and each of them is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:tests/)?[\w/]+\.py::\w+)`", PAGE)))
PROMISES = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "|---"))]


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_is_named_is_there(named: str) -> None:
    path, name = named.split("::")
    text = (ROOT / "tests" / path.removeprefix("tests/")).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_names_a_test(promise: str) -> None:
    assert re.search(r"\.py::\w+`", promise.split("|")[2])


def test_the_tests_of_attacks_are_named() -> None:
    assert len(PROMISES) > 20
    for path in (ROOT / "tests/security").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert any(named.endswith(f"{path.name}::{name}") for named in NAMED), name
