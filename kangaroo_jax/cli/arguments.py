"""Turns the words of a command line into the arguments of a function, whose signature and docstring define a command.

A keyword parameter is a flag (`max_new_tokens`: --max-new-tokens), a positional parameter an argument. Flags are in the
order of their importance. Bad input is a UserError.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args

from cyclopts import App, CoercionError, CycloptsError, MissingArgumentError, Parameter, UnknownOptionError
from cyclopts.argument import Argument
from cyclopts.exceptions import UnusedCliTokensError

from kangaroo_jax.errors import UserError, one_line

CONFIG_KEY = "--config."
Command = Callable[..., None]


def _number(kind: type[int] | type[float], least: float, *, above: bool = False) -> Parameter:
    """The parameter of a flag whose value is a finite number of `least` or more, or `above` it."""

    def convert(_: Any, tokens: Sequence[Any]) -> float:
        try:
            value = kind(tokens[0].value)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf or (above and value == least):
            wanted = f"above {least:g}" if above else f"of {least:g} or more"
            raise ValueError(f"is no {'whole ' if kind is int else ''}number {wanted}")
        return value

    return Parameter(converter=convert)


Count = Annotated[int, _number(int, 1)]
CountOrNone = Annotated[int | None, _number(int, 1)]
Natural = Annotated[int, _number(int, 0)]
Number = Annotated[float, _number(float, 0)]
NumberOrNone = Annotated[float | None, _number(float, 0)]
Positive = Annotated[float, _number(float, 0, above=True)]
PositiveOrNone = Annotated[float | None, _number(float, 0, above=True)]
Scale = Annotated[float, _number(float, 1e-4)]
Several = Annotated[list[str] | None, Parameter(consume_multiple=True)]  # --name A B C, or --name A --name B
Overrides = Annotated[Sequence[str], Parameter(parse=False)]  # the words of --config.KEY=VALUE, see `cli.overrides`


@dataclasses.dataclass(frozen=True)
class Call:
    """A command and its arguments, by the names of its parameters."""

    command: Command
    given: Mapping[str, Any]
    positional: Sequence[Any] = ()

    def run(self) -> None:
        """Call the command."""
        self.command(*self.positional, **self.given)


def choose(job: str, commands: Mapping[str, Command], words: Sequence[str]) -> tuple[str, Command, list[str]]:
    """(title, command, other words): the command that the first word names, else the one named "".

    Raises UserError.
    """
    named = [name for name in commands if name]
    if words and words[0] in named:
        return f"{job} {words[0]}", commands[words[0]], list(words[1:])
    if words and not words[0].startswith("-") and named:
        from kangaroo_jax.config_files import nearest

        known = f"{nearest(words[0], named)}; there are {', '.join(named)}"
        raise UserError(f"{job}: no job {words[0]!r}{known}: kangaroo {job} --help lists them")
    for before, word in zip(words, words[1:], strict=False):
        if word in named and (not before.startswith("--") or "=" in before):  # not the value of a flag
            raise UserError(f"{job}: {word} stands first: kangaroo {job} {word} {before} ...")
    if "" not in commands:
        raise UserError(f"{job}: name a job of it, one of {', '.join(named)}: kangaroo {job} --help lists them")
    return job, commands[""], list(words)


def bind(title: str, command: Command, words: Sequence[str]) -> Call:
    """The call of a command with the arguments in `words`. Raises UserError."""
    own, overrides = _separated(words)
    arguments = arguments_of(command)
    has_config = "overrides" in inspect.signature(command).parameters
    if overrides and not has_config:
        raise UserError(_no_flag(title, overrides[0].partition("=")[0], arguments))
    own = _new_spelling(own)
    for word in own[: own.index("--")] if "--" in own else own:
        if word.startswith("--") and not any(word.partition("=")[0] in argument.names for argument in arguments):
            raise UserError(_no_flag(title, word.partition("=")[0], arguments))
    try:
        _, bound, _ = _app_of(command).parse_args(own, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise UserError(f"{title}: {_told(error, title, command, arguments)}") from error
    for argument in arguments:
        if argument.required and bound.arguments[argument.field_info.name] in ("", []):
            raise UserError(f"{title}: {_missing(argument, command)}")
    return Call(command, bound.kwargs | ({"overrides": overrides} if has_config else {}), bound.args)


def require(title: str, command: Command, **values: str | None) -> None:
    """Raise UserError for the first flag without a value."""
    for argument in arguments_of(command):
        if not values.get(argument.field_info.name, "given"):
            raise UserError(f"{title}: {_missing(argument, command)}")


def arguments_of(command: Command, *, described: bool = False) -> list[Argument]:
    """Arguments and flags of a command, in the order of its signature; `described`: with their help."""
    return [a for a in _app_of(command).assemble_argument_collection(parse_docstring=described) if a.parse]


def help_of(argument: Argument) -> str:
    """The docstring's text for an argument of `arguments_of(..., described=True)`."""
    return " ".join((argument.parameter.help or "").split())


def listed(text: str) -> list[str]:
    """The items of a flag's comma-separated value."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _app_of(command: Command) -> App:
    usual = Parameter(allow_repeating=True, negative_iterable=(), negative_none=())
    app = App(help_flags=(), version_flags=(), default_parameter=usual)
    app.default(command)
    return app


def _separated(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words that set no config key, words that do); a key without `=` takes the next word as its value."""
    own: list[str] = []
    overrides: list[str] = []
    waits = False
    for word in words:
        of_key = word.startswith(CONFIG_KEY)
        (overrides if of_key or (waits and not word.startswith("--")) else own).append(word)
        waits = of_key and "=" not in word
    return own, overrides


def _new_spelling(words: Sequence[str]) -> list[str]:
    """`words` with hyphens in the names of flags, which had underscores in earlier versions."""
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [name.replace("_", "-") + equals + value for name, equals, value in parts]


def _no_flag(title: str, flag: str, arguments: Sequence[Argument]) -> str:
    names = [name for argument in arguments for name in argument.names if name.startswith("--")]
    close = difflib.get_close_matches(flag, names, n=1)
    return f"{title}: no flag {flag}; " + (
        f"did you mean {close[0]}?" if close else f"kangaroo {title} --help lists them"
    )


def _missing(argument: Argument, command: Command) -> str:
    said = next(help_of(a) for a in arguments_of(command, described=True) if a.name == argument.name)
    return f"{argument.name} is missing ({said})"


def _told(error: CycloptsError, title: str, command: Command, arguments: Sequence[Argument]) -> str:
    """The error of cyclopts as a line."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.keyword:
            return f"{error.keyword} needs a value; one that begins with a dash is written {error.keyword}=VALUE"
        return _missing(error.argument, command)
    if isinstance(error, CoercionError) and error.token is not None:
        flag = f"{error.token.keyword}=" if error.token.keyword else ""
        choices = ("true", "false") if error.target_type is bool else get_args(error.target_type)
        value = error.token.value if len(error.token.value) < 100 else error.token.value[:100] + "..."
        return f"{flag}{value}: {error.msg or 'is none of ' + ', '.join(choices)}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"what is {error.unused_tokens[0]!r}? flags are written --name=value"
    if isinstance(error, UnknownOptionError):
        return _no_flag(title, error.token.keyword or error.token.value, arguments).removeprefix(f"{title}: ")
    return one_line(error)
