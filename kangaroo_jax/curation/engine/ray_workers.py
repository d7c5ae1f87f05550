"""Ray tasks, and Ray actors that keep the models of some stages from shard to shard.

`config.engine.actors` actors are started, with the cores, GPUs and other resources (TPU chips) of the config. A task
runs the stages of a shard that need no actor; then an idle actor runs the others and writes the scores. Each has a
guarded process, so that a bad file costs only itself. An actor whose node is lost restarts elsewhere, and its shard
runs again.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.curation.engine.run_shard import ShardPlan, run_shard, run_stages
from kangaroo_jax.curation.engine.shards import Shard
from kangaroo_jax.curation.stages.base import Settings, Stage
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.guard import Guard

Calls = list[tuple[str, str, float]]  # arguments of Progress.stage: stage, failure, seconds
_guards: dict[Path, Guard] = {}  # a Ray worker's guards, kept from task to task


def ray_task(shard: Shard, plan: ShardPlan, actors: bool) -> Calls:
    """Score a shard; if there are actors, without their stages. Returns the calls for progress."""
    calls: Calls = []
    guard = _guards.setdefault(plan.root, plan.guard())
    if actors:
        stages = task_stages(plan.stages, plan.config["engine"]["actor_stages"])
        run_stages(shard, plan, guard, lambda *call: calls.append(call), stages)
    else:
        run_shard(shard, plan, guard, lambda *call: calls.append(call))
    return calls


def task_stages(stages: Sequence[Stage], of_actors: Sequence[str]) -> list[Stage]:
    """Stages that run as tasks: those with no actor stage before them."""
    left: list[Stage] = []
    beyond = set(of_actors)
    for stage in stages:
        if stage.name in beyond or beyond & set(stage.after):
            beyond.add(stage.name)
        else:
            left.append(stage)
    return left


class Actor:
    """Runs the stages that tasks leave. Its guarded process, with the models in it, lives as long as the actor."""

    def __init__(self, plan: ShardPlan) -> None:
        """`plan` is the one for all shards."""
        self._plan, self._guard = plan, plan.guard()

    def run(self, shard: Shard) -> Calls:
        """Finish a shard; returns the calls for progress."""
        calls: Calls = []
        run_shard(shard, self._plan, self._guard, lambda *call: calls.append(call))
        return calls


class Actors:
    """A pool of actors, which may be empty, and the shards that wait for one."""

    def __init__(self, plan: ShardPlan) -> None:
        """Raises UserError where the Ray cluster lacks the resources of config.engine."""
        engine = plan.config["engine"]
        if engine["actors"]:
            _check_resources(engine)
        self._actors = _started(plan)
        self._idle = collections.deque(self._actors)
        self._waiting: collections.deque[Shard] = collections.deque()
        self.running: dict[Any, tuple[Any, Shard]] = {}

    @property
    def any(self) -> bool:
        """Whether there are actors."""
        return bool(self._actors)

    @property
    def busy(self) -> bool:
        """Whether a shard is waiting or running."""
        return bool(self._waiting or self.running)

    def add(self, shard: Shard) -> None:
        """Let a shard wait for an actor."""
        self._waiting.append(shard)

    def start(self) -> None:
        """Give waiting shards to idle actors."""
        while self._waiting and self._idle:
            actor, shard = self._idle.popleft(), self._waiting.popleft()
            self.running[actor.run.remote(shard)] = actor, shard

    def take(self, reference: Any) -> Shard:
        """The shard of a result; its actor becomes idle."""
        actor, shard = self.running.pop(reference)
        self._idle.append(actor)
        return shard


def _check_resources(engine: Settings) -> None:
    """Raises UserError where the Ray cluster lacks the resources of config.engine."""
    import ray

    need = {"CPU": engine["actor_cpus"], "GPU": engine["actor_gpus"], **dict(engine["actor_resources"])}
    resources = ray.cluster_resources()
    for name, amount in need.items():
        if amount > resources.get(name, 0.0):
            raise UserError(
                f"--engine=ray: an actor asks for {amount:g} {name} and all nodes have {resources.get(name, 0.0):g}; "
                "see config.engine.actor_cpus, actor_gpus and actor_resources"
            )
    if engine["actors"] * engine["actor_cpus"] > resources.get("CPU", 0.0) - 1:
        raise UserError(
            f"--engine=ray: {engine['actors']} actors of {engine['actor_cpus']:g} CPU leave none of the "
            f"{resources.get('CPU', 0.0):g} CPU to tasks; lower config.engine.actors or actor_cpus"
        )


def _started(plan: ShardPlan) -> list[Any]:
    """The actors that the config asks for."""
    import ray

    engine = plan.config["engine"]
    kind = ray.remote(Actor).options(
        num_cpus=engine["actor_cpus"],
        num_gpus=engine["actor_gpus"],
        resources=dict(engine["actor_resources"]),
        max_restarts=-1,
        max_task_retries=-1,
    )
    return [kind.remote(plan) for _ in range(engine["actors"])]
