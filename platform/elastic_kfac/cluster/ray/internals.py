"""The parts of Ray without a stable API that this package uses: the only module that imports them.

Written for Ray 2.60. `INTERNALS` lists every private name with the members that are used, the reason
and the module that depends on it. `changed_internals` compares the list with the installed
Ray: `elastic-kfac doctor` reports differences and a test fails on them. Behaviour that a signature does
not show (order of hooks, length of caches) is tested in `tests/unit/cluster/test_ray_internals.py`.

Each name is imported when another module asks for it: Ray Train and Ray Data take most of a second, which
a process that starts nodes or saves states has no use for.
"""

# ruff: noqa: F401  the other modules of the room import these names from here

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
    from ray._private import services as ray_services
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
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.constants import (
        DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        ENV_VARS_TO_PROPAGATE,
        get_env_vars_to_propagate,
    )
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


@dataclass(frozen=True)
class Internal:
    """The names in use of a module of Ray."""

    module: str
    used_by: str
    """Module of `cluster/` that depends on them."""
    reason: str
    names: str | tuple[str, ...]
    """Lines of `Name`, `Class.attribute` and `function(parameters)`, separated by blanks."""

    def each_name(self) -> list[str]:
        """Every listed name, with its parameters."""
        lines = (self.names,) if isinstance(self.names, str) else self.names
        return [name for line in lines for name in line.split()]


_EXECUTION = "ray.train.v2._internal.execution"
_GENERATED = "ray.core.generated"

INTERNALS: tuple[Internal, ...] = (
    # ---- Ray Train's controller ------------------------------------------------------------
    Internal(
        f"{_EXECUTION}.callback",
        "ray.controller",
        "drains a group before it is resized, clears the way after a loss and locates the ranks; objects "
        "in RunConfig(callbacks=...) that are no UserCallback reach the controller unchanged",
        (
            "ControllerCallback.after_controller_start(self,train_run_context)",
            "ControllerCallback.on_controller_start_worker_group(self,scaling_config,num_workers)",
            "ControllerCallback.before_controller_execute_failure_decision(self,failure_decision)",
            "ControllerCallback.before_controller_execute_resize_decision(self,resize_decision)",
            "WorkerGroupCallback.before_worker_group_start(self,worker_group_context)",
            "WorkerGroupCallback.after_worker_group_start(self,worker_group)",
            "WorkerGroupCallback.after_worker_group_training_start(self,worker_group)",
            "WorkerGroupCallback.after_worker_group_poll_status(self,worker_group_status)",
        ),
    ),
    Internal(
        "ray.train.v2.api.data_parallel_trainer",
        "ray.controller",
        "what Ray's own trainers are made of, without torch; leaves out callbacks whose actors a run "
        "does not need",
        "DataParallelTrainer._create_default_callbacks(self)",
    ),
    Internal(
        "ray.train.v2._internal.callbacks",
        "ray.controller",
        "starts an actor for datasets of Ray Data even where there are none",
        "DatasetsCallback",
    ),
    Internal(
        "ray.train.v2._internal.callbacks.placement_group_callback",
        "ray.controller",
        "starts an actor that outlives a dead controller; needless where the cluster does not",
        "PlacementGroupCleanerCallback",
    ),
    Internal(
        f"{_EXECUTION}.controller",
        "run.trainer",
        "ends a run, and a group that still waits for its placement, after a stop signal",
        "TrainController.abort(self)",
    ),
    Internal(
        f"{_EXECUTION}.worker_group",
        "ray.controller",
        "locates the ranks",
        "WorkerGroup.get_workers(self)",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.poll",
        "ray.controller",
        "names the workers that failed",
        "WorkerGroupPollStatus.errors",
    ),
    Internal(
        f"{_EXECUTION}.worker_group.worker",
        "ray.controller",
        "locates a rank's process; `get_metadata` fails only where it is dead",
        "Worker.actor Worker.metadata Worker.distributed_context ActorMetadata.pid "
        "ActorMetadata.node_id RayTrainWorker.get_metadata(self)",
    ),
    # ---- capacity --------------------------------------------------------------------------
    Internal(
        f"{_EXECUTION}.scaling_policy.elastic",
        "ray.scaling",
        "patched: plans with the nodes that stay (Ray counts draining and dead nodes for up to 20 s "
        "after their end) or with this run's share, and requests the workers that the batch needs",
        (
            "ElasticScalingPolicy._get_reserved_resources(self)",
            "ElasticScalingPolicy._get_num_workers_for_resource_request(self)",
            "ElasticScalingPolicy._maybe_send_resource_request(self)",
            "ElasticScalingPolicy._send_resource_request(self)",
            "ElasticScalingPolicy._latest_reserved_resources_query_time",
            "ElasticScalingPolicy.scaling_config",
        ),
    ),
    Internal(
        f"{_EXECUTION}.context",
        "ray.scaling",
        "part of the name under which the controller requests nodes",
        "TrainRunContext.run_id",
    ),
    Internal(
        "ray.train",
        "ray.scaling",
        "resources of one worker, as the policy computes them",
        "ScalingConfig._resources_per_worker_not_none",
    ),
    Internal(
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "ray.scaling",
        "grants capacity to the policy; recomputes on request instead of at its next tick (20 s), and "
        "drops requests of killed controllers",
        (
            "get_or_create_autoscaling_coordinator()",
            "_AutoscalingCoordinatorActor.get_reserved_resources(self,requester_id,recompute)",
            "_AutoscalingCoordinatorActor.cancel_request(self,requester_id)",
        ),
    ),
    Internal(
        "ray._private.state",
        "ray.nodes",
        "`ray.nodes()` does not show which nodes are draining",
        "state.get_draining_nodes(self)",
    ),
    # ---- idle worker processes -------------------------------------------------------------
    Internal(
        "ray.train.v2._internal.constants",
        "ray.idle_workers",
        "the environment of Ray Train's workers: an idle process serves only its own environment, hence "
        "the variables are hidden from the workers",
        "get_env_vars_to_propagate() ENV_VARS_TO_PROPAGATE "
        "DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE",
    ),
    Internal(
        "ray._common.constants",
        "ray.idle_workers",
        "part of the controller's environment",
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR",
    ),
    Internal(
        f"{_GENERATED}.node_manager_pb2_grpc",
        "ray.idle_workers",
        "keeps an idle process with torch imported on a node: a new rank starts in tenths of a second",
        "NodeManagerServiceServicer.PrestartWorkers(self,request,context) "
        "NodeManagerServiceServicer.GetNodeStats(self,request,context) NodeManagerServiceStub",
    ),
    Internal(
        f"{_GENERATED}.node_manager_pb2",
        "ray.idle_workers",
        "the requests of these calls",
        (
            "PrestartWorkersRequest.language PrestartWorkersRequest.num_workers",
            "PrestartWorkersRequest.keep_alive_duration_secs PrestartWorkersRequest.job_id",
            "PrestartWorkersRequest.runtime_env_info GetNodeStatsRequest.include_memory_info",
            "GetNodeStatsReply.core_workers_stats",
        ),
    ),
    Internal(
        f"{_GENERATED}.common_pb2",
        "ray.idle_workers",
        "separates unused processes from used ones",
        "PYTHON WORKER CoreWorkerStats.pid CoreWorkerStats.worker_type CoreWorkerStats.actor_id "
        "CoreWorkerStats.num_executed_tasks CoreWorkerStats.num_running_tasks",
    ),
    Internal(
        "ray.experimental.internal_kv",
        "ray.idle_workers",
        "a client that has the cluster's id, which raylets ask for",
        "internal_kv_get_gcs_client()",
    ),
    Internal("ray._raylet", "ray.idle_workers", "that client", "InnerGcsClient.cluster_id"),
    # ---- connecting ------------------------------------------------------------------------
    Internal(
        "ray._private.grpc_utils",
        "ray.connection",
        "a channel with this process's token and certificates",
        "init_grpc_channel(address,options,asynchronous,credentials)",
    ),
    Internal(
        f"{_GENERATED}.gcs_service_pb2_grpc",
        "ray.connection",
        "shows a refused token at once; `ray.init` tries for 20 s and does not name the cause",
        "NodeInfoGcsServiceServicer.GetClusterId(self,request,context) NodeInfoGcsServiceStub",
    ),
    Internal(
        f"{_GENERATED}.gcs_service_pb2", "ray.connection", "that request", "GetClusterIdRequest"
    ),
    Internal(
        "ray._private.worker",
        "ray.connection",
        "patched: output of other processes goes to the log instead of the terminal",
        "print_to_stdstream(data,ignore_prefix)",
    ),
    # ---- the embedded cluster --------------------------------------------------------------
    Internal(
        "ray.cluster_utils",
        "ray.local_cluster",
        "several nodes on one machine",
        "Cluster._wait_for_node(self,node,timeout) "
        "Cluster.remove_node(self,node,allow_graceful) Cluster.shutdown(self) "
        "Cluster.worker_nodes Cluster.head_node",
    ),
    Internal(
        "ray._private.node",
        "ray.local_cluster",
        "ends a node at once, and tells whether one that starts has ended",
        "Node.kill_all_processes(self,check_alive,allow_graceful,wait) Node.all_processes Node.node_id "
        "Node.remaining_processes_alive(self)",
    ),
    Internal(
        "ray._private.services",
        "ray.local_cluster",
        "patched: a `Node` that starts waits for itself, looking once a second",
        "get_node(gcs_address,node_id)",
    ),
)

