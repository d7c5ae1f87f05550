"""`kangaroo data check|stats|build|show`: look at data, and build a dataset of it, before training on it."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.bench.flags import positive
from kangaroo_jax.config_files import load_config
from kangaroo_jax.data.annotations.conversation import Conversation
from kangaroo_jax.data.annotations.webdataset import Unfinished
from kangaroo_jax.data.batches.mixture import Source, open_sources
from kangaroo_jax.data.media.storage import current_cache, use_cache
from kangaroo_jax.errors import UserError, printable

_SOURCES = "annotation files (JSON, JSONL, Parquet, tar), a dataset_info.json, or a built dataset"


def main(argv: Sequence[str]) -> None:
    """Run one of the jobs; see `--help`. `check` ends with exit code 1 if anything is bad. Raises UserError."""
    parser = argparse.ArgumentParser(prog="kangaroo data", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name, summary in (
        ("check", "read every record, decode every medium in parallel, and report what is wrong with each"),
        ("stats", "lengths, languages, turns, and how full packs would be in each stage"),
        ("build", "write a TFDS dataset of ArrayRecord shards, resumable, without TensorFlow"),
        ("show", "a picture of what the model is fed of sample N"),
    ):
        job = jobs.add_parser(name, help=summary, description=summary)
        if name == "show":
            job.add_argument("number", type=int, help="of the sample, from 0")
        job.add_argument("sources", nargs="+" if name != "check" else "*", help=_SOURCES)
        job.add_argument("--media-root", default="", help="folder of the media; by default each file's own")
        job.add_argument("--allow-private", action="store_true", help="addresses may lead to private networks")
        _ARGUMENTS[name](job)
    arguments = parser.parse_args(argv)
    if arguments.allow_private:
        cache = current_cache()
        use_cache(dataclasses.replace(cache, limits=dataclasses.replace(cache.limits, allow_private=True)))
    _JOBS[arguments.job](arguments)


def _check_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("--media", nargs="+", default=(), help="media files or folders of them, in place of annotations")
    job.add_argument("--workers", type=int, default=2, help="processes")
    job.add_argument("--seconds", type=float, default=120.0, help="for one file")
    job.add_argument("--report", default="data_check.jsonl", help="a line for each medium")


def _stats_arguments(job: argparse.ArgumentParser) -> None:
    _config_arguments(job)
    job.add_argument("--limit", type=positive, default=20_000, help="samples looked at, evenly chosen")
    job.add_argument("--out", default="data_stats", help="folder for stats.json and stats.png")


def _build_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("--name", required=True, help="of the dataset, as tfds.load(NAME, data_dir=OUT) has it")
    job.add_argument("--out", required=True, help="folder of datasets")
    job.add_argument("--embed", choices=("true", "false"), default="true", help="media in the records, or by path")
    job.add_argument("--shard-samples", type=int, default=1024, help="samples of a shard")


def _show_arguments(job: argparse.ArgumentParser) -> None:
    _config_arguments(job)
    job.add_argument("--out", default="sample.png", help="the picture")


def _config_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument("--config", default="stage4_instruct:kangaroo_8b", help="a stage and a preset")
    job.add_argument("--tokenizer", required=True, help="tokenizer.json, tokenizer.model or a SentencePiece model")


# ------------------------------------------------------------------------------------ jobs


def _check(arguments: argparse.Namespace) -> None:
    from kangaroo_jax.data.audit.check import check_media, media_in, media_of
    from kangaroo_jax.data.audit.records import Records

    if not arguments.sources and not arguments.media:
        raise UserError("data check: name annotation files, or media with --media")
    media, report = media_in(arguments.media), Path(arguments.report)
    sources = open_sources(arguments.sources, arguments.media_root, check=False) if arguments.sources else []
    records = Records(sources)
    media |= media_of(records)
    bad = check_media(media, report, workers=arguments.workers, seconds=arguments.seconds)
    records.check_clips(report)
    records.summary()
    if bad or records.wrong:
        sys.exit(1)


def _stats(arguments: argparse.Namespace) -> None:
    from kangaroo_jax.data.audit.stats import write_stats

    config, tokenizer = _config(arguments)
    result = write_stats(_open(arguments), config, tokenizer, Path(arguments.out), limit=arguments.limit)
    print(json.dumps(result, indent=1, ensure_ascii=False))


def _build(arguments: argparse.Namespace) -> None:
    from kangaroo_jax.data.annotations.dataset import Plan, fingerprint_of, write_dataset

    if arguments.shard_samples < 1 or not arguments.name.isidentifier():
        raise UserError("data build: --name must be a plain word, and --shard-samples at least 1")
    sources = _open(arguments)
    plan = Plan(arguments.name, Path(arguments.out), arguments.embed == "true", arguments.shard_samples)
    fingerprint = fingerprint_of([Path(source.file.path) for source in sources if Path(source.file.path).is_file()])
    folder = write_dataset(plan, _Joined(sources, finished=True), fingerprint)
    print(f"{folder}: tfds.data_source({arguments.name!r}, data_dir={arguments.out!r}), or config.data.train")


def _show(arguments: argparse.Namespace) -> None:
    from kangaroo_jax.config import frames_per_group, tokens_per_group
    from kangaroo_jax.data.batches.loader import batch_from_recipes
    from kangaroo_jax.data.batches.preview import batch_tree, save_picture
    from kangaroo_jax.data.batches.sample import make_recipe

    samples = _Joined(_open(arguments))
    if not 0 <= arguments.number < len(samples):
        raise UserError(f"data show: there is no sample {arguments.number}; there are {len(samples)}, from 0")
    config, tokenizer = _config(arguments)
    sizes = frames_per_group(config.model), tokens_per_group(config.model, config.data.image_size)
    recipe = make_recipe(samples[arguments.number], tokenizer, config.data, *sizes)
    batch = batch_from_recipes(
        [recipe], tokens=len(recipe.tokens), frames=recipe.frames, image_size=config.data.image_size
    )
    size = f"{len(recipe.tokens)} tokens, {recipe.frames} frames"
    print(printable(f"sample {recipe.id}: {size}, language {recipe.language}"))
    print(batch_tree(batch))
    print(save_picture(batch, tokenizer, arguments.out))


_ARGUMENTS = {"check": _check_arguments, "stats": _stats_arguments, "build": _build_arguments, "show": _show_arguments}
_JOBS = {"check": _check, "stats": _stats, "build": _build, "show": _show}


def _open(arguments: argparse.Namespace) -> list[Source]:
    sources = open_sources(arguments.sources, arguments.media_root)
    for source in sources:
        print(source.file.describe())
    return sources


def _config(arguments: argparse.Namespace) -> tuple[ConfigDict, Any]:
    from kangaroo_jax.data.tokenizer import load_tokenizer

    return load_config(arguments.config), load_tokenizer(arguments.tokenizer)


class _Joined(Sequence[Conversation]):
    """The samples of all sources, one source after another."""

    def __init__(self, sources: Sequence[Source], *, finished: bool = False) -> None:
        """With `finished` those of tar shards that failed downloads left without caption or medium are left out."""
        self._places = [(source, n) for source in sources for n in range(source.count)]
        if finished:
            whole = [(s, n) for s, n in self._places if not isinstance(s.file.look_at(s.sample(n)), Unfinished)]
            if len(whole) < len(self._places):
                print(f"{len(self._places) - len(whole):,} samples without caption or medium are left out")
            self._places = whole

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        source, number = self._places[index]
        return source.file[source.sample(number)]
