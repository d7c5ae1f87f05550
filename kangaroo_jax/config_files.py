"""Finds and loads the files of `configs/`, in a clone and in an installed package alike."""

import difflib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
