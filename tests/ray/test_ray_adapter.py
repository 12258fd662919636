"""Fails loudly when an upgrade of Ray changes what `ray_adapter` relies on."""

from __future__ import annotations

import inspect
import sys
import time
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import ray
from ray._private import worker as ray_worker
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.train import FailureConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution import callback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.train.v2._internal.execution.worker_group.worker import (
    ActorMetadata,
    RayTrainWorker,
    Worker,
)
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import ControllerError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_kfac.cluster.ray import adapter as ray_adapter
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.replicas import OwnGroupBackend

PARAMETERS = {
    "after_controller_start": ["self", "train_run_context"],
    "before_controller_execute_failure_decision": ["self", "failure_decision"],
    "before_controller_execute_resize_decision": ["self", "resize_decision"],
    "on_controller_start_worker_group": ["self", "scaling_config", "num_workers"],
    "before_worker_group_start": ["self", "worker_group_context"],
    "after_worker_group_start": ["self", "worker_group"],
    "after_worker_group_training_start": ["self", "worker_group"],
    "after_worker_group_poll_status": ["self", "worker_group_status"],
}


@pytest.mark.parametrize(
    ("owner", "hook"),
    [(owner, hook) for owner, hooks in ray_adapter.RELIED_ON.items() for hook in hooks],
)
def test_ray_hook_keeps_its_name_and_parameters(owner: str, hook: str) -> None:
    method = getattr(getattr(callback, owner), hook)
    assert list(inspect.signature(method).parameters) == PARAMETERS[hook]


def test_adapter_overrides_every_hook_it_names() -> None:
    named = {hook for hooks in ray_adapter.RELIED_ON.values() for hook in hooks}
    assert named == set(PARAMETERS)
    assert named <= set(vars(ray_adapter.ElasticCallback))


def test_ray_callback_reaches_the_controller_unwrapped() -> None:
    # `UserCallback`s are wrapped; everything else is handed on as it is.
    assert not issubclass(ray_adapter.ElasticCallback, UserCallback)


def test_ray_error_in_a_hook_ends_the_run() -> None:
    policy = DefaultFailurePolicy(FailureConfig(max_failures=-1))
    assert policy.make_decision(ControllerError(RuntimeError("enough"))) == FailureDecision.RAISE


def test_ray_coordinator_recomputes_on_request() -> None:
    actor = default_autoscaling_coordinator._AutoscalingCoordinatorActor
    method = actor.get_reserved_resources
    assert list(inspect.signature(method).parameters)[:3] == ["self", "requester_id", "recompute"]
    assert list(inspect.signature(actor.cancel_request).parameters)[:2] == ["self", "requester_id"]
    assert callable(default_autoscaling_coordinator.get_or_create_autoscaling_coordinator)


def test_ray_controller_asks_for_nodes_under_the_name_that_the_driver_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = autoscaling_coordinator_client.TrainAutoscalingCoordinatorClient
    monkeypatch.setattr(client, "send_resource_request", lambda *_: None)
    trainer = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=(1, 2)))
    policy = ElasticScalingPolicy(trainer.scaling_config)
    policy.after_controller_start(trainer.train_run_context)
    assert policy._requester_id == ray_adapter.request_of(trainer)


def test_ray_policy_caches_no_longer_than_the_adapter_waits() -> None:
    assert ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S <= ray_adapter.POLICY_CACHE_S


def test_ray_policy_gets_its_capacity_by_node_from_one_method() -> None:
    method = ElasticScalingPolicy._get_reserved_resources
    assert list(inspect.signature(method).parameters) == ["self"]
    for decision in ("running", "non_running"):
        code = getattr(ElasticScalingPolicy, f"make_decision_for_{decision}_worker_group").__code__
        assert "_get_reserved_resources" in code.co_names


def test_policy_counts_staying_nodes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr(ElasticScalingPolicy, "_get_reserved_resources", lambda self: reserved)
    monkeypatch.setattr(ray_adapter, "staying_nodes", lambda: {"a": {"CPU": 1.0}})
    for _ in range(2):
        ray_adapter.plan_with_staying_nodes()
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 2)))
    assert policy._get_reserved_resources() == {"a": {"CPU": 1.0}}
    assert policy._count_possible_workers(policy._get_reserved_resources()) == 1


