"""`kangaroo JOB ...`: a table of jobs, each imported only when it is asked for.

Bad input is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from absl import flags
    from ml_collections import ConfigDict

USAGE = """usage: kangaroo JOB [--flag=value ...]
       kangaroo JOB --help

Kangaroo, a video-language model for long videos, in JAX.

jobs:
"""
CONFIG_KEY = "--config."


@dataclasses.dataclass(frozen=True)
class Job:
    """A line of the table: what the job does, its flags and what runs it."""

    summary: str
    define: Callable[["flags.FlagValues"], None] | None  # None: the job reads its arguments itself
    run: Callable[["flags.FlagValues", list[str]], None]  # with the arguments that are no flag of the job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the arguments (by default those of the process) name; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        print(USAGE + "".join(f"  {name:12}{job.summary}\n" for name, job in JOBS.items()), end="")
        return 0
    if arguments[0] == "--version":
        from kangaroo_jax import __version__

        print(f"kangaroo {__version__}")
        return 0
    try:
        _run_job(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("kangaroo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from kangaroo_jax.conventions import UserError

        if not isinstance(error, UserError):
            raise
        print(f"kangaroo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run_job(name: str, arguments: list[str]) -> None:
    from absl import flags

    from kangaroo_jax.config_files import nearest
    from kangaroo_jax.conventions import UserError

    if name not in JOBS:
        raise UserError(f"no job {name!r}{nearest(name, JOBS)}: kangaroo --help lists them")
    job = JOBS[name]
    values = flags.FlagValues()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # lines appear at once in a pipe; no terminal's encoding is an error
            stream.reconfigure(line_buffering=True, errors="replace")
    if job.define is None:
        job.run(values, arguments)
        return
    job.define(values)
    if any(argument in ("--help", "-h", "-help") for argument in arguments):
        print(_help(name, job, values), end="")
        return
    job.run(values, _parse(values, name, arguments))


def _help(name: str, job: Job, values: "flags.FlagValues") -> str:
    lines = [f"usage: kangaroo {name} [--flag=value ...]", "", job.summary, "", "flags:"]
    for flag in sorted(values):
        default = "" if values[flag].default in (None, "", False) else f" (default {values[flag].default})"
        lines.append(f"  --{flag:16} {values[flag].help}{default}")
    return "\n".join(lines) + "\n"


def _parse(values: "flags.FlagValues", job: str, arguments: list[str]) -> list[str]:
    """Parse the flags among `arguments`; returns the other arguments. Raises UserError for a bad value."""
    from absl import flags

    from kangaroo_jax.conventions import UserError

    values.set_gnu_getopt(True)
    try:
        return values([job, *arguments], known_only=True)[1:]
    except flags.Error as error:
        raise UserError(f"{job}: {error}") from error


def _no_more(job: str, values: "flags.FlagValues", rest: Sequence[str]) -> None:
    """Raise UserError for the first argument that is left over."""
    from kangaroo_jax.config_files import nearest
    from kangaroo_jax.conventions import UserError

    if not rest:
        return
    flag = rest[0].lstrip("-").partition("=")[0]
    if rest[0].startswith("-"):
        raise UserError(f"{job}: no flag --{flag}{nearest(flag, values)}: kangaroo {job} --help lists them")
    raise UserError(f"{job}: what is {rest[0]!r}? flags are written --name=value")


def _required(job: str, values: "flags.FlagValues", *names: str) -> None:
    from kangaroo_jax.conventions import UserError

    for name in names:
        if not values[name].value:
            raise UserError(f"{job}: --{name} is missing ({values[name].help})")


def _workdir(values: "flags.FlagValues") -> Path:
    """The folder of --workdir, made where it does not exist."""
    from kangaroo_jax.conventions import UserError

    path = Path(values.workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a working folder ({error.strerror})") from error
    return path


# ---------------------------------------------------------------------------------- config


def _not_of_config(rest: Sequence[str]) -> list[str]:
    """Flags that set no key of a config."""
    return [flag for flag in rest if flag.startswith("--") and not flag.startswith(CONFIG_KEY)]


def _override(job: str, values: "flags.FlagValues", config: "ConfigDict", rest: list[str]) -> dict[str, Any]:
    """Set the `--config.KEY=VALUE` of `rest` in `config`; returns them by key. Raises UserError for anything else."""
    from absl import flags
    from ml_collections import config_flags

    from kangaroo_jax.config_files import config_keys, nearest
    from kangaroo_jax.conventions import UserError

    keys = list(config_keys(config))
    for argument in rest:
        if argument.startswith(CONFIG_KEY):
            key = argument.removeprefix(CONFIG_KEY).partition("=")[0]
            if key not in keys:
                raise UserError(f"{job}: the config has no key {key!r}{nearest(key, keys)}")
    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=[job, *rest])
    left = _parse(overrides, job, rest)
    _no_more(job, values, left)
    return config_flags.get_override_values(overrides["config"])


# ------------------------------------------------------------------------------------ jobs


def _define_train(values: "flags.FlagValues") -> None:
    from absl import flags

    define = _definer(values)
    define(flags.DEFINE_string, "config", None, "FILE[:PRESET], such as configs/stage3_refine.py:tiny")
    define(flags.DEFINE_string, "workdir", None, "folder for checkpoints, metrics and pictures")
    define(flags.DEFINE_bool, "strict", False, "stop at the first sample that cannot be read")


def _run_train(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config_files import load_config

    _no_more("train", values, _not_of_config(rest))
    _required("train", values, "config", "workdir")
    config = load_config(values.config)
    _override("train", values, config, rest)
    if values.strict:
        config.data.strict = True
    workdir = _workdir(values)

    from kangaroo_jax.training.loop import train

    train(config, workdir)


def _define_curriculum(values: "flags.FlagValues") -> None:
    from absl import flags

    define = _definer(values)
    define(flags.DEFINE_string, "preset", "tiny", "sizes of the model: kangaroo_8b, base_100m or tiny")
    define(flags.DEFINE_string, "workdir", None, "every stage gets a folder here")
    define(flags.DEFINE_string, "data", None, "folder with stage1.jsonl ... stage5.jsonl and the media they name")
    define(flags.DEFINE_string, "tokenizer", None, "tokenizer.json, tokenizer.model or a SentencePiece model")


def _run_curriculum(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config import PRESETS, stage_config
    from kangaroo_jax.config_files import nearest
    from kangaroo_jax.conventions import UserError

    _no_more("curriculum", values, _not_of_config(rest))
    _required("curriculum", values, "workdir", "data", "tokenizer")
    preset = values.preset
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    overrides = _override("curriculum", values, stage_config(preset).lock(), rest)
    workdir = _workdir(values)

    from kangaroo_jax.training import curriculum

    data, tokenizer = values.data, values.tokenizer
    curriculum.run(preset, workdir, data=data, tokenizer=tokenizer, overrides=overrides)


def _define_quickstart(values: "flags.FlagValues") -> None:
    from absl import flags

    define = _definer(values)
    define(flags.DEFINE_string, "workdir", "runs/quickstart", "folder for everything; run again to go on")
    define(flags.DEFINE_integer, "seed", 0, "of the corpus, the weights and the order of samples", lower_bound=0)
    define(flags.DEFINE_bool, "ablate", False, "also train without each part of the design, and compare")
    define(flags.DEFINE_float, "scale", 1.0, "share of the corpus and of the steps", lower_bound=1e-4)


def _run_quickstart(values: "flags.FlagValues", rest: list[str]) -> None:
    _no_more("quickstart", values, rest)
    workdir = _workdir(values)

    from kangaroo_jax.tools import quickstart

    quickstart.run(workdir, seed=values.seed, scale=values.scale, ablate=values.ablate)


def _define_chat(values: "flags.FlagValues") -> None:
    from absl import flags

    define = _definer(values)
    define(flags.DEFINE_string, "checkpoint", None, "folder that training wrote: a curriculum, a stage or one step")
    define(flags.DEFINE_string, "video", None, "video file to talk about")
    define(flags.DEFINE_string, "image", None, "image file to talk about")
    define(flags.DEFINE_float, "start", None, "second of the video to begin at", lower_bound=0.0)
    define(flags.DEFINE_float, "end", None, "second of the video to end at", lower_bound=0.0)
    define(flags.DEFINE_string, "query", None, "one question; without it a conversation begins")
    define(flags.DEFINE_float, "temperature", 0.0, "0 always takes the likeliest token", lower_bound=0.0)
    define(flags.DEFINE_float, "top_p", 0.9, "sample among the likeliest tokens of this total probability")
    define(flags.DEFINE_integer, "max_new_tokens", 512, "longest answer, in tokens", lower_bound=1)
    define(flags.DEFINE_integer, "seed", 0, "of the sampling", lower_bound=0)


def _run_chat(values: "flags.FlagValues", rest: list[str]) -> None:
    _no_more("chat", values, rest)
    _required("chat", values, "checkpoint")
    options: dict[str, Any] = {name: values[name].value for name in values if name != "checkpoint"}

    from kangaroo_jax.inference.chat import chat_main

    chat_main(values.checkpoint, **options)


def _run_bench(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.tools import bench

    bench.main(rest)


def _run_data(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.tools import data

    data.main(rest)


def _definer(values: "flags.FlagValues") -> Callable[..., Any]:
    """`define(DEFINE_x, name, default, help)` for the flags of one job."""
    return lambda define, *args, **kwargs: define(*args, flag_values=values, **kwargs)


JOBS = {
    "quickstart": Job("train a tiny Kangaroo from nothing, in minutes on a CPU", _define_quickstart, _run_quickstart),
    "curriculum": Job("train all five stages, each from the last one's weights", _define_curriculum, _run_curriculum),
    "train": Job("train one stage from a config file; --config.KEY=VALUE changes it", _define_train, _run_train),
    "chat": Job("ask a trained model about a video or an image", _define_chat, _run_chat),
    "data": Job("check, measure, build and look at training data", None, _run_data),
    "bench": Job("measure the speed of training steps", None, _run_bench),
}
