"""`kangaroo curate`: scores everything, then chooses; and the jobs that inspect the results."""

from typing import TYPE_CHECKING, Any

from kangaroo_jax.cli.arguments import Overrides, listed
from kangaroo_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from kangaroo_jax.curation.curate import Options


def curate(
    *,
    input: str,
    output: str,
    config: str = "curation",
    engine: str = "local",
    retry: bool = False,
    ray_address: str = "",
    annotations: str = "",
    overrides: Overrides = (),
) -> None:
    """Score raw videos and images and choose among them.

        kangaroo curate --input=videos/ --output=curated/

    Thresholds and stages are keys of configs/curation.py: --config.KEY=VALUE, or a copy of that file in --config.

    Args:
        input: folders, media files or manifests (.jsonl, .csv, .parquet), comma-separated
        output: folder of scores, key frames and the choice; run again to go on
        config: FILE; every threshold is in it
        engine: local (processes of this machine) or ray
        retry: try failed items again
        ray_address: address of a Ray cluster; without it Ray is started here
        annotations: conversations whose captions report.html shows
    """
    from kangaroo_jax.curation import curate as library

    more = {"engine": engine, "ray_address": ray_address, "retry": retry, "annotations": annotations}
    options, settings = _prepared("curate", output, config, overrides, inputs=tuple(listed(input)), **more)
    if not options.inputs:
        raise UserError("curate: --input is missing (folders, media files or manifests)")
    library.curate(options, settings)


def select(*, output: str, config: str = "curation", overrides: Overrides = ()) -> None:
    """Choose again from the existing scores.

        kangaroo curate select --output=curated/ --config.select.max_face=0.1

    Args:
        output: folder of scores, key frames and the choice
        config: FILE; every threshold is in it
    """
    from kangaroo_jax.curation.curate import select_again

    select_again(*_prepared("curate select", output, config, overrides))


def explain(id: str, /, *, output: str, config: str = "curation", overrides: Overrides = ()) -> None:
    """Print all scores of one clip.

        kangaroo curate explain clip.mp4 --output=curated/

    Args:
        id: an id, its beginning, or a file
        output: folder of scores, key frames and the choice
        config: FILE; every threshold is in it
    """
    from kangaroo_jax.curation.curate import explain

    explain(*_prepared("curate explain", output, config, overrides), id)


def report(*, output: str, annotations: str = "", config: str = "curation", overrides: Overrides = ()) -> None:
    """Write report.html again.

        kangaroo curate report --output=curated/ --annotations=curated/captions.jsonl

    Args:
        output: folder of scores, key frames and the choice
        annotations: conversations whose captions it shows
        config: FILE; every threshold is in it
    """
    from kangaroo_jax.curation.curate import report

    report(*_prepared("curate report", output, config, overrides, annotations=annotations))


def export(
    *,
    output: str,
    name: str = "curated",
    annotations: str = "",
    config: str = "curation",
    overrides: Overrides = (),
) -> None:
    """Write the chosen clips as a dataset for training.

        kangaroo curate export --output=curated/ --name=clips

    Args:
        output: folder of scores, key frames and the choice
        name: name of the dataset
        annotations: its conversations; by default the captions of the input
        config: FILE; every threshold is in it
    """
    from kangaroo_jax.curation.curate import export

    export(*_prepared("curate export", output, config, overrides, name=name, annotations=annotations))


def doctor() -> None:
    """Print whether what curation needs is installed and works.

    kangaroo curate doctor
    """
    from kangaroo_jax.doctor.run import examine

    if not examine(("", "curation")):
        raise SystemExit(1)


def _prepared(job: str, output: str, config: str, overrides: Overrides, **options: Any) -> "tuple[Options, ConfigDict]":
    """The arguments of a job of `curation.curate`."""
    from kangaroo_jax.cli.overrides import override
    from kangaroo_jax.config_files import load_config
    from kangaroo_jax.curation.curate import Options

    settings = load_config(config)
    changes = override(job, settings, overrides)
    return Options(output, overrides=changes, **options), settings


COMMANDS = {
    "": curate,
    "select": select,
    "explain": explain,
    "report": report,
    "export": export,
    "doctor": doctor,
}
