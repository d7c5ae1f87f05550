"""Runs all stages on a shard, for every engine. Finished results are read, not computed again."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.engine.shards import Shard
from kangaroo_jax.curation.stages import run_stage
from kangaroo_jax.curation.stages.base import Row, Stage
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.guard import Guard, SetupError
from kangaroo_jax.system.json_text import read_objects
from kangaroo_jax.system.processes import Lost

Job = Callable[..., Any]
Scored = Callable[[str, str, float], None]  # stage, "" or the reason of a failure, CPU seconds


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The plan for all shards. A worker process calls `job` with (stage's name, row, settings, root)."""

    root: Path
    stages: tuple[Stage, ...]
    config: Mapping[str, Any]
    job: Job = run_stage

    def guard(self) -> Guard:
        """A guarded worker process for this plan's jobs."""
        engine = self.config["engine"]
        return Guard(self.job, seconds=engine["item_seconds"], memory_mib=engine["memory_mib"])


def is_done(shard: Shard, plan: ShardPlan) -> bool:
    """Whether the shard's scores exist and are the ones that `run_shard` would write."""
    found = shards.done(shards.score_file(plan.root, shard.name))
    return found is not None and found["keys"] == shards.stage_keys(shard, plan.stages, plan.config)


def run_shard(shard: Shard, plan: ShardPlan, guard: Guard, tell: Scored) -> Row:
    """Score a shard, stage by stage; returns its marker with the counts of rows and failures.

    Raises Stopped if the guard is closed; finished stages stay.
    """
    rows = run_stages(shard, plan, guard, tell, plan.stages)
    target = shards.score_file(plan.root, shard.name)
    shards.marker(target).unlink(missing_ok=True)
    _forget_old(plan.root, target, {row["id"] for row in rows})
    rows = [_final(row) for row in rows]
    done: Row = {"rows": len(rows), "failed": sum(bool(row["failures"]) for row in rows)}
    done["keys"] = shards.stage_keys(shard, plan.stages, plan.config)
    shards.put_rows(plan.root, target, rows, done)
    return done


def run_stages(shard: Shard, plan: ShardPlan, guard: Guard, tell: Scored, stages: Sequence[Stage]) -> list[Row]:
    """Run some of the plan's stages, with those that they follow; returns the rows with their scores."""
    keys = shards.stage_keys(shard, plan.stages, plan.config)
    rows = [dict(item) for item in shard.items]
    for group in _groups(stages):
        files = {stage: shards.stage_file(plan.root, stage.name, shard.name, keys[stage.name]) for stage in group}
        todo = [stage for stage, file in files.items() if shards.done(file) is None]
        for stage in todo:
            _remove_others(files[stage])
        spent = {stage: StageSeconds(tell) for stage in todo}
        for stage, found in _all_scored(rows, plan, guard, spent).items():
            failed = sum("failure" in one for one in found)
            shards.put_rows(plan.root, files[stage], found, {"rows": len(found), "failed": failed})
            spent[stage].write(plan.root, stage.name, shard.name)
        for stage, file in files.items():
            rows = _merged(rows, stage, {row["id"]: row for row in read_objects(file)})
    return rows


def _groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Groups of consecutive stages that follow the same ones: they read the same frames, so each is decoded once.

    A stage that takes many rows at a time is a group of its own.
    """
    groups: list[list[Stage]] = []
    for stage in stages:
        last = groups[-1][-1] if groups else None
        if last is not None and last.after == stage.after and last.score_many is stage.score_many is None:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


class StageSeconds:
    """Records the CPU seconds of a stage in a shard and forwards each call to `tell`."""

    def __init__(self, tell: Scored) -> None:
        self._tell, self._seconds, self._begin = tell, list[float](), time.time()
        self.memory = 0.0  # peak resident MiB of the process

    def __call__(self, stage: str, failure: str, seconds: float) -> None:
        self._seconds.append(seconds)
        self._tell(stage, failure, seconds)

    def write(self, root: Path, stage: str, shard: str) -> None:
        """Write OUTPUT/timings/STAGE/SHARD.json."""
        if self._seconds:
            value: Row = {
                "cpu_seconds": [round(s, 4) for s in self._seconds],
                "wall": round(time.time() - self._begin, 3),
            }
            value["memory_mib"] = round(self.memory, 1)
            shards.put(root, root / "timings" / stage / f"{shard}.json", json.dumps(value).encode())


def _applies(stage: Stage, row: Row) -> bool:
    return row["kind"] in stage.kinds and all(name in row for name in stage.after)


def _all_scored(
    rows: Sequence[Row], plan: ShardPlan, guard: Guard, spent: Mapping[Stage, StageSeconds]
) -> dict[Stage, list[Row]]:
    """Each stage's results for the rows. All stages score a row before the next row."""
    found: dict[Stage, list[Row]] = {stage: [] for stage in spent}
    for stage in spent:
        if stage.score_many is not None:
            return {
                stage: _scored_together([row for row in rows if _applies(stage, row)], stage, plan, guard, spent[stage])
            }
    for row in rows:
        for stage, tell in spent.items():
            if _applies(stage, row):
                found[stage].append(_scored(row, stage, plan, guard, tell))
    return found


