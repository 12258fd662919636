"""What `doctor` wants to know about a cluster: nodes, room, and how far their clocks are apart."""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_kfac.cluster.run.trainer import connected

ANSWER_TIMEOUT_S = 60.0
"""How long a node may take to start a process and answer."""


@dataclass(frozen=True)
class ClusterFacts:
    """What was found."""

    nodes: int
    cpus: float
    gpus: float
    clock_skews_s: dict[str, float]
    """By address of the node, how far its clock is ahead of this machine's."""
    silent: tuple[str, ...]
    """Addresses of nodes that did not answer."""


def examine_cluster(address: str) -> ClusterFacts:
    """Connects, asks every node for its time, and leaves.

    Raises:
        UsageError: If there is no cluster, it runs another version of Ray, or it wants a token.
    """
    with connected(address):
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        clock = ray.remote(num_cpus=0)(lambda: time.time())
        skews: dict[str, float] = {}
        silent = []
        for node_id, node in nodes.items():
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            ask = clock.options(scheduling_strategy=here)
            name = str(node["NodeManagerAddress"])
            try:
                # The first answer waits for a process; the second one is quick.
                ray.get(ask.remote(), timeout=ANSWER_TIMEOUT_S)
                asked = time.time()
                theirs = float(ray.get(ask.remote(), timeout=ANSWER_TIMEOUT_S))
            except ray.exceptions.RayError:
                silent.append(name)
                continue
            skews[name] = theirs - (asked + time.time()) / 2
        total = ray.cluster_resources()
        return ClusterFacts(
            nodes=len(nodes),
            cpus=total.get("CPU", 0.0),
            gpus=total.get("GPU", 0.0),
            clock_skews_s=skews,
            silent=tuple(silent),
        )
