"""Finds and loads the files of `configs/`, in a clone and in an installed package alike; the class of what they set."""

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ml_collections import ConfigDict

from kangaroo_jax.errors import UserError, one_line

_PACKAGE = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder `configs/`: beside the package in a clone, inside it once installed."""
    clone = _PACKAGE.parent / "configs"
    return clone if (_PACKAGE.parent / "setup.py").is_file() else _PACKAGE / "configs"


def find_config(name: str, preset: str = "") -> Path:
    """The path of `configs/PRESET/NAME.py` where there is one, else of `configs/NAME.py`.

    Raises:
        UserError: there is none; the message lists what there is.
    """
    folder = config_folder()
    files = {path.stem: path for path in (*folder.glob("*.py"), *(folder / preset).glob("*.py"))}  # the last counts
    if name not in files:
        others = [f"{path.stem}:{path.parent.name}" for path in sorted(folder.glob("*/*.py"))]
        names = sorted({*files, *(other for other in others if other.partition(":")[0] not in files)})
        raise UserError(f"no config {name!r}{nearest(name, names)}; {folder} has: {', '.join(names) or 'nothing'}")
    return files[name]


def load_config(spec: str) -> ConfigDict:
    """The locked config of `FILE[:PRESET]`, where FILE is a path or the name of a file of `configs/`.

    `configs/stage3_refine.py:tiny` and `stage3_refine:tiny` are the same, and are the file of that name in
    `configs/tiny/`, which changes what the preset's small world changes; a preset without a folder takes the paper's
    stage. A path elsewhere is taken as it is, so that a copy of a stage file, changed by its user, can stand anywhere.
    Without a PRESET the file's default.

    Raises:
        UserError: there is no such file or preset, or the file defines no `get_config` or cannot be run.
    """
    path, _, preset = spec.partition(":")
    file = Path(path)
    if not file.is_file() or file.resolve().parent == config_folder():
        if file.suffix == ".py" and file.parent.name not in ("", "configs"):
            raise UserError(f"{file}: no such config file")
        file = find_config(file.name.removesuffix(".py"), preset)
    return _config_of(file, preset, spec).lock()


def stage_of_paper(name: str, preset: str) -> ConfigDict:
    """The config of `configs/NAME.py` for a preset, to be changed by a file in `configs/PRESET/`."""
    config = _config_of(find_config(name), preset, f"{name}:{preset}")
    config.unlock()
    return config


def _config_of(file: Path, preset: str, spec: str) -> ConfigDict:
    get_config = _load_module(file).__dict__.get("get_config")
    if not callable(get_config):
        raise UserError(f"{file}: defines no function get_config(preset)")
    if preset and not inspect.signature(get_config).parameters:
        raise UserError(f"{file}: its get_config takes no preset, but {preset!r} was given")
    try:
        config = get_config(preset) if preset else get_config()
    except ValueError as error:
        raise UserError(f"{spec}: {one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config


def _load_module(file: Path) -> Any:
    """Run a config file. Its mistakes are its writer's, who may be the user: one line, and the cause attached."""
    module_spec = importlib.util.spec_from_file_location(f"kangaroo_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{file}: not a Python file; a config is one, with a function get_config(preset)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    return module


def config_keys(config: ConfigDict) -> Iterator[str]:
    """The keys of a config with dots between their levels, sections included: "optimizer.learning_rate"."""
    for key, value in config.items():
        yield key
        if isinstance(value, ConfigDict):
            yield from (f"{key}.{inner}" for inner in config_keys(value))


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'X'?)" for the one of `known` that looks most like `word`, or "" where none does.

    Keys with dots are also compared by what follows the last dot, since the section is easily forgotten.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if not close:
        by_end = {name.rpartition(".")[2]: name for name in known}
        close = [by_end[end] for end in difflib.get_close_matches(word.rpartition(".")[2], by_end, n=1)]
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclasses.dataclass(frozen=True)
class Section:
    """What the sections have in common."""

    PATH: ClassVar[str]  # where a stage's config has it

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | ConfigDict) -> Self:
        """The section with the values of a ConfigDict.

        Raises UserError that names the first key which the section does not have, which is missing, or whose value is
        of another type than its default. A whole number will do for a fraction, a list for a tuple.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        for key in config:
            if key not in fields:
                raise UserError(f"{cls.PATH}: there is no key {key!r}{nearest(key, fields)}")
        for key in fields:
            if key not in config:
                raise UserError(f"{cls.PATH}.{key} is missing; {cls.PATH} needs every key that kangaroo_jax.config has")
        return cls(**{key: _read(config[key], default, f"{cls.PATH}.{key}") for key, default in fields.items()})

    def flat(self) -> Iterator[tuple[str, Any]]:
        """(key with dots, value) of everything that is no section."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Section):
                yield from ((f"{field.name}.{key}", inner) for key, inner in value.flat())
            else:
                yield field.name, value

    def changed(self, values: Mapping[str, Any]) -> Self:
        """A copy in which keys ("packs_per_batch", "data.packs_per_batch") have these values."""
        section = self
        for key, value in values.items():
            name, _, inner = key.partition(".")
            if inner:
                value = getattr(section, name).changed({inner: value})
            section = dataclasses.replace(section, **{name: value})
        return section


def _read(value: Any, default: Any, path: str) -> Any:
    """`value` as the type of `default`. Raises UserError."""
    if isinstance(default, Section) and isinstance(value, Mapping | ConfigDict):
        return type(default).from_config(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuples(value)
    if isinstance(value, bool) == isinstance(default, bool):
        if isinstance(default, float) and isinstance(value, int):
            return float(value)
        if isinstance(value, type(default)):
            return value
    raise UserError(f"{path} is {value!r}: must be {_KINDS.get(type(default), 'a section')}")


def tuples(value: Any) -> Any:
    """The value with lists as tuples: JSON has only lists, a config only tuples."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}
