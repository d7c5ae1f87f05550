"""`kangaroo curate`: score everything, then choose; and the jobs that look at what was found.

    kangaroo curate --input=DIR|manifest.{jsonl,csv,parquet} --output=OUT     score, select, report
    kangaroo curate select --output=OUT [--config.select.max_face=0.1]        choose again, from the scores
    kangaroo curate explain ID --output=OUT                                   all that is known of one clip
    kangaroo curate report --output=OUT                                       write report.html again
    kangaroo curate export --output=OUT [--annotations=FILE] --name=NAME      a dataset for kangaroo data
    kangaroo curate doctor                                                    what is installed, and works
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.curation import engine, shards
from kangaroo_jax.curation.manifest import read_inputs
from kangaroo_jax.curation.run_shard import Plan
from kangaroo_jax.curation.shards import Shard
from kangaroo_jax.curation.stages import enabled
from kangaroo_jax.errors import UserError

ENGINES = ("local", "ray")


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command line."""

    inputs: tuple[str, ...] = ()
    output: str = ""
    engine: str = "local"
    ray_address: str = ""


def curate(options: Options, config: ConfigDict) -> Path:
    """Score the inputs, choose, and write the report. Returns the output folder. Raises UserError."""
    if options.engine not in ENGINES:
        raise UserError(f"curate: no engine {options.engine!r}; there are {', '.join(ENGINES)}")
    root = Path(options.output).resolve()
    plain = plain_config(config)
    plan = Plan(root, enabled(plain), plain)
    items = read_inputs(options.inputs, plain["input"]["media_root"], plain["input"]["fetch"])
    with shards.claimed(root):
        parts = shards.make_shards(items, plain["engine"]["shard_items"])
        score(parts, plan, options)
        remove_old(root, parts)
    return root


def score(parts: Sequence[Shard], plan: Plan, options: Options) -> None:
    """Run the engine."""
    workers = plan.config["engine"]["workers"]
    if options.engine == "ray":
        engine.run_ray(parts, plan, options.ray_address, workers)
    else:
        engine.run_local(parts, plan, workers)


def remove_old(root: Path, parts: Sequence[Shard]) -> None:
    """Remove what earlier runs wrote of shards that there are no more."""
    names = {part.name for part in parts}
    old = [file for file in (root / "scores").glob("*.jsonl") if file.stem not in names]
    if not old:
        return
    for file in old:
        shards.marker(file).unlink(missing_ok=True)
        file.unlink()
    for folder in (root / "work").iterdir():
        if folder.is_dir():
            for file in folder.glob("*-of-*"):
                if file.stem.rpartition("-")[0] not in names:
                    file.unlink()
    kept = {row["id"] for row in shards.all_scores(root)}
    for folder in (root / "keyframes").iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: lists for tuples."""
    import json

    return json.loads(json.dumps(config.to_dict()))