def test_ray_worker_tells_where_it_runs() -> None:
    assert {"actor", "metadata", "distributed_context"} <= set(Worker.__dataclass_fields__)
    assert {"pid", "node_id", "node_ip"} <= set(ActorMetadata.__dataclass_fields__)
    assert callable(RayTrainWorker.get_metadata)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (
            node_manager_pb2.PrestartWorkersRequest,
            "language num_workers keep_alive_duration_secs job_id runtime_env_info",
        ),
        (node_manager_pb2.GetNodeStatsRequest, "include_memory_info"),
        (node_manager_pb2.GetNodeStatsReply, "core_workers_stats"),
        (
            common_pb2.CoreWorkerStats,
            "pid worker_type actor_id num_executed_tasks num_running_tasks",
        ),
    ],
)
def test_ray_raylet_messages_have_the_fields_in_use(message: Any, fields: str) -> None:
    assert set(fields.split()) <= set(message.DESCRIPTOR.fields_by_name)
    for call in ("PrestartWorkers", "GetNodeStats"):
        assert hasattr(node_manager_pb2_grpc.NodeManagerServiceServicer, call)


def test_spare_process_is_ready_counted_once_and_taken(cluster: LocalCluster) -> None:
    # A node of its own: others may keep processes that earlier runs have left.
    fresh = cluster.node_id(cluster.add_node())
    nodes = {fresh}
    ray_adapter.prestart_workers(nodes, 1)
    assert ray_adapter.await_idle_workers(nodes, timeout_s=180.0)
    assert ray_adapter.prestart_workers(nodes, 1) == 0

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
        asked = ray_adapter.prestart_workers(nodes, 1)
    assert asked == 1


def test_rank_that_died_is_told_as_the_cause_though_ray_heard_of_a_survivor_first(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rank:
        def get_metadata(self) -> str:
            return "alive"

    class Listener:
        def group_failed(self, errors: dict[int, str], lost: list[str]) -> None:
            heard.append(errors)

    heard: list[dict[int, str]] = []
    actors: list[Any] = [
        ray.remote(num_cpus=0, max_restarts=0)(Rank).remote() for _ in cluster.nodes
    ]
    ray.get([actor.get_metadata.remote() for actor in actors])
    ray.kill(actors[1])
    monkeypatch.setattr(ray_adapter, "refresh_capacity", lambda: None)
    callback = ray_adapter.ElasticCallback(Listener())
    callback._actors, callback._training = tuple(actors), True
    callback._errors = {0: "CommunicationError: rank 0 lost a peer"}
    deadline = time.monotonic() + 120
    while callback._dead() != {1: "ActorDiedError"} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not callback._is_alive()
    callback.before_controller_execute_failure_decision(None)
    ray.kill(actors[0])
    assert heard == [{0: "CommunicationError: rank 0 lost a peer", 1: "ActorDiedError"}]


def test_ray_passes_train_variables_on_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR, "0.5")
    assert constants.get_env_vars_to_propagate()[constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR] == "0.5"
    assert '"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"' in ray_adapter.train_environment()


def test_every_group_reads_the_settings_of_the_run_and_workers_do_not_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Listener:
        def group_starts(self, world_size: int) -> None:
            assert constants.get_env_vars_to_propagate() == {}

    for name in constants.ENV_VARS_TO_PROPAGATE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR, "20")
    context = WorkerGroupContext("run", cast(Any, None), 2, {"CPU": 1.0})
    callback = ray_adapter.ElasticCallback(cast(Any, Listener()))
    for _ in range(2):
        callback.on_controller_start_worker_group(scaling_config=None, num_workers=2)
        group = WorkerGroup(MagicMock(), context, [callback])
        assert group._worker_health_check_timeout_s == 20
        callback.before_worker_group_start(context)


def test_ray_makes_a_group_between_the_two_hooks() -> None:
    made = inspect.getsource(TrainController._start_worker_group)
    assert made.index("on_controller_start_worker_group") < made.index("worker_group_cls.create")
    started = inspect.getsource(WorkerGroup._start_impl)
    assert started.index("before_worker_group_start") < started.index("_create_workers")


def test_ray_driver_prints_through_one_function(capsys: pytest.CaptureFixture[str]) -> None:
    original = ray_worker.print_to_stdstream
    assert list(inspect.signature(original).parameters) == ["data", "ignore_prefix"]
    with ray_adapter.quiet_driver():
        ray_worker.print_to_stdstream({"lines": ["a raylet died"]}, ignore_prefix=False)
    assert ray_worker.print_to_stdstream is original
    assert "a raylet died" not in "".join(capsys.readouterr())


def test_ray_backend_without_groups_sets_nothing_up() -> None:
    backend = OwnGroupBackend().backend_cls
    assert backend.on_start is Backend.on_start
    assert not backend.has_replica_groups
