"""A batch that grows asks for workers through Ray Train's own request."""

from __future__ import annotations

import inspect

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from elastic_kfac.cluster.ray.growth import ask_for_wanted_workers


def test_policy_asks_for_what_is_wanted_and_at_once_when_that_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    renewed: list[int] = []
    for name in ("_get_num_workers_for_resource_request", "_maybe_send_resource_request"):
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
    ask_for_wanted_workers(lambda: wanted[0])
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 4)))
    for now in (None, None, 2, 2, 9):
        wanted[0] = now
        policy._maybe_send_resource_request()
    assert sent == [1, 2, 4]
    assert len(renewed) == 2


def test_ray_policy_takes_the_number_of_its_request_from_one_method() -> None:
    source = inspect.getsource(ElasticScalingPolicy._send_resource_request)
    assert "self._get_num_workers_for_resource_request()" in source
    for decision in ("running", "non_running"):
        code = getattr(ElasticScalingPolicy, f"make_decision_for_{decision}_worker_group").__code__
        assert "_maybe_send_resource_request" in code.co_names
    policy = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 4)))
    assert hasattr(policy, "_latest_reserved_resources_query_time")
