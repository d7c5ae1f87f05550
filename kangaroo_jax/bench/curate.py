"""`kangaroo bench curate`: CPU seconds of each stage on each file, and how two workers do against one.

The stages run as they do in `kangaroo curate`, each file a shard of its own; seconds are those of the process that
decodes, user and system, without waiting. Scores go to a folder that is removed at the end.
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
    """CPU seconds of each stage, by file; the first file is scored twice and counted once, with models loaded."""
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
    """One worker and two in turn, on all files; for each round.

    `speedup` is how many times faster two are by the clock, which says nothing where other work keeps the cores busy.
    `more_cpu` is how many times the CPU time two take, and `parent` the share of it that the one parent process takes,
    which workers cannot do at the same time: without other work the speedup is at most 2 / (more_cpu * (1 + parent)).
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
    """CPU seconds of all stages, as a run has written them."""
    return sum(sum(json.loads(file.read_bytes())["cpu_seconds"]) for file in (root / "timings").rglob("*.json"))


def table(found: dict[str, dict[str, float]]) -> str:
    """A line a file, and the mean."""
    stages = sorted({stage for seconds in found.values() for stage in seconds})
    mean = {stage: statistics.fmean(seconds.get(stage, 0.0) for seconds in found.values()) for stage in stages}
    lines = [f"{'':28}" + "".join(f"{stage[:11]:>12}" for stage in (*stages, "all"))]
    for name, seconds in [*sorted(found.items()), ("mean", mean)]:
        values = [*(seconds.get(stage, 0.0) for stage in stages), sum(seconds.values())]
        lines.append(f"{Path(name).name[-28:]:28}" + "".join(f"{value:12.3f}" for value in values))
    return "\n".join(lines)


def bench_curate(inputs: Sequence[str], rounds: int) -> dict[str, Any]:
    """cpu_seconds (`bench_stages`) and one_worker_and_two (`bench_workers`) of the media in `inputs`.

    Raises UserError: there are none.
    """
    config = plain_config(load_config("curation"))
    items = read_inputs(inputs, "", False)
    if not items:
        raise UserError(f"--input={','.join(inputs)}: no media there")
    with tempfile.TemporaryDirectory() as name:
        found = bench_stages(items, config, Path(name) / "stages")
        return {"cpu_seconds": found, "one_worker_and_two": bench_workers(items, config, Path(name), rounds)}
