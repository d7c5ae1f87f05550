"""`kangaroo curate` and the jobs within it: score everything, choose, and inspect the results."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.curation import select
from kangaroo_jax.curation.engine import run as engine
from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.curation.engine.run_shard import ShardPlan, is_done
from kangaroo_jax.curation.engine.shards import Shard
from kangaroo_jax.curation.stages import STAGES, allow_private, enabled, run_stage, run_stage_anywhere
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_objects

ENGINES = ("local", "ray")


@dataclasses.dataclass(frozen=True)
class Options:
    """A job's options besides its config."""

    output: str
    inputs: tuple[str, ...] = ()
    engine: str = "local"
    ray_address: str = ""
    retry: bool = False
    name: str = "curated"
    annotations: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # --config.KEY=VALUE, by key

    @property
    def root(self) -> Path:
        """The output folder."""
        return Path(self.output).resolve()


def curate(options: Options, config: ConfigDict) -> None:
    """Score the inputs and choose. Raises UserError."""
    if options.engine not in ENGINES:
        raise UserError(f"curate: no engine {options.engine!r}; there are {', '.join(ENGINES)}")
    root, plain = options.root, plain_config(config)
    if plain["embedding"]["checkpoint"]:
        from kangaroo_jax.curation.stages.embedding import with_identity

        plain["embedding"] = with_identity(plain["embedding"])
    plan = ShardPlan(root, enabled(plain), plain, run_stage_anywhere if plain["input"]["allow_private"] else run_stage)
    items = read_inputs(options.inputs, plain["input"]["media_root"], plain["input"]["fetch"], root)
    with shards.claimed(root):
        parts = shards.make_shards(items, plain["engine"]["shard_items"])
        tell_replaced(root, parts, plan)
        if options.retry:
            forget_failures(root)
        score(parts, plan, options)
        remove_old(root, parts)
        _choose(options, plain["select"])


def tell_replaced(root: Path, parts: Sequence[Shard], plan: ShardPlan) -> None:
    """Print how many items of earlier runs are no longer in the input.

    Raises UserError: none of them is in it, so this is a different input.
    """
    now = {part.name: part for part in parts}
    files = list((root / "scores").glob("*.jsonl"))
    changed = [file for file in files if file.stem not in now or not is_done(now[file.stem], plan)]
    before = {row["item"] for file in changed for row in read_objects(file)}
    gone = before - {item["id"] for part in parts for item in part.items}
    if gone and len(gone) == len(before) and len(changed) == len(files):
        raise UserError(
            f"{root}: has the scores of {len(gone):,} items, of which none is in this input; give another --output, "
            "both inputs with a comma, or remove the folder first"
        )
    if gone:
        print(f"curate: {len(gone):,} items of the last run are no longer in the input; their scores are removed")


def _choose(options: Options, settings: dict[str, Any]) -> None:
    from kangaroo_jax.curation.report import write_report

    root = options.root
    result = select.select(root, settings)
    print(select.table(result))
    print(write_report(root, settings, options.annotations))
    broken, clips = result["rules"][0]["dropped"], result["clips"]
    if broken == clips:
        first = next(read_objects(root / "dropped.jsonl"))["reason"]
        raise UserError(
            f"curate: all {clips:,} clips are broken, the first because of {first}; {root / 'dropped.jsonl'} has the "
            "others; kangaroo curate --retry with the same flags tries again"
        )
    if broken:
        print(f"{broken:,} of {clips:,} clips are broken: dropped.jsonl says why, kangaroo curate --retry tries again")


def select_again(options: Options, config: ConfigDict) -> None:
    """Choose again from the existing scores. Raises UserError."""
    shards.score_files(options.root)
    with shards.claimed(options.root):
        _choose(options, plain_config(config)["select"])


def chosen_by(options: Options, config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that the last choice was made with, and those of the command line that differ from them.

    Raises UserError: nothing was chosen yet.
    """
    shards.score_files(options.root)
    given, last = plain_config(config)["select"], select.last_settings(options.root)
    if not (options.root / "funnel.json").exists():
        raise UserError(f"{options.root}: nothing was chosen here yet; run kangaroo curate select first")
    if last is None:  # an earlier version wrote none
        return given, {}
    keys = [key.removeprefix("select.") for key in options.overrides if key.startswith("select.")]
    return {**given, **last}, {key: given[key] for key in keys if given[key] != last.get(key)}


def _of_last_choice(job: str, options: Options, config: ConfigDict) -> dict[str, Any]:
    """The settings of the last choice. Raises UserError: the command line has others."""
    settings, other = chosen_by(options, config)
    for key, value in other.items():
        raise UserError(
            f"curate {job}: the last choice was made with select.{key}={settings[key]}; run kangaroo curate select "
            f"--output={options.output} --config.select.{key}={value} first"
        )
    return settings


def report(options: Options, config: ConfigDict) -> None:
    """Write report.html anew. Raises UserError."""
    from kangaroo_jax.curation.report import write_report

    settings = _of_last_choice("report", options, config)
    with shards.claimed(options.root):
        print(write_report(options.root, settings, options.annotations))


def explain(options: Options, config: ConfigDict, name: str) -> None:
    """Print all scores of a clip, with the settings of the last choice and those of the command line.

    Raises UserError.
    """
    from kangaroo_jax.curation.explain import explain as explain_clip

    settings, other = chosen_by(options, config)
    for key, value in other.items():
        print(f"as if select.{key} were {value}; the last choice was made with {settings[key]}")
    explain_clip(options.root, name, settings | other)


def export(options: Options, config: ConfigDict) -> None:
    """Write what was kept as a dataset. Raises UserError."""
    from kangaroo_jax.curation.export import export as write

    settings = _of_last_choice("export", options, config)
    if config.input.allow_private:
        allow_private()
    with shards.claimed(options.root):
        print(write(options.root, plain_config(config) | {"select": settings}, options.name, options.annotations))


def score(parts: Sequence[Shard], plan: ShardPlan, options: Options) -> None:
    """Run the engine."""
    workers = plan.config["engine"]["workers"]
    if options.engine == "ray":
        engine.run_ray(parts, plan, options.ray_address, workers)
    else:
        engine.run_local(parts, plan, workers)


def forget_failures(root: Path) -> None:
    """Remove the markers of stages that failed in a shard, or that follow one that failed, so that they run again."""
    again: dict[str, set[str]] = {}
    for stage in STAGES:  # a stage comes after those that it follows
        files = {file: file.stem.rpartition("-")[0] for file in (root / "stages" / stage.name).glob("*.done")}
        failed = {shard for file, shard in files.items() if json.loads(file.read_bytes()).get("failed")}
        again[stage.name] = failed.union(*(again[name] for name in stage.after))
        for file, shard in files.items():
            if shard in again[stage.name]:
                file.unlink()
    for file in (root / "scores").glob("*.done"):
        if json.loads(file.read_bytes())["failed"]:
            file.unlink()


def remove_old(root: Path, parts: Sequence[Shard]) -> None:
    """Remove the files of earlier runs for shards that no longer exist."""
    names = {part.name for part in parts}
    old = [file for file in (root / "scores").glob("*.jsonl") if file.stem not in names]
    if not old:
        return
    for file in old:
        shards.marker(file).unlink(missing_ok=True)
        file.unlink()
    for folder in (root / "stages").iterdir():
        if folder.is_dir():
            for file in folder.glob("*-of-*"):
                if file.stem.rpartition("-")[0] not in names:
                    file.unlink()
    kept = {row["id"] for row in shards.all_scores(root)}
    for folder in (root / "keyframes").iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values, with lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))
