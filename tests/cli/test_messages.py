"""A message that names a command names one that exists, with flags that it has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kangaroo_jax.cli.arguments import arguments_of
from kangaroo_jax.cli.jobs import JOBS, commands_of

PACKAGE = Path(__file__).parents[2] / "kangaroo_jax"
COMMAND = re.compile(r"\bkangaroo ([a-z][\w-]*)((?: [^\s;:,()`]+)*)")
PLACE = re.compile(r"[{A-Z]|--help")  # what stands for a name
PROSE = {"kangaroo wrote"}


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module, `{}` for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def faults(text: str) -> Iterator[str]:
    """Commands and flags in a text that do not exist."""
    for found in COMMAND.finditer(text):
        job, words = found[1], found[2].split()
        if f"kangaroo {job}" in PROSE:
            continue
        if job not in JOBS:
            yield f"no job {job}"
            continue
        commands = commands_of(job)
        inner = words[0] if words and words[0] in commands else ""
        listed = words[0].split("|") if words and "" not in commands else []
        yield from (f"kangaroo {job}: no job {word}" for word in listed if not (word in commands or PLACE.search(word)))
        flags = {name for a in arguments_of(commands[inner]) for name in a.names} if inner in commands else set()
        for word in words:
            flag = word.partition("=")[0].strip("'\".")
            if flags and re.fullmatch(r"--[a-z][a-z-]+", flag) and flag not in {*flags, "--help"}:
                yield f"kangaroo {job} {inner}: no flag {flag}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_commands_in_messages_exist(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [fault for text in texts(tree) for fault in faults(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "run kangaroo trian --config=x",
        "see kangaroo data chek FILE",
        "kangaroo data check|sats FILE",
        "kangaroo chat --checkpont=DIR asks",
    ],
)
def test_one_that_does_not_exist_is_found(text):
    assert list(faults(text))
