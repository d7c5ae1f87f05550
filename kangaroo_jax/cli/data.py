"""`kangaroo data check|stats|build|show|init`: inspects data, builds a dataset, or begins a table, before training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kangaroo_jax.cli.arguments import Count, Natural, Number, Several
from kangaroo_jax.errors import UserError, printable

if TYPE_CHECKING:
    from kangaroo_jax.config import StageConfig
    from kangaroo_jax.data.batches.mixture import Source
    from kangaroo_jax.data.tokenizer import Tokenizer


def check(
    *sources: str,
    media: Several = None,
    workers: Count = 2,
    report: str = "data_check.jsonl",
    seconds: Number = 120.0,
    media_root: str = "",
    allow_private: bool = False,
) -> None:
    """Read every record, decode every medium in parallel, and report all errors.

        kangaroo data check train.jsonl --workers=8

    Exit code 1 if anything is bad.

    Args:
        sources: annotation files (JSON, JSONL, Parquet, tar), a dataset_info.json, or a built dataset
        media: media files or folders of them, instead of annotations
        workers: number of processes
        report: file for a line about each medium
        seconds: time limit for one file
        media_root: folder of the media; by default each file's own
        allow_private: addresses may lead to private networks
    """
    from kangaroo_jax.data.audit.check import check_media, media_in, media_of
    from kangaroo_jax.data.audit.records import Records
    from kangaroo_jax.data.batches.mixture import open_sources

    if not sources and not media:
        raise UserError("data check: name annotation files, or media with --media")
    _allow(allow_private)
    files, lines = media_in(media or []), Path(report)
    records = Records(open_sources(sources, media_root, check=False) if sources else [])
    files |= media_of(records)
    bad = check_media(files, lines, workers=workers, seconds=seconds)
    records.check_clips(lines)
    records.summary()
    if bad or records.wrong:
        raise SystemExit(1)


def stats(
    sources: list[str],
    /,
    *,
    tokenizer: str,
    config: str = "stage4_instruct:kangaroo_8b",
    limit: Count = 20_000,
    out: str = "data_stats",
    media_root: str = "",
    allow_private: bool = False,
) -> None:
    """Count lengths, languages and turns, and compute how full packs would be in each stage.

        kangaroo data stats train.jsonl --tokenizer=tokenizer.json

    Args:
        sources: annotation files (JSON, JSONL, Parquet, tar), a dataset_info.json, or a built dataset
        tokenizer: tokenizer.json, tokenizer.model or a SentencePiece model
        config: a stage and a preset
        limit: number of samples to read, evenly spaced
        out: folder for stats.json and stats.png
        media_root: folder of the media; by default each file's own
        allow_private: addresses may lead to private networks
    """
    from kangaroo_jax.data.audit.stats import write_stats

    _allow(allow_private)
    settings, vocabulary = _config(config, tokenizer)
    result = write_stats(_open(sources, media_root), settings, vocabulary, Path(out), limit=limit)
    print(json.dumps(result, indent=1, ensure_ascii=False))


def build(
    sources: list[str],
    /,
    *,
    name: str,
    out: str,
    embed: Literal["true", "false"] = "true",
    shard_samples: Count = 1024,
    media_root: str = "",
    allow_private: bool = False,
) -> None:
    """Write a TFDS dataset of ArrayRecord shards, resumable, without TensorFlow.

        kangaroo data build train.jsonl --name=set --out=/data

    Args:
        sources: annotation files (JSON, JSONL, Parquet, tar), a dataset_info.json, or a built dataset
        name: name of the dataset, as in tfds.load(NAME, data_dir=OUT)
        out: folder of datasets
        embed: true: records hold their media; false: they name them by path
        shard_samples: samples in a shard
        media_root: folder of the media; by default each file's own
        allow_private: addresses may lead to private networks
    """
    from kangaroo_jax.data.annotations.dataset import DatasetPlan, fingerprint_of, write_dataset
    from kangaroo_jax.data.audit.samples import Samples

    if not name.isidentifier():
        raise UserError(f"data build: --name={name} must be a plain word")
    _allow(allow_private)
    opened = _open(sources, media_root)
    fingerprint = fingerprint_of([Path(source.file.path) for source in opened if Path(source.file.path).is_file()])
    plan = DatasetPlan(name, Path(out), embed == "true", shard_samples)
    folder = write_dataset(plan, Samples(opened, finished=True), fingerprint)
    print(f"{folder}: tfds.data_source({name!r}, data_dir={out!r}), or config.data.train")


def show(
    number: Natural,
    sources: list[str],
    /,
    *,
    tokenizer: str,
    config: str = "stage4_instruct:kangaroo_8b",
    out: str = "sample.png",
    media_root: str = "",
    allow_private: bool = False,
) -> None:
    """Draw a picture of the model's input for sample N.

        kangaroo data show 17 train.jsonl --tokenizer=tokenizer.json

    Args:
        number: number of the sample, from 0
        sources: annotation files (JSON, JSONL, Parquet, tar), a dataset_info.json, or a built dataset
        tokenizer: tokenizer.json, tokenizer.model or a SentencePiece model
        config: a stage and a preset
        out: file for the picture
        media_root: folder of the media; by default each file's own
        allow_private: addresses may lead to private networks
    """
    from kangaroo_jax.config import frames_per_group, tokens_per_group
    from kangaroo_jax.data.audit.samples import Samples
    from kangaroo_jax.data.batches.loader import batch_from_recipes
    from kangaroo_jax.data.batches.preview import batch_tree, save_picture
    from kangaroo_jax.data.batches.sample import make_recipe

    _allow(allow_private)
    samples = Samples(_open(sources, media_root))
    if number >= len(samples):
        raise UserError(f"data show: there is no sample {number}; there are {len(samples)}, from 0")
    settings, vocabulary = _config(config, tokenizer)
    side = settings.data.image_size
    sizes = frames_per_group(settings.model), tokens_per_group(settings.model, side)
    recipe = make_recipe(samples[number], vocabulary, settings.data, *sizes)
    batch = batch_from_recipes([recipe], tokens=len(recipe.tokens), frames=recipe.frames, image_size=side)
    size = f"{len(recipe.tokens)} tokens, {recipe.frames} frames"
    print(printable(f"sample {recipe.id}: {size}, language {recipe.language}"))
    print(batch_tree(batch))
    print(save_picture(batch, vocabulary, out))


def _allow(private: bool) -> None:
    """Let addresses lead to private networks, if `private`."""
    from kangaroo_jax.data.media.storage import current_cache, use_cache

    if private:
        use_cache(current_cache().with_private())


def _open(sources: Sequence[str], media_root: str) -> "list[Source]":
    from kangaroo_jax.data.batches.mixture import open_sources

    opened = open_sources(sources, media_root)
    for source in opened:
        print(source.file.describe())
    return opened


def _config(spec: str, tokenizer: str) -> "tuple[StageConfig, Tokenizer]":
    from kangaroo_jax.config import StageConfig
    from kangaroo_jax.data.tokenizer import load_tokenizer

    return StageConfig.load(spec), load_tokenizer(tokenizer)


def init(file: str) -> None:
    """Write a table to fill in for kangaroo finetune, and explain its columns.

        kangaroo data init mine.csv

    Args:
        file: new table, FILE.csv or FILE.tsv
    """
    from kangaroo_jax.finetune.table import TABLES, template

    path = Path(file)
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{path}: call it {' or '.join(f'{path.stem}{ending}' for ending in TABLES)}")
    print("\n".join([f"{path}: a table with three examples", *template(path)]))


COMMANDS = {"check": check, "stats": stats, "build": build, "show": show, "init": init}
