"""`kangaroo bench curate`: CPU seconds of each stage on each file, and the speed of two workers against one.

The stages run as in `kangaroo curate`, with each file as a shard. Seconds are user and system time of the worker
process. Scores go to a folder that is removed at the end.
"""

import collections
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.config_files import load_config
from kangaroo_jax.curation.curate import plain_config
from kangaroo_jax.curation.engine import run as engine
from kangaroo_jax.curation.engine.manifest import Item, read_inputs
from kangaroo_jax.curation.engine.run_shard import ShardPlan, run_shard
from kangaroo_jax.curation.engine.shards import Shard, make_shards
from kangaroo_jax.curation.stages import enabled
from kangaroo_jax.errors import UserError


def bench_stages(items: Sequence[Item], config: dict[str, Any], root: Path) -> dict[str, dict[str, float]]:
    """CPU seconds of each stage, by file; the first file is scored twice and counted only once models are loaded."""
    plan = ShardPlan(root, enabled(config), config)
    guard = plan.guard()
    found: dict[str, dict[str, float]] = {}
    try:
        for number, item in enumerate([items[0], *items]):
            seconds: dict[str, float] = collections.defaultdict(float)

            def tell(stage: str, failure: str, spent: float, seconds: dict[str, float] = seconds) -> None:
                seconds[stage] += spent

            run_shard(Shard(f"{number:05d}", (item,), f"{number}"), plan, guard, tell)
            found[item["path"]] = dict(seconds)
    finally:
        guard.close()
    return found


def bench_workers(items: Sequence[Item], config: dict[str, Any], root: Path, rounds: int) -> list[dict[str, float]]:
    """Run one worker and two in turn on all files; a result for each round.

    `speedup` is the ratio of wall times, which is meaningless if other work keeps the cores busy. `more_cpu` is the
    ratio of CPU times, and `parent` the parent process's share of CPU time, which is serial: without other work the
    speedup is at most 2 / (more_cpu * (1 + parent)).
    """
    stages, rows, shards = enabled(config), list[dict[str, float]](), make_shards(items, 1)
    for number in range(rounds):
        seconds, own, theirs = [], [], []
        for workers in (1, 2):
            plan = ShardPlan(root / f"{number}-{workers}", stages, config)
            begin, before = time.perf_counter(), os.times()
            engine.run_local(shards, plan, workers)
            after = os.times()
            seconds.append(time.perf_counter() - begin)
            own.append(after.user + after.system - before.user - before.system)
            theirs.append(_stage_seconds(plan.root))
        parent = own[1] / (own[1] + theirs[1])
        rows.append({"speedup": seconds[0] / seconds[1], "more_cpu": theirs[1] / theirs[0], "parent": parent})
    return rows


def _stage_seconds(root: Path) -> float:
    """CPU seconds of all stages, from the files that a run has written."""
    return sum(sum(json.loads(file.read_bytes())["cpu_seconds"]) for file in (root / "timings").rglob("*.json"))


def table(found: dict[str, dict[str, float]]) -> str:
    """A table with a line for each file, and the mean."""
    stages = sorted({stage for seconds in found.values() for stage in seconds})
    mean = {stage: statistics.fmean(seconds.get(stage, 0.0) for seconds in found.values()) for stage in stages}
    lines = [f"{'':28}" + "".join(f"{stage[:11]:>12}" for stage in (*stages, "all"))]
    for name, seconds in [*sorted(found.items()), ("mean", mean)]:
        values = [*(seconds.get(stage, 0.0) for stage in stages), sum(seconds.values())]
        lines.append(f"{Path(name).name[-28:]:28}" + "".join(f"{value:12.3f}" for value in values))
    return "\n".join(lines)


def bench_curate(inputs: Sequence[str], rounds: int) -> dict[str, Any]:
    """cpu_seconds (`bench_stages`) and one_worker_and_two (`bench_workers`) for the media in `inputs`.

    Raises UserError: there are no media.
    """
    config = plain_config(load_config("curation"))
    items = read_inputs(inputs, "", False)
    if not items:
        raise UserError(f"--input={','.join(inputs)}: no media there")
    with tempfile.TemporaryDirectory() as name:
        found = bench_stages(items, config, Path(name) / "stages")
        return {"cpu_seconds": found, "one_worker_and_two": bench_workers(items, config, Path(name), rounds)}
