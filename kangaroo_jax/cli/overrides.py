"""`--config.KEY=VALUE`: a config's keys as flags, with the types of its values. Bad input is a UserError."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kangaroo_jax.cli.arguments import CONFIG_KEY

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from kangaroo_jax.config import StageConfig


def config_of(job: str, spec: str, words: Sequence[str]) -> "ConfigDict":
    """The config of `FILE[:PRESET]`, changed by the `--config.KEY=VALUE` of `words`. Raises UserError."""
    from kangaroo_jax.config_files import load_config

    config = load_config(spec)
    override(job, config, words)
    return config


def stage_of(job: str, spec: str, words: Sequence[str]) -> "StageConfig":
    """The stage that `config_of` has the config of. Raises UserError."""
    from kangaroo_jax.config import StageConfig

    return StageConfig.from_config(config_of(job, spec, words))


def preset_of(name: str) -> str:
    """The name, if it is a preset. Raises UserError for others."""
    from kangaroo_jax.config import PRESETS
    from kangaroo_jax.config_files import nearest
    from kangaroo_jax.errors import UserError

    if name not in PRESETS:
        raise UserError(f"no preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return name


def override(job: str, config: "ConfigDict", words: Sequence[str]) -> dict[str, Any]:
    """Set the `--config.KEY=VALUE` of `words` in `config`; returns them by key. Raises UserError for anything else."""
    from absl import flags
    from ml_collections import config_flags

    from kangaroo_jax.config_files import config_keys, nearest
    from kangaroo_jax.errors import UserError

    keys = list(config_keys(config))
    words = _last_of_each(words)
    for word in words:
        if word.startswith(CONFIG_KEY) and (key := _key(word)) not in keys:
            raise UserError(f"{job}: the config has no key {key!r}{nearest(key, keys)}")
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[job, *words])
    values.set_gnu_getopt(True)
    try:
        left = values([job, *words], known_only=True)[1:]
    except flags.Error as error:
        raise UserError(f"{job}: {error}") from error
    if left:
        raise UserError(f"{job}: what is {left[0]!r}? flags are written --name=value")
    changed: dict[str, Any] = config_flags.get_override_values(values["config"])
    return changed


def _key(word: str) -> str:
    return word.removeprefix(CONFIG_KEY).partition("=")[0]


def _last_of_each(words: Sequence[str]) -> list[str]:
    """`words` with only the last `--config.KEY` of each KEY: repeated flags of a tuple would add up."""
    said: list[list[str]] = []  # a flag, and its value if that is a separate word
    for word in words:
        if said and not word.startswith("--") and "=" not in said[-1][0]:
            said[-1].append(word)
        else:
            said.append([word])
    last = {_key(flag[0]): i for i, flag in enumerate(said)}
    return [word for i, flag in enumerate(said) if last[_key(flag[0])] == i for word in flag]
