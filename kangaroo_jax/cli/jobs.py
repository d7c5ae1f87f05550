"""The jobs of the command line: their flags, and what runs them. Each imports what it needs when it is asked for."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kangaroo_jax.cli.arguments import definer, make_workdir, no_more, not_of_config, override, required

if TYPE_CHECKING:
    from absl import flags
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Job:
    """A line of the table: what the job does, its flags and what runs it."""

    summary: str
    define: Callable[["flags.FlagValues"], None] | None  # None: the job reads its arguments itself
    run: Callable[["flags.FlagValues", list[str]], None]  # with the arguments that are no flag of the job
    huge_pages: bool = False  # of what runs a model in its own process
    more: str = ""  # of its help, between the summary and the flags
    words: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # flags of each job within it


def _define_train(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_string, "config", None, "FILE[:PRESET], such as configs/stage3_refine.py:tiny")
    define(flags.DEFINE_string, "workdir", None, "folder for checkpoints, metrics and pictures")
    define(flags.DEFINE_bool, "strict", False, "stop at the first sample that cannot be read")


def _run_train(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config_files import load_config

    no_more("train", values, not_of_config(rest))
    required("train", values, "config", "workdir")
    config = load_config(values.config)
    override("train", values, config, rest)
    if values.strict:
        config.data.strict = True
    workdir = make_workdir(values)

    from kangaroo_jax.training.distributed import initialize

    initialize()

    from kangaroo_jax.training.loop import train

    train(config, workdir)


def _define_curriculum(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_string, "preset", "tiny", "sizes of the model: kangaroo_8b, base_100m or tiny")
    define(flags.DEFINE_string, "workdir", None, "every stage gets a folder here")
    define(flags.DEFINE_string, "data", None, "folder with stage1.jsonl ... stage5.jsonl and the media they name")
    define(flags.DEFINE_string, "tokenizer", None, "tokenizer.json, tokenizer.model or a SentencePiece model")


def _preset(name: str) -> str:
    """The name of a preset. Raises UserError for another."""
    from kangaroo_jax.config import PRESETS
    from kangaroo_jax.config_files import nearest
    from kangaroo_jax.errors import UserError

    if name not in PRESETS:
        raise UserError(f"no preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return name


def _run_curriculum(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config import stage_config

    no_more("curriculum", values, not_of_config(rest))
    required("curriculum", values, "workdir", "data", "tokenizer")
    preset = _preset(values.preset)
    overrides = override("curriculum", values, stage_config(preset).lock(), rest)
    workdir = make_workdir(values)

    from kangaroo_jax.training.distributed import initialize

    initialize()

    from kangaroo_jax.training import curriculum

    data, tokenizer = values.data, values.tokenizer
    curriculum.run(preset, workdir, data=data, tokenizer=tokenizer, overrides=overrides)


def _define_quickstart(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_string, "workdir", "runs/quickstart", "folder for everything; run again to go on")
    define(flags.DEFINE_integer, "seed", 0, "of the corpus, the weights and the order of samples", lower_bound=0)
    define(flags.DEFINE_bool, "ablate", False, "also train without each part of the design, and compare")
    define(flags.DEFINE_float, "scale", 1.0, "share of the corpus and of the steps", lower_bound=1e-4)


def _run_quickstart(values: "flags.FlagValues", rest: list[str]) -> None:
    no_more("quickstart", values, rest)
    workdir = make_workdir(values)

    from kangaroo_jax.quickstart import run as quickstart

    quickstart.run(workdir, seed=values.seed, scale=values.scale, ablate=values.ablate)


def _define_chat(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_string, "checkpoint", None, "folder that training wrote: a curriculum, a stage or one step")
    video = "file, folder of images or address of a video to talk about; given several times: its frames, as images"
    define(flags.DEFINE_multi_string, "video", None, video)
    define(flags.DEFINE_string, "image", None, "image to talk about: a file or an address")
    define(flags.DEFINE_float, "start", None, "second of the video to begin at", lower_bound=0.0)
    define(flags.DEFINE_float, "end", None, "second of the video to end at", lower_bound=0.0)
    define(flags.DEFINE_string, "query", None, "one question; without it a conversation begins")
    define(flags.DEFINE_float, "temperature", 0.0, "0 always takes the likeliest token", lower_bound=0.0)
    define(flags.DEFINE_float, "top_p", 0.9, "sample among the likeliest tokens of this total probability")
    define(flags.DEFINE_integer, "max_new_tokens", 512, "longest answer, in tokens", lower_bound=1)
    define(flags.DEFINE_integer, "seed", 0, "of the sampling", lower_bound=0)


def _run_chat(values: "flags.FlagValues", rest: list[str]) -> None:
    no_more("chat", values, rest)
    required("chat", values, "checkpoint")
    options: dict[str, Any] = {name: values[name].value for name in values if name != "checkpoint"}
    if values.video is not None and len(values.video) == 1:
        options["video"] = values.video[0]

    from kangaroo_jax.inference.chat import chat_main

    chat_main(values.checkpoint, **options)


def _define_convert(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_list, "from", None, "what to convert: a folder or file, or two that make a model, with a comma")
    define(flags.DEFINE_string, "vision", None, "EVA02-CLIP encoder (EVA's, OpenCLIP's or timm's file), with --llm")
    define(flags.DEFINE_string, "llm", None, "Llama (a Hugging Face folder, or Meta's), with --vision")
    define(flags.DEFINE_string, "lora", None, "LoRA adapter (a PEFT folder, or one of ours), added to the weights")
    define(flags.DEFINE_string, "base", None, "of a PEFT adapter in --from: the model that it adapts; else --preset")
    define(flags.DEFINE_string, "to", None, "new folder for the result")
    define(
        flags.DEFINE_string,
        "format",
        "",
        "orbax, hf, llama, meta, eva, timm or, of an adapter, peft; by default hf from ours, else orbax",
    )
    define(flags.DEFINE_string, "dtype", "keep", "keep, float32, bfloat16 or float16")
    define(flags.DEFINE_string, "preset", "kangaroo_8b", "the model where the files do not say what it is")
    define(flags.DEFINE_string, "tokenizer", None, "tokenizer that goes with it; by default the one beside the weights")
    define(flags.DEFINE_integer, "seed", 0, "of what --vision and --llm leave to be initialised", lower_bound=0)
    define(
        flags.DEFINE_bool,
        "verify",
        False,
        "run each source and the result, one in JAX and one in PyTorch, and compare; converts first if need be",
    )
    define(flags.DEFINE_string, "video", None, "video or image of --verify; by default one made for it")
    define(flags.DEFINE_string, "query", None, "question of --verify")


def _run_convert(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config import stage_config
    from kangaroo_jax.errors import UserError
    from kangaroo_jax.system.installing import install_line

    no_more("convert", values, not_of_config(rest))
    required("convert", values, "to")
    if values.verify and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise UserError(
            f"convert: --verify runs the model in PyTorch too, which is not installed: {install_line('convert')}"
        )
    given = {name: values[name].value for name in ("from", "vision", "llm")}
    if bool(given["from"]) == bool(given["vision"] or given["llm"]):
        raise UserError("convert: give --from, or --vision and --llm")
    overrides = override("convert", values, stage_config(_preset(values.preset)).lock(), rest)
    names = ("format", "dtype", "preset", "tokenizer", "seed", "lora", "base")
    options: dict[str, Any] = {name: values[name].value for name in names}
    checks: dict[str, Any] = {"media": values.video, "query": values.query} if values.verify else {}

    from kangaroo_jax.conversion.convert import convert_main

    sources = list(given["from"] or [path for path in (given["vision"], given["llm"]) if path])
    if Path(",".join(sources)).exists():  # one whose name has a comma
        sources = [",".join(sources)]
    convert_main(sources, values.to, verify=values.verify, checks=checks, overrides=overrides, **options)


def _define_curate(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_list, "input", None, "folders, media files or manifests (.jsonl, .csv, .parquet), with commas")
    define(flags.DEFINE_string, "output", None, "folder for scores, key frames and the choice; run again to go on")
    define(flags.DEFINE_string, "config", "curation", "FILE; every threshold is in it")
    define(flags.DEFINE_string, "engine", "local", "local (processes of this machine) or ray")
    define(flags.DEFINE_string, "ray_address", "", "of a Ray cluster; without it Ray is started here")
    define(flags.DEFINE_bool, "retry", False, "try again what failed")
    define(flags.DEFINE_string, "name", "curated", "of the dataset that `curate export` writes")
    define(
        flags.DEFINE_string, "annotations", None, "conversations for `curate export`; by default captions of the input"
    )


def _run_curate(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config_files import load_config

    words = [word for word in rest if not word.startswith("-")]
    config = load_config(values.config)
    overrides = override("curate", values, config, [flag for flag in rest if flag.startswith("-")])
    options: dict[str, Any] = {name: values[name].value for name in values if name != "config"}

    from kangaroo_jax.curation.curate import main as curate_main

    curate_main(words, config, overrides=overrides, **options)


def _run_bench(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.cli import bench

    bench.main(rest)


def _define_plan(values: "flags.FlagValues") -> None:
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_string, "config", None, "FILE[:PRESET], such as configs/stage5_long_video.py:kangaroo_8b")
    define(flags.DEFINE_string, "topology", None, "chips: v5e:4x8, v5p:2x2x4, v6e:4x8, H100:8, ...")
    define(flags.DEFINE_integer, "slices", 1, "slices (or nodes) of that size, joined by a slower network")
    define(flags.DEFINE_bool, "curriculum", False, "all five stages of kangaroo_8b and their sum, without --config")
    define(flags.DEFINE_bool, "search", False, "compile several meshes and remat policies, print the best that fits")
    define(flags.DEFINE_bool, "json", False, "print JSON")
    define(flags.DEFINE_float, "mfu", 0.45, "assumed utilisation (causal attention counted), for time and cost")
    define(flags.DEFINE_float, "price_per_chip_hour", None, "in any currency", lower_bound=0.0)
    define(flags.DEFINE_string, "cache", "", "folder that keeps results, so that the same step is compiled once")
    define(flags.DEFINE_string, "table", None, "only print a file of lines of --json as a Markdown table")


def _run_plan(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.config_files import config_folder, load_config
    from kangaroo_jax.planning.compile import prepare_environment

    no_more("plan", values, not_of_config(rest))
    if values.table:
        from kangaroo_jax.planning import plan

        table = Path(values.table)
        if not table.exists() and (of_clone := config_folder().parent / table).is_file():
            table = of_clone
        print(plan.table_of_file(table))
        return
    required("plan", values, "topology", *(() if values.curriculum else ("config",)))
    prepare_environment()  # before anything imports JAX

    from kangaroo_jax.config import STAGES
    from kangaroo_jax.planning import plan

    specs = [f"{name}:kangaroo_8b" for name in STAGES] if values.curriculum else [values.config]
    configs = [load_config(spec) for spec in specs]
    for config in configs:
        override("plan", values, config, rest)
    code = plan.run(
        configs,
        values.topology,
        slices=values.slices,
        mfu=values.mfu,
        price=values.price_per_chip_hour,
        as_json=values.json,
        do_search=values.search,
        cache=Path(values.cache) if values.cache else None,
    )
    if code:
        raise SystemExit(code)


def _run_data(values: "flags.FlagValues", rest: list[str]) -> None:
    from kangaroo_jax.cli import data

    data.main(rest)


def _define_annotate(values: "flags.FlagValues") -> None:
    reads = "JSONL of clips with key frames, as kangaroo curate select writes it"
    writes = "folder for captions.jsonl, refined.jsonl; by default that of --input"
    _annotation_flags(values, "annotation", reads, writes)


def _annotation_flags(values: "flags.FlagValues", config: str, reads: str, writes: str) -> None:
    """The flags of a job that asks models; see `_annotation_arguments`."""
    from absl import flags

    define = definer(values)
    define(flags.DEFINE_string, "input", None, reads)
    define(flags.DEFINE_string, "output", None, writes)
    define(flags.DEFINE_string, "config", config, f"FILE[:PRESET], such as configs/{config}.py:endpoint")
    define(flags.DEFINE_bool, "dry_run", False, "only estimate calls, tokens and cost")


def _run_annotate(values: "flags.FlagValues", rest: list[str]) -> None:
    source, output, config = _annotation_arguments("annotate", values, rest)

    from kangaroo_jax.curation.annotate.run import annotate_main

    annotate_main(source, output, config, dry_run=values.dry_run)


def _annotation_arguments(job: str, values: "flags.FlagValues", rest: list[str]) -> "tuple[Path, Path, ConfigDict]":
    """(file of --input, folder of --output, config) of a job. Raises UserError."""
    from kangaroo_jax.config_files import load_config

    no_more(job, values, not_of_config(rest))
    required(job, values, "input")
    config = load_config(values.config)
    override(job, values, config, rest)
    source = Path(values.input)
    return source, Path(values.output) if values.output else source.parent, config


def _define_instruct(values: "flags.FlagValues") -> None:
    reads = "captions.jsonl or refined.jsonl, as kangaroo annotate writes them"
    _annotation_flags(values, "instruct", reads, "folder of instruct.jsonl; by default that of --input")


def _run_instruct(values: "flags.FlagValues", rest: list[str]) -> None:
    source, output, config = _annotation_arguments("instruct", values, rest)

    from kangaroo_jax.curation.instruct.run import instruct_main

    instruct_main(source, output, config, dry_run=values.dry_run)


_CONFIG_HELP = """\
Every key of the config is a flag, --config.KEY=VALUE: --config.train.steps=100 --config.optimizer.learning_rate=1e-4
--config.data.train='("a.jsonl",)'. The last one of a key counts. config.json in a work folder lists all keys.
"""
_STAGES_HELP = """\
Stages (FILE): stage1_image_pretrain, stage2_video_pretrain, stage3_refine, stage4_instruct or
stage5_long_video, or a path of yours.
Presets: kangaroo_8b (the published sizes), base_100m (benchmarks), tiny (CPU).
"""
_CURATE_HELP = """\
  kangaroo curate --input=PATH,... --output=DIR    score everything, choose, report
  kangaroo curate select --output=DIR              choose again, from the scores: --config.select.max_face=0.1
  kangaroo curate explain ID --output=DIR          all that is known of one clip (an id, its beginning, or a file)
  kangaroo curate report --output=DIR              write report.html again
  kangaroo curate export --output=DIR              a dataset of what was chosen, for training
  kangaroo curate doctor                           what is installed, and works

