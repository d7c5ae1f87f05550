"""Every `kangaroo ...` line of the README and the docs names a job, flags and keys that exist."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from kangaroo_jax.cli import arguments
from kangaroo_jax.cli.jobs import JOBS, commands_of
from kangaroo_jax.config import stage_config
from kangaroo_jax.config_files import config_keys, load_config
from kangaroo_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"```(?:bash|sh)?\n(.*?)```|```\w+\n.*?```|`([^`]+)`", re.S)


def commands() -> list[tuple[str, str, bool]]:
    """(file, command, whether it is shown whole: in a block or a table's cell) of each; a backslash joins lines."""
    found = []
    for file in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))):
        source = file.read_text(encoding="utf-8")
        for block, inline in CODE.findall(source):
            cell = f"| `{inline}` |" in source and not block  # of a table: what to type
            text = (block or inline.replace("\n", " ")).replace("\\\n", " ")
            for line in text.splitlines():
                line = re.sub(r"^\s*(?:\$ )?", "", line.partition(" #")[0]).strip()
                if line.startswith("kangaroo ") and line.split()[1:]:
                    found.append((file.name, line, bool(block) or cell))
    return sorted(set(found))


def check(command: str, *, whole: bool = False) -> None:
    """Raises UserError where a job, flag, argument or key of `command` does not exist; if it is `whole`, or lacks."""
    words = [word for word in shlex.split(re.sub(r" \|.*|[\[\]]|(?<=\w)(?:\|\w+)+", "", command))[1:] if word != "..."]
    name, rest = words[0], [word for word in words[1:] if not word.startswith("...")]
    if name not in JOBS:
        raise UserError(f"no job {name}")
    commands = commands_of(name)
    if not rest and "" not in commands:  # it is named, and not called
        return
    title, function, rest = arguments.choose(name, commands, rest)
    rest = [_filled(function, word) for word in rest]
    call = arguments.bind(
        title, function, [*rest, *([] if whole and "..." not in command else _needed(function, rest))]
    )
    parameters = inspect.signature(function).parameters
    spec = call.given.get("config") or ("config" in parameters and parameters["config"].default)
    named = isinstance(spec, str) and spec not in ("", "x") and "..." not in spec
    known = [*config_keys(load_config(spec) if named else stage_config("tiny").lock())]
    for word in call.given.get("overrides", ()):
        key = word.removeprefix(arguments.CONFIG_KEY).partition("=")[0]
        if key not in known and "KEY" not in key:
            raise UserError(f"{name}: no key {key}")


def _filled(function: arguments.Command, word: str) -> str:
    """`--layers=N` with a number in place of the letter that stands for one."""
    flag, equals, value = word.partition("=")
    numbers = [a for a in arguments.arguments_of(function) if a.hint in (int, float, float | None)]
    if equals and any(flag in argument.names for argument in numbers) and not re.match(r"[\d.]", value):
        return f"{flag}=1"
    return word


def _needed(function: arguments.Command, rest: list[str]) -> list[str]:
    """What a command that is only mentioned lacks."""
    given, plain = {word.partition("=")[0] for word in rest}, [word for word in rest if not word.startswith("-")]
    needed = [a for a in arguments.arguments_of(function) if a.required and not given & set(a.names)]
    flags = [f"{argument.name}=x" for argument in needed if argument.index is None]
    return flags + ["1" for argument in needed if argument.index is not None and not plain]


COMMANDS = commands()


def test_the_documents_have_commands():
    assert {command.split()[1] for _, command, _ in COMMANDS} >= set(JOBS) - {"quickstart"}  # it is a script's
    assert len(COMMANDS) > 30 and sum(whole for *_, whole in COMMANDS) > 20


@pytest.mark.parametrize(("file", "command", "whole"), COMMANDS, ids=[": ".join(found[:2]) for found in COMMANDS])
def test_a_command_is_one_that_exists(file, command, whole):
    check(command, whole=whole)
    assert not re.search(r"--(?!config\.)[a-z]*_", command)  # of flags, the spelling that --help shows


@pytest.mark.parametrize(
    "command",
    [
        "kangaroo tarin",
        "kangaroo train --confg=x",
        "kangaroo train --config=stage3_refine:tiny --config.train.step=3",
        "kangaroo curate explian ID --output=O",
        "kangaroo curate select --output=O --name=x",
        "kangaroo data chek x",
        "kangaroo data check x --wokers=2",
        "kangaroo bench packin",
        "kangaroo bench packing --rows=3",
        "kangaroo chat --seed=x y",
        "kangaroo bench train --steps=3 extra",
    ],
)
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises(UserError):
        check(command)


def test_a_command_that_is_shown_whole_lacks_nothing():
    check("kangaroo curate select")
    with pytest.raises(UserError, match="--output is missing"):
        check("kangaroo curate select", whole=True)
