"""How many workers Ray Train plans with and requests.

A run's elastic policy asks an actor of the cluster, the autoscaling coordinator, for its share. The
answer is up to 20 s old and counts nodes that are dead or draining; and Ray Train sends one request for
the whole cluster and renews it, so that a second one of our own would overwrite it and be overwritten.
Hence the policy itself is patched, in the process of Ray Train's controller.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray

from elastic_kfac.cluster.ray.internals import (
    ElasticScalingPolicy,
    get_or_create_autoscaling_coordinator,
)
from elastic_kfac.cluster.ray.nodes import staying_nodes

logger = logging.getLogger(__name__)

POLICY_CACHE_S = 1.0
"""How long the elastic policy keeps an answer of the autoscaling coordinator."""

_Capacity = dict[str, dict[str, float]] | None


def request_of(trainer: Any) -> str:
    """The name under which a trainer's controller requests nodes."""
    return f"train-{trainer.train_run_context.run_id}"


def refresh_capacity(timeout_s: float = 10.0, *, withdraw: Sequence[str] = ()) -> None:
    """Makes Ray Train see the nodes as they are now.

    Args:
        withdraw: Requests of controllers that were killed; Ray would honour them for 180 s.
    """
    try:
        coordinator = get_or_create_autoscaling_coordinator()
        calls = [coordinator.cancel_request.remote(request) for request in withdraw]
        calls.append(coordinator.get_reserved_resources.remote("elastic_kfac", True))
        ray.get(calls, timeout=timeout_s)
    except Exception:
        # The next tick of the coordinator has the same effect, only later.
        logger.warning("could not refresh the capacity that Ray Train sees", exc_info=True)


def plan_with_staying_nodes() -> None:
    """Makes this process's policy ignore nodes that are dead or draining.

    A drain is then a planned resize to the nodes that stay.
    """
    original = ElasticScalingPolicy._get_reserved_resources
    if getattr(original, "counts_staying_nodes_only", False):
        return

    @functools.wraps(original)
    def staying(policy: ElasticScalingPolicy) -> _Capacity:
        reserved = original(policy)
        if not reserved:
            return reserved
        nodes = staying_nodes()
        return {node_id: part for node_id, part in reserved.items() if node_id in nodes}

    staying.counts_staying_nodes_only = True  # type: ignore[attr-defined]
    ElasticScalingPolicy._get_reserved_resources = staying


def plan_within(share: Callable[[], int]) -> None:
    """Makes this process's policy see room for `share()` workers and no more.

    Two elastic runs can be promised the same nodes, so that the coordinator is not asked at all.
    """

    @functools.wraps(ElasticScalingPolicy._get_reserved_resources)
    def allotted(policy: ElasticScalingPolicy) -> _Capacity:
        one = dict(policy.scaling_config._resources_per_worker_not_none)
        return {f"share-{number}": one for number in range(share())}

    ElasticScalingPolicy._get_reserved_resources = allotted


def request_wanted_workers(wanted: Callable[[], int | None]) -> None:
    """Makes this process's policy request `wanted()` workers instead of the maximum.

    The reservation that comes back is the plan; without new nodes the run continues with what it has,
    accumulating gradients.

    Args:
        wanted: How many workers the batch keeps busy; None is the minimum.
    """
    most = ElasticScalingPolicy._get_num_workers_for_resource_request
    renew = ElasticScalingPolicy._maybe_send_resource_request
    sent: dict[int, int] = {}

    @functools.wraps(most)
    def number(policy: ElasticScalingPolicy) -> int:
        least = policy.scaling_config.min_workers
        return max(least, min(most(policy), wanted() or least))

    @functools.wraps(renew)
    def renew_or_change(policy: ElasticScalingPolicy) -> None:
        now = number(policy)
        if sent.get(id(policy)) == now:
            renew(policy)
            return
        sent[id(policy)] = now
        policy._send_resource_request()
        # Or the cached answer to the former request would count for a moment more.
        policy._latest_reserved_resources_query_time = float("-inf")

    ElasticScalingPolicy._get_num_workers_for_resource_request = number
    ElasticScalingPolicy._maybe_send_resource_request = renew_or_change
