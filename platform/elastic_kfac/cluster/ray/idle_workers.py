"""Idle worker processes: with torch imported in advance a new rank starts in tenths of a second."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from elastic_kfac.cluster.ray.internals import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
    common_pb2,
    get_env_vars_to_propagate,
    init_grpc_channel,
    internal_kv_get_gcs_client,
    node_manager_pb2,
    node_manager_pb2_grpc,
)

logger = logging.getLogger(__name__)


def train_environment() -> str:
    """The runtime environment that Ray Train's controller and workers will have, serialised."""
    variables = get_env_vars_to_propagate()
    variables.setdefault(
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    )
    return str(ray.runtime_env.RuntimeEnv(env_vars=variables).serialize())


def prestart_workers(
    node_ids: set[str], count: int, *, environment: str | None = None, keep_s: int = 600
) -> int:
    """Keeps `count` unused worker processes ready on every node.

    Only an optimisation: a refusal is logged and the next worker starts from scratch.

    Args:
        environment: Runtime environment of the actors they are for; None is that of this process.

    Returns:
        How many processes were requested.
    """
    if environment is None:
        environment = ray.get_runtime_context().get_runtime_env_string()
    requested = 0
    for node in _nodes(node_ids):
        try:
            with _raylet(node) as raylet:
                missing = count - len(raylet.unused_workers())
                if missing > 0:
                    raylet.prestart(missing, environment, keep_s)
                    requested += missing
        except Exception:
            logger.warning("node %s started no idle worker", node["NodeID"], exc_info=True)
    return requested


def await_idle_workers(node_ids: set[str], *, timeout_s: float, settled_s: float = 0.3) -> bool:
    """Waits until the unused worker processes of nodes of this machine have finished importing.

    Returns:
        Whether there is one on every node and all of them are at rest.
    """
    deadline = time.monotonic() + timeout_s
    before: dict[int, float | None] = {}
    while True:
        pids = []
        try:
            for node in _nodes(node_ids):
                with _raylet(node) as raylet:
                    pids.append(raylet.unused_workers())
        except Exception:
            logger.warning("cannot ask nodes for their workers", exc_info=True)
            return False
        now = {pid: cpu_seconds(pid) for pids_of_node in pids for pid in pids_of_node}
        # A process that has just been started rests too, before its imports.
        if all(pids) and all(
            spent and spent > 0.5 and before.get(pid) == spent for pid, spent in now.items()
        ):
            return True
        if time.monotonic() > deadline:
            return False
        before = now
        time.sleep(settled_s)


def _nodes(node_ids: set[str]) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in node_ids]


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process of this machine; None for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _raylet(node: Mapping[str, Any]) -> Iterator[_Raylet]:
    cluster_id = internal_kv_get_gcs_client().cluster_id.hex()
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    # With the token and the certificates that this process has for its cluster.
    with init_grpc_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        yield _Raylet(channel, cluster_id)


class _Raylet:
    """Calls to a node's raylet."""

    def __init__(self, channel: Any, cluster_id: str) -> None:
        self._stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        self._options = {"timeout": 5, "metadata": (("ray_cluster_id", cluster_id),)}

    def unused_workers(self) -> list[int]:
        """Process ids of workers that neither are actors nor have executed anything."""
        request = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        reply = self._stub.GetNodeStats(request, **self._options)
        return [
            worker.pid
            for worker in reply.core_workers_stats
            if worker.worker_type == common_pb2.WORKER
            and not worker.actor_id.strip(b"\xff")
            and not worker.num_executed_tasks
            and not worker.num_running_tasks
        ]

    def prestart(self, count: int, environment: str, keep_s: int) -> None:
        """Starts worker processes for actors with this runtime environment."""
        request = node_manager_pb2.PrestartWorkersRequest(
            language=common_pb2.PYTHON,
            num_workers=count,
            keep_alive_duration_secs=keep_s,
            job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        )
        if environment not in ("", "{}"):
            request.runtime_env_info.serialized_runtime_env = environment
        self._stub.PrestartWorkers(request, **self._options)
