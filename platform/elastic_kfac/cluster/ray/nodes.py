"""The nodes of the connected cluster: alive, draining, lost; their room for workers; their clocks."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_kfac.cluster.ray.connection import connected
from elastic_kfac.cluster.ray.internals import ray_state

ANSWER_TIMEOUT_S = 60.0
"""How long a node may take to start a process and answer."""


def start_actor(kind: type, *arguments: Any, node_id: str | None = None, **named: Any) -> Any:
    """Starts an actor without resources of its own and returns its handle at once.

    Args:
        kind: Its class; `arguments` and `named` are those of its constructor.
        node_id: Node that it needs; None is the node of this process.
    """
    node_id = node_id or ray.get_runtime_context().get_node_id()
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return (
        ray.remote(kind).options(num_cpus=0, scheduling_strategy=there).remote(*arguments, **named)
    )


def staying_nodes() -> dict[str, dict[str, float]]:
    """Resources of the nodes that are alive and not draining, by node id."""
    leaving = draining_nodes()
    return {
        node["NodeID"]: dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    }


def alive_worker_nodes() -> dict[str, dict[str, float]]:
    """Resources of the staying nodes that have CPUs, by node id."""
    return {name: resources for name, resources in staying_nodes().items() if resources.get("CPU")}


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to leave, with their deadlines (Unix time in ms, 0 for none)."""
    return dict(ray_state.state.get_draining_nodes())


def head_node() -> str | None:
    """Id of the cluster's head, if it is alive."""
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    return None


def room_for_workers(per_worker: Mapping[str, float]) -> int:
    """How many workers the staying nodes could carry if nothing else ran on them."""
    return sum(
        int(min(node.get(name, 0.0) // amount for name, amount in per_worker.items()))
        for node in alive_worker_nodes().values()
    )


def seconds_left(node_ids: Collection[str]) -> float | None:
    """Seconds until the first of these draining nodes leaves; 0 without a deadline, None for no nodes."""
    deadlines = draining_nodes()
    left = [deadlines.get(node_id, 0) / 1000 - time.time() for node_id in node_ids]
    return max(0.0, min(left)) if left else None


def await_lost_nodes(node_ids: set[str], timeout_s: float = 60.0) -> list[str]:
    """Waits until Ray has marked every unresponsive node of `node_ids` as dead; returns the dead."""
    deadline = time.monotonic() + timeout_s
    while True:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["NodeID"] in node_ids}
        dead = [node_id for node_id in node_ids if not nodes.get(node_id, {}).get("Alive", False)]
        silent = [
            node_id
            for node_id, node in nodes.items()
            if node["Alive"] and not _answers(node["NodeManagerAddress"], node["NodeManagerPort"])
        ]
        if not silent or time.monotonic() > deadline:
            return sorted(dead)
        time.sleep(0.1)


def _answers(address: str, port: int, timeout_s: float = 1.0) -> bool:
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class ClusterFacts:
    """What `examine_cluster` found."""

    nodes: int
    cpus: float
    gpus: float
    clock_skews_s: dict[str, float]
    """How far the clock of a node, by its address, is ahead of this machine's."""
    silent: tuple[str, ...]
    """Addresses of nodes that did not answer."""


def examine_cluster(address: str) -> ClusterFacts:
    """Connects, asks every node for its time, and disconnects.

    Raises:
        UsageError: If there is no cluster, it runs another version of Ray, or it requires a token.
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
                # The first answer waits for a process to start; the second one is quick.
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
