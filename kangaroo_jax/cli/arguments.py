"""What the jobs of the command line share: flags of one job, and `--config.KEY=VALUE`. Bad input is a UserError."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kangaroo_jax.system.files import make_folder

if TYPE_CHECKING:
    from absl import flags
    from ml_collections import ConfigDict

CONFIG_KEY = "--config."


def definer(values: "flags.FlagValues") -> Callable[..., Any]:
    """`define(DEFINE_x, name, default, help)` for the flags of one job."""
    return lambda define, *args, **kwargs: define(*args, flag_values=values, **kwargs)


def parse(values: "flags.FlagValues", job: str, arguments: list[str]) -> list[str]:
    """Parse the flags among `arguments`; returns the other arguments. Raises UserError for a bad value."""
    from absl import flags

    from kangaroo_jax.errors import UserError

    values.set_gnu_getopt(True)
    try:
        return values([job, *arguments], known_only=True)[1:]
    except flags.Error as error:
        raise UserError(f"{job}: {error}") from error


def no_more(job: str, values: "flags.FlagValues", rest: Sequence[str]) -> None:
    """Raise UserError for the first argument that is left over."""
    from kangaroo_jax.config_files import nearest
    from kangaroo_jax.errors import UserError

    if not rest:
        return
    flag = rest[0].lstrip("-").partition("=")[0]
    if rest[0].startswith("-"):
        raise UserError(f"{job}: no flag --{flag}{nearest(flag, values)}: kangaroo {job} --help lists them")
    raise UserError(f"{job}: what is {rest[0]!r}? flags are written --name=value")


def required(job: str, values: "flags.FlagValues", *names: str) -> None:
    from kangaroo_jax.errors import UserError

    for name in names:
        if not values[name].value:
            raise UserError(f"{job}: --{name} is missing ({values[name].help})")


def make_workdir(values: "flags.FlagValues") -> Path:
    """The folder of --workdir, made where it does not exist."""
    return make_folder(Path(values.workdir))


def not_of_config(rest: Sequence[str]) -> list[str]:
    """Flags that set no key of a config."""
    return [flag for flag in rest if flag.startswith("--") and not flag.startswith(CONFIG_KEY)]


def override(job: str, values: "flags.FlagValues", config: "ConfigDict", rest: list[str]) -> dict[str, Any]:
    """Set the `--config.KEY=VALUE` of `rest` in `config`; returns them by key. Raises UserError for anything else."""
    from absl import flags
    from ml_collections import config_flags

    from kangaroo_jax.config_files import config_keys, nearest
    from kangaroo_jax.errors import UserError

    keys = list(config_keys(config))
    rest = _last_of_each(rest)
    for argument in rest:
        if argument.startswith(CONFIG_KEY):
            key = _key(argument)
            if key not in keys:
                raise UserError(f"{job}: the config has no key {key!r}{nearest(key, keys)}")
    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=[job, *rest])
    left = parse(overrides, job, rest)
    no_more(job, values, left)
    return config_flags.get_override_values(overrides["config"])


def _key(argument: str) -> str:
    return argument.removeprefix(CONFIG_KEY).partition("=")[0]


def _last_of_each(arguments: Sequence[str]) -> list[str]:
    """`arguments` with the last `--config.KEY` of each KEY: a tuple's flag would add to what an earlier one says."""
    said: list[list[str]] = []  # a flag, and its value where that is an argument of its own
    for argument in arguments:
        if said and not argument.startswith("--") and "=" not in said[-1][0]:
            said[-1].append(argument)
        else:
            said.append([argument])
    last = {_key(words[0]): i for i, words in enumerate(said) if words[0].startswith(CONFIG_KEY)}
    return [word for i, words in enumerate(said) if last.get(_key(words[0]), i) == i for word in words]
