"""Idle worker processes on real nodes, and callbacks that meet dead ranks."""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_kfac.cluster.ray import controller
from elastic_kfac.cluster.ray.idle_workers import await_idle_workers, prestart_workers
from elastic_kfac.cluster.ray.local_cluster import LocalCluster


def test_spare_process_is_ready_counted_once_and_taken(cluster: LocalCluster) -> None:
    # A node of its own: others may keep processes that earlier runs have left.
    fresh = cluster.node_id(cluster.add_node())
    nodes = {fresh}
    prestart_workers(nodes, 1)
    assert await_idle_workers(nodes, timeout_s=180.0)
    assert prestart_workers(nodes, 1) == 0

    class Probe:
        def imported(self) -> bool:
            return "torch" in sys.modules and "elastic_kfac.training.loop" in sys.modules

    # A node may begin with more than one spare; once all are taken, one is asked for again.
    here = NodeAffinitySchedulingStrategy(fresh, soft=False)
    probes: list[Any] = []
    asked = 0
    while not asked and len(probes) < 8:
        probe: Any = ray.remote(num_cpus=0.1, scheduling_strategy=here)(Probe)
        probes.append(probe.remote())
        assert ray.get(probes[-1].imported.remote())
        asked = prestart_workers(nodes, 1)
    assert asked == 1


def test_rank_that_died_is_the_cause_though_ray_heard_of_a_survivor_first(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rank:
        def get_metadata(self) -> str:
            return "alive"

    coordinator = MagicMock()
    coordinator.group_failed.remote.side_effect = lambda errors, lost: ray.put(None)
    actors: list[Any] = [
        ray.remote(num_cpus=0, max_restarts=0)(Rank).remote() for _ in cluster.nodes
    ]
    ray.get([actor.get_metadata.remote() for actor in actors])
    ray.kill(actors[1])
    monkeypatch.setattr(controller, "refresh_capacity", lambda: None)
    callback = controller.ElasticCallback(coordinator)
    callback._actors, callback._training = tuple(actors), True
    callback._errors = {0: "CommunicationError: rank 0 lost a peer"}
    deadline = time.monotonic() + 120
    while callback._dead() != {1: "ActorDiedError"} and time.monotonic() < deadline:
        time.sleep(0.1)
    callback.before_controller_execute_failure_decision(None)
    ray.kill(actors[0])
    errors = {0: "CommunicationError: rank 0 lost a peer", 1: "ActorDiedError"}
    coordinator.group_failed.remote.assert_called_once_with(errors, [])
