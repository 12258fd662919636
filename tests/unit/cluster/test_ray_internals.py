"""Fails loudly when an upgrade of Ray changes what `cluster/ray` relies on."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from ray._private.node import Node
from ray.train import FailureConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import ControllerError

from elastic_kfac.cluster.ray import controller, internals, scaling
from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.idle_workers import train_environment
from elastic_kfac.cluster.ray.internals import (
    INTERNALS,
    ElasticScalingPolicy,
    Internal,
    changed_internals,
    differences,
    ray_worker,
)

ROOM = Path(internals.__file__).parent


@pytest.mark.parametrize("entry", INTERNALS, ids=lambda entry: entry.module)
def test_ray_internal_is_as_listed(entry: Internal) -> None:
    assert differences(entry) == []
    assert (ROOM.parent / f"{entry.used_by.replace('.', '/')}.py").exists()


def test_every_difference_is_reported_with_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = "ray.train.v2._internal.execution.scaling_policy.elastic"
    changed = (
        Internal("ray._private.nowhere", "ray.nodes", "none", "thing"),
        Internal(elastic, "ray.nodes", "none", "Gone"),
        Internal(elastic, "ray.nodes", "none", "Gone.method(self)"),
        Internal(elastic, "ray.nodes", "none", "ElasticScalingPolicy._no_such_field"),
        Internal(elastic, "ray.nodes", "none", "ElasticScalingPolicy._no_such_method(self)"),
        Internal("ray._private.worker", "ray.nodes", "none", "print_to_stdstream(data)"),
    )
    monkeypatch.setattr(internals, "INTERNALS", changed)
    lines = changed_internals()
    assert len(lines) == len(changed)
    for entry, line in zip(changed, lines, strict=True):
        assert line.startswith(f"{entry.module}: ")
        assert "used by ray.nodes" in line
    assert "takes (data,ignore_prefix), not (data)" in lines[-1]


def test_every_private_import_is_listed() -> None:
    listed = {
        f"{entry.module}.{name.partition('(')[0].partition('.')[0]}"
        for entry in INTERNALS
        for name in entry.each_name()
    }
    modules = {entry.module for entry in INTERNALS}
    tree = ast.parse(Path(internals.__file__).read_text(encoding="utf-8"))
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray.")
        for alias in node.names
    }
    assert len(imported) > 10
    assert imported - listed - modules == set()


def test_callback_overrides_every_hook_it_lists() -> None:
    (entry,) = (entry for entry in INTERNALS if entry.module.endswith(".callback"))
    hooks = {name.partition("(")[0].rpartition(".")[2] for name in entry.each_name()}
    assert len(hooks) == 8
    ours = (controller.StartCallback, controller.ElasticCallback)
    assert hooks == {name for kind in ours for name in vars(kind)} & hooks


def test_ray_callback_reaches_the_controller_unwrapped() -> None:
    # `UserCallback`s are wrapped; everything else is handed on as it is.
    assert not issubclass(controller.ElasticCallback, UserCallback)


def test_ray_error_in_a_hook_ends_the_run() -> None:
    policy = DefaultFailurePolicy(FailureConfig(max_failures=-1))
    assert policy.make_decision(ControllerError(RuntimeError("enough"))) == FailureDecision.RAISE


def test_ray_controller_requests_nodes_under_the_name_that_the_driver_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = autoscaling_coordinator_client.TrainAutoscalingCoordinatorClient
    monkeypatch.setattr(client, "send_resource_request", lambda *_: None)
    trainer = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=(1, 2)))
    policy = ElasticScalingPolicy(trainer.scaling_config)
    policy.after_controller_start(trainer.train_run_context)
    assert policy._requester_id == scaling.request_of(trainer)


def test_ray_policy_caches_no_longer_than_we_wait() -> None:
    assert ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S <= scaling.POLICY_CACHE_S


def test_ray_policy_decides_through_the_patched_methods() -> None:
    for decision in ("running", "non_running"):
        code = getattr(ElasticScalingPolicy, f"make_decision_for_{decision}_worker_group").__code__
        assert {"_get_reserved_resources", "_maybe_send_resource_request"} <= set(code.co_names)
    source = inspect.getsource(ElasticScalingPolicy._send_resource_request)
    assert "self._get_num_workers_for_resource_request()" in source


def test_policy_counts_staying_nodes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr(ElasticScalingPolicy, "_get_reserved_resources", lambda self: reserved)
    monkeypatch.setattr(scaling, "staying_nodes", lambda: {"a": {"CPU": 1.0}})
    for _ in range(2):
        scaling.plan_with_staying_nodes()
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 2)))
    assert policy._get_reserved_resources() == {"a": {"CPU": 1.0}}
    assert policy._count_possible_workers(policy._get_reserved_resources()) == 1


def test_policy_sees_its_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_get_reserved_resources"
    monkeypatch.setattr(ElasticScalingPolicy, name, getattr(ElasticScalingPolicy, name))
    share = [3]
    scaling.plan_within(lambda: share[0])
    policy = ElasticScalingPolicy(
        ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2})
    )
    for share[0] in (3, 1):
        assert list(policy._get_reserved_resources().values()) == [{"CPU": 2}] * share[0]
        assert policy._count_possible_workers(policy._get_reserved_resources()) == share[0]


def test_policy_requests_what_is_wanted_and_at_once_when_that_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    renewed: list[int] = []
    name = "_get_num_workers_for_resource_request"
    monkeypatch.setattr(ElasticScalingPolicy, name, getattr(ElasticScalingPolicy, name))
    monkeypatch.setattr(
        ElasticScalingPolicy, "_maybe_send_resource_request", lambda self: renewed.append(1)
    )
    monkeypatch.setattr(
        ElasticScalingPolicy,
        "_send_resource_request",
        lambda self: sent.append(self._get_num_workers_for_resource_request()),
    )
    wanted: list[int | None] = [None]
    scaling.request_wanted_workers(lambda: wanted[0])
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 4)))
    for now in (None, None, 2, 2, 9):
        wanted[0] = now
        policy._maybe_send_resource_request()
    assert sent == [1, 2, 4]
    assert len(renewed) == 2


def test_ray_passes_train_variables_on_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR, "0.5")
    assert constants.get_env_vars_to_propagate()[constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR] == "0.5"
    assert '"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"' in train_environment()


def test_every_group_reads_the_settings_of_the_run_and_workers_do_not_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    propagated: list[dict[str, str]] = []
    coordinator = MagicMock()
    coordinator.group_planned.remote.side_effect = lambda world_size: propagated.append(
        constants.get_env_vars_to_propagate()
    )
    for name in constants.ENV_VARS_TO_PROPAGATE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR, "20")
    context = WorkerGroupContext("run", cast(Any, None), 2, {"CPU": 1.0})
    callback = controller.ElasticCallback(coordinator)
    for _ in range(2):
        callback.on_controller_start_worker_group(scaling_config=None, num_workers=2)
        group = WorkerGroup(MagicMock(), context, [callback])
        assert group._worker_health_check_timeout_s == 20
        callback.before_worker_group_start(context)
    assert propagated == [{}, {}]


def test_ray_makes_a_group_between_the_two_hooks() -> None:
    made = inspect.getsource(TrainController._start_worker_group)
    assert made.index("on_controller_start_worker_group") < made.index("worker_group_cls.create")
    started = inspect.getsource(WorkerGroup._start_impl)
    assert started.index("before_worker_group_start") < started.index("_create_workers")


def test_ray_node_waits_for_itself_through_one_function_and_keeps_ports_only() -> None:
    started = inspect.getsource(Node.__init__)
    assert "ray._private.services.get_node(" in started
    # What `_nodes_not_awaited` gives it has nothing in it.
    read = set(re.findall(r'node_info(?:\[\s*|\.get\()"(\w+)"', started))
    assert read == {
        "labels",
        "node_manager_port",
        "runtime_env_agent_port",
        "metrics_agent_port",
        "metrics_export_port",
        "dashboard_agent_listen_port",
    }


def test_ray_driver_prints_through_one_function(capsys: pytest.CaptureFixture[str]) -> None:
    original = ray_worker.print_to_stdstream
    with quiet_driver():
        ray_worker.print_to_stdstream({"lines": ["a raylet died"]}, ignore_prefix=False)
    assert ray_worker.print_to_stdstream is original
    assert "a raylet died" not in "".join(capsys.readouterr())


def test_backend_sets_no_group_up() -> None:
    own = controller.OwnGroupBackend().backend_cls
    assert own.on_start is Backend.on_start
    assert not own.has_replica_groups
