"""Every `kangaroo ...` line of the README and the docs names a job, flags and keys that exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from kangaroo_jax.cli import arguments as parsing
from kangaroo_jax.cli import bench
from kangaroo_jax.cli.jobs import JOBS
from kangaroo_jax.config import stage_config
from kangaroo_jax.config_files import config_keys, load_config
from kangaroo_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"```(?:bash|sh)?\n(.*?)```|`([^`]+)`", re.S)


def commands() -> list[tuple[str, str]]:
    """(file, command) of each, without comments; lines that end in a backslash go on."""
    found = []
    for file in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))):
        for block, inline in CODE.findall(file.read_text(encoding="utf-8")):
            text = (block or inline.replace("\n", " ")).replace("\\\n", " ")
            for line in text.splitlines():
                line = re.sub(r"^\s*(?:\$ )?", "", line.partition(" #")[0]).strip()
                if line.startswith("kangaroo ") and line.split()[1:]:
                    found.append((file.name, line))
    return sorted(set(found))


def check(command: str) -> None:
    """Raises UserError, or SystemExit of argparse, where a job or flag of `command` does not exist."""
    words = [word for word in shlex.split(re.sub(r" \|.*|[\[\]]|(?<=\w)(?:\|\w+)+", "", command))[1:] if word != "..."]
    name, rest = words[0], [word for word in words[1:] if not word.startswith("...")]
    if name not in JOBS:
        raise UserError(f"no job {name}")
    job = JOBS[name]
    if job.define is None:
        _check_of_argparse(name, rest)
        return
    values = flags.FlagValues()
    job.define(values)
    left = parsing.parse(values, name, [_filled(values, word) for word in rest])
    keys = [word for word in left if word.startswith(parsing.CONFIG_KEY)]
    words = [word for word in left if not word.startswith("-")]
    if name == "curate":
        if words and words[0] not in job.words:
            raise UserError(f"curate has no job {words[0]}")
        own = job.words[words[0]] if words else tuple(values)
        alien = [flag for flag in values if values[flag].present and flag not in own and flag != "engine"]
        if alien:
            raise UserError(f"{words}: {alien}")
    elif words:
        raise UserError(f"{name}: what is {words}?")
    parsing.no_more(name, values, [word for word in left if word.startswith("-") and word not in keys])
    spec = values["config"].value if "config" in values else None
    known = [*config_keys(load_config(spec) if spec and "..." not in spec else stage_config("tiny").lock())]
    for word in keys:
        key = word.removeprefix(parsing.CONFIG_KEY).partition("=")[0]
        if key not in known and "KEY" not in key:
            raise UserError(f"{name}: no key {key}")


def _filled(values: flags.FlagValues, word: str) -> str:
    """`--layers=N` with a number in place of the letter that stands for one."""
    flag, equals, value = word.lstrip("-").partition("=")
    if equals and flag in values and values[flag].flag_type() in ("int", "float") and not re.match(r"[\d.]", value):
        return f"--{flag}=1"
    return word


def _check_of_argparse(name: str, rest: list[str]) -> None:
    """The flags of a job that reads its arguments itself: those that its parsers know."""
    if name == "bench" and rest and rest[0] not in (bench.HERE | bench.ELSEWHERE):
        raise UserError(f"no bench {rest[0]}")
    known: set[str] = set()
    add = argparse.ArgumentParser.add_argument

    def note(parser, *names, **options):
        known.update(names)
        return add(parser, *names, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "add_argument", note)
        module = f"bench.{rest[0]}" if name == "bench" and rest and rest[0] in bench.ELSEWHERE else f"cli.{name}"
        words = rest[:1] if name == "data" or (name == "bench" and module == "cli.bench") else []
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"kangaroo_jax.{module}").main([*words, "--help"])
    if ended.value.code:
        raise UserError(f"{name}: no {rest[:1]}")
    for word in rest:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise UserError(f"{name}: no flag {word}")


COMMANDS = commands()


def test_the_documents_have_commands():
    assert {command.split()[1] for _, command in COMMANDS} >= set(JOBS) - {"quickstart"}  # it is a script's
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=[": ".join(found) for found in COMMANDS])
def test_a_command_is_one_that_exists(file, command, capsys):
    check(command)


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
    ],
)
def test_a_command_that_does_not_exist_is_found(command, capsys):
    with pytest.raises(UserError):
        check(command)
