"""Announces the preemption of a node, as a cloud provider's notice does."""

from __future__ import annotations

import time

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from elastic_kfac.cluster.ray.local_cluster import LocalCluster

REASON = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")


def drain_node(cluster: LocalCluster, index: int, *, deadline_s: float) -> None:
    """Drains a node of an embedded cluster; it is still there until it is removed."""
    accepted, refusal = GcsClient(address=cluster.address).drain_node(
        cluster.node_id(index),
        REASON,
        f"preemption of node {index}",
        int((time.time() + deadline_s) * 1000),
    )
    assert accepted, refusal
