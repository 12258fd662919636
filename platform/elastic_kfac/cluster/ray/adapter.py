"""The one file that touches what Ray does not promise to keep.

Written for Ray 2.60. What it relies on is listed in `RELIED_ON` and checked by a test, so that an
upgrade which changes any of it fails loudly:

* controller and worker-group callbacks (DeveloperAPI behind a private path) reach Ray Train's
  controller through `RunConfig(callbacks=...)`;
* `AutoscalingCoordinator.get_reserved_resources(requester, recompute=True)` looks at the nodes now
  instead of at the next tick (20 s): without it a lost node is planned with for a minute and a new
  one is not seen;
* the elastic policy asks for capacity by node in `_get_reserved_resources`, once per decision: what
  it gets here leaves out nodes that are dead or draining, so that a drain is a planned resize to the
  nodes that stay (Ray counts them as capacity until up to 20 s after their end);
* the raylet's `PrestartWorkers` and `GetNodeStats` calls keep an idle worker process with torch
  imported on a node: a new rank then begins in tenths of a second instead of seconds;
* the driver prints other processes' errors through one function, which is pointed at a logger.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    ENV_VARS_TO_PROPAGATE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from elastic_kfac.cluster.ray.growth import ask_for_wanted_workers
from elastic_kfac.errors import RunError

logger = logging.getLogger(__name__)

RELIED_ON: Mapping[str, Sequence[str]] = {
    "ControllerCallback": (
        "after_controller_start",
        "on_controller_start_worker_group",
        "before_controller_execute_failure_decision",
        "before_controller_execute_resize_decision",
    ),
    "WorkerGroupCallback": (
        "before_worker_group_start",
        "after_worker_group_start",
        "after_worker_group_training_start",
        "after_worker_group_poll_status",
    ),
}
"""Hooks that must exist, by class."""

POLICY_CACHE_S = 1.0
"""How long Ray Train's elastic policy keeps an answer of the coordinator."""


@dataclass(frozen=True)
class RankProcess:
    """Where one rank of a worker group runs."""

    rank: int
    pid: int
    node_id: str
    node_address: str


class RunIsOver(Exception):
    """The ranks had finished when a resize was about to happen."""


