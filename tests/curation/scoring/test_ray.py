"""Ray: the bytes of the local engine, a node lost half-way, and nothing lost or doubled."""

import json
import threading
import time

import pytest

from kangaroo_jax.curation.engine import run as engine
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.curation.engine.ray_workers import task_stages
from kangaroo_jax.curation.engine.run_shard import ShardPlan
from kangaroo_jax.curation.engine.shards import all_scores, make_shards
from kangaroo_jax.curation.stages import BY_NAME
from kangaroo_jax.errors import UserError

ray = pytest.importorskip("ray", reason="of the extra `ray`")
pytestmark = pytest.mark.slow
STAGES = tuple(BY_NAME[name] for name in ("probe", "cuts", "keyframes", "motion", "fingerprint"))


def test_a_node_that_is_lost_half_way_costs_nothing(clips, config, tmp_path, tree):
    from ray.cluster_utils import Cluster

    plain = json.loads(json.dumps(config.to_dict()))
    shards = make_shards(read_inputs([str(clips)]), 1)
    alone = ShardPlan(tmp_path / "local", STAGES, plain)
    engine.run_local(shards, alone, workers=1)
    plan = ShardPlan(tmp_path / "ray", STAGES, plain)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        lost = threading.Event()

        def kill_when_half_is_done() -> None:
            while len(list((plan.root / "stages/probe").glob("*.done"))) < len(shards) // 2:
                time.sleep(0.02)
            cluster.remove_node(second, allow_graceful=False)
            lost.set()

        killer = threading.Thread(target=kill_when_half_is_done, daemon=True)
        killer.start()
        engine.run_ray(shards, plan)
        killer.join(timeout=60)
        assert lost.is_set()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(row["id"] for row in all_scores(plan.root)) == sorted(row["id"] for row in all_scores(alone.root))
    leftovers = {
        name for name in tree(plan.root) if name.startswith("stages/tmp/")
    }  # of the lost node; a run removes them
    assert {k: v for k, v in tree(plan.root).items() if k not in leftovers} == tree(alone.root)


def test_actors_of_this_process_give_the_same_bytes(clips, config, tmp_path, tree):
    config.engine.update(actors=1, actor_stages=("motion",), actor_gpus=0.0)
    plain = json.loads(json.dumps(config.to_dict()))
    shards = make_shards(read_inputs([str(clips)]), 1)
    alone, plan = (ShardPlan(tmp_path / name, STAGES, plain) for name in ("local", "ray"))
    engine.run_local(shards, alone, workers=1)
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        engine.run_ray(shards, plan)
        assert tree(plan.root) == tree(alone.root)
        assert task_stages(STAGES, ("keyframes",)) == [BY_NAME["probe"], BY_NAME["cuts"], BY_NAME["motion"]]
        for wrong, message in (({"actors": 2}, "leave none"), ({"actor_gpus": 1.0}, "asks for 1 GPU")):
            other = ShardPlan(tmp_path / "more", STAGES, {**plain, "engine": plain["engine"] | wrong})
            with pytest.raises(UserError, match=message):
                engine.run_ray(shards, other)
    finally:
        ray.shutdown()
