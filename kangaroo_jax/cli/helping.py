"""The help of commands, from their docstrings: an example, the summary, flags by importance, and further text."""

import inspect
from collections.abc import Mapping, Sequence

from cyclopts.argument import Argument

from kangaroo_jax.cli.arguments import Command, arguments_of, help_of

FIRST = 5  # flags that are listed before the others


def help_text(job: str, summary: str, commands: Mapping[str, Command], words: Sequence[str]) -> str:
    """The help of a job, or of the inner job that the first of `words` names; without that, the list of inner jobs.

    The docstring of a command has a summary, an example, further text, and Args.
    """
    inner = {name: command for name, command in commands.items() if name}
    if words[0] not in inner and "" not in commands:
        return "\n\n".join([f"kangaroo {job} {next(iter(inner))} --help", summary, *_inner(inner, job)]) + "\n"
    command = inner.get(words[0]) or commands[""]
    text = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:\n")[0].strip()
    headline, example, *more = text.split("\n\n")
    arguments = arguments_of(command, described=True)
    parts = [inspect.cleandoc(example), headline]
    parts += [_list_of(arguments[:FIRST], "flags")] if arguments else []
    parts += [_list_of(arguments[FIRST:], "more flags")] if arguments[FIRST:] else []
    return "\n\n".join(parts + (_inner(inner, job) if command not in inner.values() else []) + more) + "\n"


def _inner(inner: Mapping[str, Command], title: str) -> list[str]:
    lines = [f"  {name:15} {inspect.cleandoc(inner[name].__doc__ or '').splitlines()[0]}" for name in inner]
    return ["\n".join([f"jobs (kangaroo {title} JOB --help lists the flags):", *lines])] if lines else []


def _list_of(arguments: list[Argument], head: str) -> str:
    return "\n".join([f"{head}:", *(f"  {_name(argument):22} {_line(argument)}" for argument in arguments)])


def _name(argument: Argument) -> str:
    return argument.name if argument.name.startswith("--") else argument.name.lstrip("-").upper()


def _line(argument: Argument) -> str:
    default = argument.field_info.default
    if argument.required:
        return f"{help_of(argument)} (needed)"
    plain = isinstance(default, (str, int, float)) and not isinstance(default, bool) and default != ""
    return help_of(argument) + (f" (default {default})" if plain else "")