class GroupListener(Protocol):
    """What the callback asks and tells; implemented on top of the recorder."""

    def controller_started(self, controller: Any) -> None:
        """The controller runs; its `abort` ends it and its workers."""
        ...

    def group_starts(self, world_size: int) -> None:
        """Ray has begun to place a group."""
        ...

    def group_started(self, ranks: Sequence[RankProcess]) -> None:
        """All processes of a group are up; the training function has not begun."""
        ...

    def park(
        self, new_world_size: int, is_alive: Callable[[], bool], *, draining: Sequence[str]
    ) -> bool:
        """Returns when all ranks have saved their state and left, or one is not alive.

        `draining` are nodes of the group that are about to leave.

        True means that the run is over, so that no new group is wanted.
        """
        ...

    def group_failed(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> str | None:
        """Some ranks failed or died; returns why the run must end, or None to go on."""
        ...


class ElasticCallback(ControllerCallback, WorkerGroupCallback):
    """Stops the ranks before a planned resize and clears the way after a loss."""

    def __init__(
        self,
        listener: GroupListener,
        *,
        spare_processes: int = 0,
        head_start_s: float = 15.0,
        wanted: Callable[[], int | None] | None = None,
    ) -> None:
        """Created by the driver, runs in Ray Train's controller.

        Args:
            listener: Is asked and told what happens.
            spare_processes: Idle worker processes to keep ready on every node of a group.
            head_start_s: How long processes on new nodes may at most import before the group
                parks; only where spare processes are kept.
            wanted: How many workers the run asks for; None is always the most there may be.
        """
        self._listener = listener
        self._spares = spare_processes
        self._head_start_s = head_start_s
        self._wanted = wanted
        self._ranks: tuple[RankProcess, ...] = ()
        self._errors: dict[int, str] = {}
        self._actors: tuple[Any, ...] = ()
        self._training = False
        self._variables: dict[str, str] = {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Registers the controller, and has it plan with the nodes that stay."""
        plan_with_staying_nodes()
        if self._wanted is not None:
            ask_for_wanted_workers(self._wanted)
        # The coordinator outlives runs: what it saw may be older than this cluster's newest node.
        refresh_capacity()
        self._listener.controller_started(ray.get_runtime_context().current_actor)

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> None:
        """Gives a group that is being made the time-outs, which it reads from the environment."""
        os.environ.update(self._variables)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Tells that a group is being placed, and keeps its settings from slowing workers down."""
        # Ray Train passes these on to the workers, whose runtime environment is then not the
        # default one, so that idle processes are not taken. The group has read them already.
        found = [name for name in ENV_VARS_TO_PROPAGATE if name in os.environ]
        self._variables.update({name: os.environ.pop(name) for name in found})
        self._listener.group_starts(worker_group_context.num_workers)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tells where the ranks are."""
        self._errors = {}
        self._learn_workers(worker_group)
        self._listener.group_started(self._ranks)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """From now on a resize has to park the ranks first."""
        self._training = True
        if self._spares:
            prestart_workers({rank.node_id for rank in self._ranks}, self._spares)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remembers errors: the failure hook does not receive them."""
        for rank, error in worker_group_status.errors.items():
            self._errors.setdefault(rank, f"{type(error).__name__}: {error}")

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Parks a live group; a group that is dead or not there needs nothing."""
        if self._training:
            self._training = False
            self._warm_up_joiners()
            leaving = draining_nodes()
            nodes = sorted({rank.node_id for rank in self._ranks if rank.node_id in leaving})
            if self._listener.park(resize_decision.num_workers, self._is_alive, draining=nodes):
                # The decision cannot be taken back; an exception ends the run without a new group.
                raise RunIsOver

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Makes sure that the next group is planned without the nodes that were lost."""
        # Ray may have heard of a survivor's error first: the rank that died is the cause.
        self._errors = {**(self._dead() if self._training else {}), **self._errors}
        self._training = False
        lost = await_lost_nodes({rank.node_id for rank in self._ranks})
        verdict = self._listener.group_failed(dict(self._errors), lost)
        if verdict is not None:
            # An exception here is not retryable for Ray Train and ends the run.
            raise RuntimeError(verdict)
        refresh_capacity()
        if lost:
            time.sleep(POLICY_CACHE_S)

    def _learn_workers(self, worker_group: Any) -> None:
        self._actors = tuple(worker.actor for worker in worker_group.get_workers())
        self._ranks = tuple(
            RankProcess(
                rank=worker.distributed_context.world_rank,
                pid=worker.metadata.pid,
                node_id=worker.metadata.node_id,
                node_address=worker.metadata.node_ip,
            )
            for worker in worker_group.get_workers()
        )

    def _warm_up_joiners(self) -> None:
        # Training goes on meanwhile: what a new process imports now is not waited for later.
        joining = set(alive_worker_nodes()) - {rank.node_id for rank in self._ranks}
        if self._spares and joining:
            prestart_workers(joining, self._spares)
            await_idle_workers(joining, timeout_s=self._head_start_s)

    def _is_alive(self) -> bool:
        return not self._dead()

    def _dead(self, timeout_s: float = 5.0) -> dict[int, str]:
        # A busy process answers late and is alive; only a dead one makes the call fail.
        pings = [actor.get_metadata.remote() for actor in self._actors]
        ready = ray.wait(pings, num_returns=len(pings), timeout=timeout_s)[0] if pings else []
        found = {}
        for ping in ready:
            try:
                ray.get(ping)
            except ray.exceptions.RayError as error:
                found[pings.index(ping)] = type(error).__name__
        return found


def request_of(trainer: Any) -> str:
    """The name under which a trainer's controller asks for nodes."""
    return f"train-{trainer.train_run_context.run_id}"


def refresh_capacity(timeout_s: float = 10.0, *, withdraw: Sequence[str] = ()) -> None:
    """Makes Ray Train see the nodes as they are now, without requests of controllers that died."""
    try:
        coordinator = get_or_create_autoscaling_coordinator()
        # Ray would honour them for 180 s.
        calls = [coordinator.cancel_request.remote(request) for request in withdraw]
        calls.append(coordinator.get_reserved_resources.remote("elastic_kfac", True))
        ray.get(calls, timeout=timeout_s)
    except Exception:
        # The next tick of the coordinator does the same, only later.
        logger.warning("could not refresh the capacity that Ray Train sees", exc_info=True)


def await_lost_nodes(node_ids: set[str], timeout_s: float = 60.0) -> list[str]:
    """Waits until every node of `node_ids` that does not answer is known to be dead.

    Returns:
        The nodes that are dead.
    """
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


def staying_nodes() -> dict[str, dict[str, float]]:
    """Resources of the nodes that are alive and are not being drained, by node id."""
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
    return dict(ray._private.state.state.get_draining_nodes())


def drain_node(address: str, node_id: str, *, deadline_s: float, message: str) -> None:
    """Announces a preemption, as a cloud's notice or `ray drain-node` does.

    Raises:
        RunError: If Ray refuses.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    accepted, refusal = GcsClient(address=address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        message,
        int((time.time() + deadline_s) * 1000),
    )
    if not accepted:
        raise RunError("Ray refused to drain a node", given=node_id, change=refusal)


def plan_with_staying_nodes() -> None:
    """Keeps this process's elastic policy from counting nodes that are gone or about to leave."""
    original = ElasticScalingPolicy._get_reserved_resources
    if getattr(original, "counts_staying_nodes_only", False):
        return

    @functools.wraps(original)
    def staying(policy: ElasticScalingPolicy) -> dict[str, dict[str, float]] | None:
        reserved = original(policy)
        if not reserved:
            return reserved
        nodes = staying_nodes()
        return {node_id: part for node_id, part in reserved.items() if node_id in nodes}

    staying.counts_staying_nodes_only = True  # type: ignore[attr-defined]
    ElasticScalingPolicy._get_reserved_resources = staying


def room_for_workers(per_worker: Mapping[str, float]) -> int:
    """How many workers the nodes that are alive could carry if nothing else ran on them."""
    return sum(
        int(min(node.get(name, 0.0) // amount for name, amount in per_worker.items()))
        for node in alive_worker_nodes().values()
    )


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
    """Makes nodes keep so many worker processes ready that nobody uses.

    Only an optimisation: a refusal is logged and the next worker starts from nothing.

    Args:
        node_ids: Nodes to ask.
        count: Processes that shall be ready on each.
        environment: Runtime environment of the actors they are for; None is that of this process.
        keep_s: How long an unused process stays.

    Returns:
        How many processes were asked for.
    """
    if environment is None:
        environment = ray.get_runtime_context().get_runtime_env_string()
    asked = 0
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] not in node_ids:
            continue
        try:
            with _raylet(node) as raylet:
                missing = count - len(raylet.unused_workers())
                if missing > 0:
                    raylet.prestart(missing, environment, keep_s)
                    asked += missing
        except Exception:
            logger.warning("node %s started no spare worker", node["NodeID"], exc_info=True)
    return asked


def await_idle_workers(node_ids: set[str], *, timeout_s: float, settled_s: float = 0.3) -> bool:
    """Waits until the unused worker processes of nodes of this machine have nothing left to import.

    Returns:
        Whether there is one on every node and all of them rest.
    """
    deadline = time.monotonic() + timeout_s
    before: dict[int, float] = {}
    while True:
        try:
            pids = _unused_workers(node_ids)
        except Exception:
            logger.warning("cannot ask nodes for their workers", exc_info=True)
            return False
        now = {pid: _cpu_seconds(pid) for pids_of_node in pids for pid in pids_of_node}
        # A process that has just been started rests too, before its imports.
        if all(pids) and all(
            spent > 0.5 and before.get(pid) == spent for pid, spent in now.items()
        ):
            return True
        if time.monotonic() > deadline:
            return False
        before = now
        time.sleep(settled_s)


@contextlib.contextmanager
def quiet_driver() -> Iterator[None]:
    """Sends what Ray would print about other processes to the log instead of the terminal."""
    from ray._private import worker as ray_worker

    original = ray_worker.print_to_stdstream

    def to_log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for line in data.get("lines", ()):
            logger.info("ray: %s", line)

    ray_worker.print_to_stdstream = to_log
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = original


def _answers(address: str, port: int, timeout_s: float = 1.0) -> bool:
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def _unused_workers(node_ids: set[str]) -> list[list[int]]:
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] in node_ids:
            with _raylet(node) as raylet:
                found.append(raylet.unused_workers())
    return found


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _raylet(node: Mapping[str, Any]) -> Iterator[_Raylet]:
    cluster_id = ray._private.worker.global_worker.gcs_client.cluster_id.hex()
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    # With the token and the certificates that this process has for its cluster.
    with init_grpc_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        yield _Raylet(channel, cluster_id)


class _Raylet:
    """What is asked of a node's raylet."""

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
