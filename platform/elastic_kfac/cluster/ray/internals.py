"""The parts of Ray without a stable API that this package uses: the only module that imports them.

Written for Ray 2.60. `INTERNALS` lists every private name with the members that are used, the reason
and the module that depends on it. `changed_internals` compares the list with the installed
Ray: `elastic-kfac doctor` reports differences and a test fails on them. Behaviour that a signature does
not show (order of hooks, length of caches) is tested in `tests/unit/cluster/test_ray_internals.py`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._private.grpc_utils import init_grpc_channel
from ray.cluster_utils import Cluster
from ray.core.generated import (
    common_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    node_manager_pb2,
    node_manager_pb2_grpc,
)
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    ENV_VARS_TO_PROPAGATE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import default as failure_policy
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

__all__ = [
    "DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE",
    "ENV_VARS_TO_PROPAGATE",
    "INTERNALS",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR",
    "Cluster",
    "ControllerCallback",
    "ElasticScalingPolicy",
    "Internal",
    "WorkerGroupCallback",
    "WorkerGroupStartupFailedError",
    "changed_internals",
    "common_pb2",
    "failure_policy",
    "gcs_service_pb2",
    "gcs_service_pb2_grpc",
    "get_env_vars_to_propagate",
    "get_or_create_autoscaling_coordinator",
    "init_grpc_channel",
    "internal_kv_get_gcs_client",
    "node_manager_pb2",
    "node_manager_pb2_grpc",
    "ray_state",
    "ray_worker",
]


@dataclass(frozen=True)
class Internal:
    """A private name of Ray."""

    name: str
    """`module:attribute`."""
    members: tuple[str, ...]
    """Members in use; a method with all of its parameters, as in `stop(self, reason)`."""
    reason: str
    used_by: str
    """Module of `cluster/` that depends on it."""


_TRAIN = "ray.train.v2._internal"
_EXECUTION = f"{_TRAIN}.execution"
_COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"

INTERNALS: tuple[Internal, ...] = (
    # ---- Ray Train's controller ------------------------------------------------------------
    Internal(
        f"{_EXECUTION}.callback:ControllerCallback",
        (
            "after_controller_start(self, train_run_context)",
            "on_controller_start_worker_group(self, scaling_config, num_workers)",
            "before_controller_execute_failure_decision(self, failure_decision)",
            "before_controller_execute_resize_decision(self, resize_decision)",
        ),
        "drains a group before it is resized and clears the way after a loss; objects in "
        "RunConfig(callbacks=...) that are no UserCallback reach the controller unchanged",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.callback:WorkerGroupCallback",
        (
            "before_worker_group_start(self, worker_group_context)",
            "after_worker_group_start(self, worker_group)",
            "after_worker_group_training_start(self, worker_group)",
            "after_worker_group_poll_status(self, worker_group_status)",
        ),
        "reports where the ranks run and which of them failed",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.controller:TrainController",
        ("abort(self)",),
        "ends a run, and a group that still waits for its placement, after a stop signal",
        "run.trainer",
    ),
    Internal(
        f"{_EXECUTION}.context:TrainRunContext",
        ("run_id",),
        "part of the name under which the controller requests nodes",
        "ray.scaling",
    ),
    Internal(
        f"{_EXECUTION}.worker_group:WorkerGroup",
        (
            "poll_status(self, timeout)",
            "get_latest_poll_status(self)",
            "get_replica_groups(self)",
            "get_worker_group_state(self)",
            "get_workers(self)",
        ),
        "finds survivors, and ends the replica groups of dead workers before Ray replaces them",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.execution_group:ReplicaGroup",
        ("shutdown(self)", "is_active(self)", "get_workers(self)"),
        "the unit that Ray Train replaces while other workers run on",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.state:WorkerGroupState",
        ("placement_group_handle",),
        "shows whether there is a place for a lost worker",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.poll:WorkerGroupPollStatus",
        ("errors", "failing_replica_group_indices"),
        "names the workers that failed",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.worker:Worker",
        ("actor", "metadata", "distributed_context"),
        "locates a rank's process",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.worker:ActorMetadata",
        ("pid", "node_id", "node_ip"),
        "locates a rank's process",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.worker:RayTrainWorker",
        ("get_metadata(self)",),
        "a call that fails only where the worker is dead",
        "ray.controller",
    ),
    Internal(
        f"{_EXECUTION}.failure_handling.default:RETRYABLE_CONTROLLER_ERRORS",
        (),
        "extended by RayActorError: a worker that dies while another is replaced is one more "
        "failure to retry, not the end of the run",
        "ray.controller",
    ),
    Internal(
        f"{_TRAIN}.exceptions:WorkerGroupStartupFailedError",
        (),
        "raised instead of resizing a group that has just lost a worker; the controller retries",
        "ray.controller",
    ),
    Internal(
        "ray.train.backend:Backend",
        ("has_replica_groups",),
        "makes Ray Train replace single workers",
        "ray.controller",
    ),
    # ---- capacity --------------------------------------------------------------------------
    Internal(
        f"{_EXECUTION}.scaling_policy.elastic:ElasticScalingPolicy",
        (
            "_get_reserved_resources(self)",
            "_get_num_workers_for_resource_request(self)",
            "_maybe_send_resource_request(self)",
            "_send_resource_request(self)",
            "_latest_reserved_resources_query_time",
            "scaling_config",
        ),
        "patched: plans with the nodes that stay (Ray counts draining and dead nodes for up to 20 s "
        "after their end), or with this run's share, and requests the workers that the batch needs",
        "ray.scaling",
    ),
    Internal(
        "ray.train:ScalingConfig",
        ("_resources_per_worker_not_none",),
        "resources of one worker, as the policy computes them",
        "ray.scaling",
    ),
    Internal(
        f"{_COORDINATOR}:get_or_create_autoscaling_coordinator",
        (),
        "the actor that tells the policy what it may use",
        "ray.scaling",
    ),
    Internal(
        f"{_COORDINATOR}:_AutoscalingCoordinatorActor",
        (
            "get_reserved_resources(self, requester_id, recompute)",
            "cancel_request(self, requester_id)",
        ),
        "recomputes now instead of at its next tick (20 s); forgets requests of killed controllers",
        "ray.scaling",
    ),
    Internal(
        "ray._private.state:state",
        ("get_draining_nodes(self)",),
        "`ray.nodes()` does not show which nodes are draining",
        "ray.scaling",
    ),
    # ---- idle worker processes -------------------------------------------------------------
    Internal(
        f"{_TRAIN}.constants:get_env_vars_to_propagate",
        (),
        "the environment of Ray Train's workers: an idle process serves only its own environment",
        "ray.idle_workers",
    ),
    Internal(
        f"{_TRAIN}.constants:ENV_VARS_TO_PROPAGATE",
        (),
        "hidden from the workers, whose environment then is the one of the idle processes",
        "ray.controller",
    ),
    Internal(
        f"{_TRAIN}.constants:DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE",
        (),
        "part of the controller's environment",
        "ray.idle_workers",
    ),
    Internal(
        "ray._common.constants:RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR",
        (),
        "part of the controller's environment",
        "ray.idle_workers",
    ),
    Internal(
        "ray.core.generated.node_manager_pb2_grpc:NodeManagerServiceServicer",
        ("PrestartWorkers(self, request, context)", "GetNodeStats(self, request, context)"),
        "keeps an idle process with torch imported on a node: a new rank starts in tenths of a second",
        "ray.idle_workers",
    ),
    Internal(
        "ray.core.generated.node_manager_pb2:PrestartWorkersRequest",
        ("language", "num_workers", "keep_alive_duration_secs", "job_id", "runtime_env_info"),
        "request to start idle processes",
        "ray.idle_workers",
    ),
    Internal(
        "ray.core.generated.node_manager_pb2:GetNodeStatsRequest",
        ("include_memory_info",),
        "request for a node's processes",
        "ray.idle_workers",
    ),
    Internal(
        "ray.core.generated.node_manager_pb2:GetNodeStatsReply",
        ("core_workers_stats",),
        "a node's processes",
        "ray.idle_workers",
    ),
    Internal(
        "ray.core.generated.common_pb2:CoreWorkerStats",
        ("pid", "worker_type", "actor_id", "num_executed_tasks", "num_running_tasks"),
        "tells unused processes from used ones",
        "ray.idle_workers",
    ),
    Internal(
        "ray.experimental.internal_kv:internal_kv_get_gcs_client",
        (),
        "a client that has the cluster's id, which raylets ask for",
        "ray.idle_workers",
    ),
    Internal(
        "ray._raylet:InnerGcsClient",
        ("cluster_id",),
        "the cluster's id, which raylets ask for",
        "ray.idle_workers",
    ),
    # ---- connecting ------------------------------------------------------------------------
    Internal(
        "ray._private.grpc_utils:init_grpc_channel",
        ("(address, options, asynchronous, credentials)",),
        "a channel with this process's token and certificates",
        "ray.connection",
    ),
    Internal(
        "ray.core.generated.gcs_service_pb2_grpc:NodeInfoGcsServiceServicer",
        ("GetClusterId(self, request, context)",),
        "shows a refused token at once; `ray.init` tries for 20 s and does not say why",
        "ray.connection",
    ),
    Internal(
        "ray._private.worker:print_to_stdstream",
        ("(data, ignore_prefix)",),
        "patched: output of other processes goes to the log instead of the terminal",
        "ray.connection",
    ),
    # ---- the embedded cluster --------------------------------------------------------------
    Internal(
        "ray.cluster_utils:Cluster",
        (
            "_wait_for_node(self, node, timeout)",
            "wait_for_nodes(self, timeout)",
            "remove_node(self, node, allow_graceful)",
            "shutdown(self)",
            "worker_nodes",
            "head_node",
        ),
        "several nodes on one machine",
        "ray.local_cluster",
    ),
    Internal(
        "ray._private.node:Node",
        ("kill_all_processes(self, check_alive, allow_graceful, wait)", "all_processes", "node_id"),
        "ends a node at once",
        "ray.local_cluster",
    ),
)


def changed_internals() -> list[str]:
    """Compares `INTERNALS` with the installed Ray.

    Returns:
        One line per difference: the entry, what differs, and the module that depends on it.
    """
    return [
        f"{entry.name}: {difference} (used by {entry.used_by}: {entry.reason})"
        for entry in INTERNALS
        for difference in differences(entry)
    ]


def differences(entry: Internal) -> list[str]:
    """What of an entry is missing or has other parameters than listed."""
    module_name, _, attribute = entry.name.partition(":")
    try:
        owner = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        return [str(error)]
    found = []
    for member in entry.members:
        name, _, listed = member.rstrip(")").partition("(")
        if not listed:
            if not _has(owner, name):
                found.append(f"{name} is gone")
            continue
        method = getattr(owner, name, None) if name else owner
        if method is None:
            found.append(f"{name} is gone")
            continue
        # Ray's actors wrap their methods in tracing, which hides the parameters.
        parameters = list(inspect.signature(method).parameters)
        if inspect.ismethod(method):
            parameters.insert(0, "self")
        parameters = [p for p in parameters if not p.startswith("_ray_trace")]
        if parameters != listed.split(", "):
            found.append(f"{name or attribute} takes ({', '.join(parameters)}), not ({listed})")
    return found


def _has(owner: Any, name: str) -> bool:
    """Whether `owner`, or an instance of this class, has this attribute or protobuf field."""
    if hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", ()):
        return True
    if not inspect.isclass(owner):
        return _has(type(owner), name)
    descriptor = getattr(owner, "DESCRIPTOR", None)
    if descriptor is not None:
        return name in descriptor.fields_by_name
    return any(
        name in vars(base)["__init__"].__code__.co_names
        for base in owner.__mro__
        if inspect.isfunction(vars(base).get("__init__"))
    )