def _scored_together(rows: Sequence[Row], stage: Stage, plan: ShardPlan, guard: Guard, tell: StageSeconds) -> list[Row]:
    """The stage's results for the rows: in batches, and one by one where a batch fails."""
    settings = plan.config[stage.name]
    found: list[Row] = []
    for first in range(0, len(rows), settings["batch"]):
        part = rows[first : first + settings["batch"]]
        try:
            outcomes, seconds, memory = guard.call(stage.name, part, settings, str(plan.root))
        except SetupError:
            raise
        except (UserError, Lost):  # the batch fails because of one row: score them one by one to find it
            found += [_scored(row, stage, plan, guard, tell) for row in part]
            continue
        for _ in part:
            tell(stage.name, "", seconds / len(part))
        tell.memory = max(tell.memory, memory)
        found += [{"id": row["id"], "scores": one.scores} for row, one in zip(part, outcomes, strict=True)]
    return found


def _scored(row: Row, stage: Stage, plan: ShardPlan, guard: Guard, tell: StageSeconds) -> Row:
    """The stage's result for a row, or the reason of its failure; key frames are written here."""
    settings = plan.config.get(stage.name, {})
    try:
        outcome, seconds, memory = guard.call(stage.name, row, settings, str(plan.root))
    except SetupError:
        raise
    except (UserError, Lost) as error:
        tell(stage.name, str(error), 0.0)
        return {"id": row["id"], "failure": str(error)}
    tell(stage.name, "", seconds)
    tell.memory = max(tell.memory, memory)
    if outcome.files:
        folder = plan.root / "keyframes" / row["id"]
        for k, data in enumerate(outcome.files):
            shards.put(plan.root, folder / f"{k}.jpg", data)
        for extra in folder.iterdir():  # left over from settings with more key frames
            if int(extra.stem) >= len(outcome.files):
                extra.unlink()
    found = {"id": row["id"], "scores": outcome.scores}
    return found if outcome.clips is None else {**found, "clips": outcome.clips}


def _merged(rows: Sequence[Row], stage: Stage, found: Mapping[str, Row]) -> list[Row]:
    """The rows with the stage's scores; where it divides an item, one row for each clip."""
    merged: list[Row] = []
    for row in rows:
        one = found.get(row["id"])
        if one is None:
            merged.append(row)
        elif "failure" in one:
            merged.append({**row, "failures": {**row.get("failures", {}), stage.name: one["failure"]}})
        else:
            scored = {**row, stage.name: one["scores"]}
            clips = one.get("clips")
            if clips is None:
                merged.append(scored)
            else:
                merged += [
                    {
                        **scored,
                        "item": row["id"],
                        "id": row["id"] if len(clips) == 1 else f"{row['id']}.{number:04d}",
                        "start": start,
                        "end": end,
                    }
                    for number, (start, end) in enumerate(clips)
                ]
    return merged


def _remove_others(file: Path) -> None:
    """Remove the stage's results for this shard under other settings, whose key frames are about to be replaced."""
    shard = file.stem.rpartition("-")[0]
    for other in file.parent.glob(f"{shard}-*"):
        if other.stem != file.stem:
            shards.marker(other).unlink(missing_ok=True)
            other.unlink(missing_ok=True)


def _forget_old(root: Path, target: Path, ids: set[str]) -> None:
    """Remove the key frames of clips that the shard no longer has."""
    if target.exists():
        for row in read_objects(target):
            if row["id"] not in ids:
                shutil.rmtree(root / "keyframes" / row["id"], ignore_errors=True)


def _final(row: Row) -> Row:
    times = row.get("keyframes", {}).get("times", [])
    return {"item": row["id"], **row, "failures": row.get("failures", {}), "keyframe_times": times}