kangaroo curate JOB --help lists the flags of one of them. Thresholds and stages are keys of configs/curation.py:
--config.KEY=VALUE, or a copy of that file in --config.
"""
_CURATE_FLAGS = {
    "select": ("output", "config"),
    "explain": ("output", "config"),
    "report": ("output", "config", "annotations"),
    "export": ("output", "config", "name", "annotations"),
    "doctor": (),
}

JOBS = {
    "quickstart": Job(
        "train a tiny Kangaroo from nothing, in minutes on a CPU", _define_quickstart, _run_quickstart, huge_pages=True
    ),
    "curriculum": Job(
        "train all five stages, each from the last one's weights",
        _define_curriculum,
        _run_curriculum,
        huge_pages=True,
        more=_CONFIG_HELP,
    ),
    "train": Job(
        "train one stage from a config file; --config.KEY=VALUE changes it",
        _define_train,
        _run_train,
        huge_pages=True,
        more=_STAGES_HELP + _CONFIG_HELP,
    ),
    "chat": Job("ask a trained model about a video or an image", _define_chat, _run_chat, huge_pages=True),
    "convert": Job("convert weights from and to Hugging Face, PyTorch and Meta", _define_convert, _run_convert),
    "plan": Job("what a stage needs on chips not rented yet: memory, time, cost", _define_plan, _run_plan),
    "data": Job("check, measure, build and look at training data", None, _run_data),
    "curate": Job(
        "score raw videos and images and choose among them",
        _define_curate,
        _run_curate,
        more=_CURATE_HELP,
        words=_CURATE_FLAGS,
    ),
    "annotate": Job("caption clips by their key frames, with any models", _define_annotate, _run_annotate),
    "instruct": Job("make an instruction set out of captions", _define_instruct, _run_instruct),
    "bench": Job(
        "measure training, the data loader, packing, conversion, curation and annotation",
        None,
        _run_bench,
        huge_pages=True,
    ),
}
