"""Engines that run all shards. Both run `run_shard`, which writes the same bytes wherever it runs.

`local` uses threads of this process, each with a replaceable worker process. `ray` uses Ray tasks, each with such a
worker process, and actors for stages with large models (`ray_workers`).
"""

import collections
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.curation.engine.ray_workers import Actors, ray_task
from kangaroo_jax.curation.engine.run_shard import ShardPlan, is_done, run_shard
from kangaroo_jax.curation.engine.shards import Shard
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.guard import Guard, Stopped
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.progress import Progress

_MOST_FAILURES_SHOWN = 20


class ShardProgress:
    """Prints progress lines: items, shards, the rate of each stage, failures. Threads share it."""

    def __init__(self, shards: Sequence[Shard], todo: Sequence[Shard]) -> None:
        """All shards, and those that are not done."""
        self._done, self._shards = len(shards) - len(todo), len(shards)
        self._begin, self._failures = time.monotonic(), 0
        self._calls: collections.Counter[str] = collections.Counter()
        self._lock = threading.RLock()
        items = sum(len(shard.items) for shard in todo)
        self._progress = Progress("curate", items, "items", more=self._more)
        if todo:
            done = f"; {self._done} of {self._shards} shards are done" if self._done else ""
            self._progress.say(f"curate: {items:,} items in {len(todo)} shards{done}")

    def stage(self, stage: str, failure: str, seconds: float) -> None:
        """Count a row that a stage scored, or failed on."""
        with self._lock:
            self._calls[stage] += 1
            self._failures += bool(failure)
            if failure and self._failures <= _MOST_FAILURES_SHOWN:
                self._progress.say(f"curate: {stage}: {failure}")
            self._progress.add(0)

    def shard(self, shard: Shard) -> None:
        """Count a finished shard."""
        with self._lock:
            self._done += 1
            self._progress.add(len(shard.items))
            if self._done == self._shards:
                self._progress.finish()

    def _more(self) -> str:
        seconds = time.monotonic() - self._begin
        failed = f", {self._failures} failed" if self._failures else ""
        rates = ", ".join(f"{name} {count / seconds:.1f}/s" for name, count in self._calls.items())
        return f"{self._done} of {self._shards} shards{failed}; {rates}"


def unfinished(shards: Sequence[Shard], plan: ShardPlan) -> list[Shard]:
    """Unfinished shards, those with most bytes first, so that no long one is left at the end."""

    def size(shard: Shard) -> int:
        return sum(os.path.getsize(item["path"]) for item in shard.items if os.path.exists(item["path"]))

    return sorted((shard for shard in shards if not is_done(shard, plan)), key=lambda shard: (-size(shard), shard.name))


def run_local(shards: Sequence[Shard], plan: ShardPlan, workers: int = 0) -> None:
    """Score the shards with `workers` processes (0: one a core).

    Ctrl-C ends them at once; finished work stays, and the next run goes on from there. Raises UserError.
    """
    todo = unfinished(shards, plan)
    progress = ShardProgress(shards, todo)
    line: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for shard in todo:
        line.put(shard)
    guards = [plan.guard() for _ in range(min(len(todo), workers or usable_cpus()))]
    errors: list[BaseException] = []

    def work(guard: Guard) -> None:
        try:
            while not errors:
                shard = line.get_nowait()
                run_shard(shard, plan, guard, progress.stage)
                progress.shard(shard)
        except (queue.Empty, Stopped):
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            guard.close()

    threads = [threading.Thread(target=work, args=(guard,), daemon=True) for guard in guards]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.2)
    finally:
        for guard in guards:
            guard.close()
        for thread in threads:
            thread.join(timeout=5)
    if errors:
        raise errors[0]


# ------------------------------------------------------------------------------------- Ray


def run_ray(shards: Sequence[Shard], plan: ShardPlan, address: str = "", workers: int = 0) -> None:
    """Score the shards as Ray tasks of one core each.

    Args:
        address: a cluster's address (`auto`, `ray://...`, `host:6379`); "" starts Ray here and ends it afterwards.
        workers: cores of a Ray that is started here; 0 is all.

    The media and the output folder must have the same paths on all nodes. A task whose node is lost is run again on
    another and skips what is finished. Raises UserError.
    """
    if not address and "RAY_ADDRESS" not in os.environ and sys.modules.get("ray") is None:
        # Without a token, anyone who reaches the port can run code; Ray's own token file is readable by all users.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise UserError(f"--engine=ray needs the package ray: {install_line('curation', 'ray')}") from None
    todo = unfinished(shards, plan)
    progress = ShardProgress(shards, todo)
    if not todo:
        return
    started = not ray.is_initialized()
    if started:
        _connect(address, workers)
    try:
        _ray_loop(todo, plan, progress)
    finally:
        if started:
            ray.shutdown()


def _connect(address: str, workers: int) -> None:
    import ray

    environment = (
        {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}} if not address else {}
    )
    try:
        ray.init(
            address=address or None,
            num_cpus=None if address else (workers or None),
            log_to_driver=False,
            include_dashboard=False if not address else None,
            runtime_env=environment,
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"--ray-address={address}: {one_line(error)[:200]}") from None


def _ray_loop(todo: Sequence[Shard], plan: ShardPlan, progress: ShardProgress) -> None:
    """Run shards as tasks, and then, if the config has actors, their other stages in actors."""
    import ray

    shared, pool = ray.put(plan), Actors(plan)
    task = ray.remote(num_cpus=1, max_retries=-1)(ray_task)
    waiting = collections.deque(todo)
    running: dict[Any, Shard] = {}
    while waiting or running or pool.busy:
        ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < ahead:
            shard = waiting.popleft()
            running[task.remote(shard, shared, pool.any)] = shard
        pool.start()
        ready, _ = ray.wait([*running, *pool.running], num_returns=1, timeout=1.0)
        for reference in ready:
            of_task = reference in running
            shard = running.pop(reference) if of_task else pool.take(reference)
            try:
                calls = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            for call in calls:
                progress.stage(*call)
            if of_task and pool.any:
                pool.add(shard)
            else:
                progress.shard(shard)