_MODULES = {
    "ray_services": "ray._private.services",
    "ray_state": "ray._private.state",
    "ray_worker": "ray._private.worker",
    **{
        entry.module.rpartition(".")[2]: entry.module
        for entry in INTERNALS
        if _GENERATED in entry.module
    },
}
"""Names here that stand for a whole module."""

_HOMES = {
    name.split("(")[0].split(".")[0]: entry.module
    for entry in INTERNALS
    for name in entry.each_name()
}


def __getattr__(name: str) -> Any:
    """Imports a name of `INTERNALS`, or one of its modules, the first time that it is asked for."""
    found: Any
    if name in _MODULES:
        found = importlib.import_module(_MODULES[name])
    elif name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def changed_internals() -> list[str]:
    """Compares `INTERNALS` with the installed Ray.

    Returns:
        One line per difference: the name, what differs, and the module that depends on it.
    """
    return [
        f"{entry.module}: {difference} (used by {entry.used_by}: {entry.reason})"
        for entry in INTERNALS
        for difference in differences(entry)
    ]


def differences(entry: Internal) -> list[str]:
    """Names of an entry that are gone or take other parameters."""
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        return [str(error)]
    found = (_difference(module, name) for name in entry.each_name())
    return [difference for difference in found if difference is not None]


def _difference(module: Any, listed: str) -> str | None:
    path, _, parameters = listed.rstrip(")").partition("(")
    owner = module
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part, None)
    if owner is None or not _has(owner, name):
        return f"{path} is gone"
    if "(" not in listed:
        return None
    method = getattr(owner, name)
    actual = list(inspect.signature(method).parameters)
    if inspect.ismethod(method):
        actual.insert(0, "self")
    # Ray's actors wrap their methods in tracing, which adds a parameter.
    taken = ",".join(name for name in actual if not name.startswith("_ray_trace"))
    return None if taken == parameters else f"{path} takes ({taken}), not ({parameters})"


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
