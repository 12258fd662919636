"""Asks the cluster for as many workers as the batch keeps busy, instead of for the most there may be.

Ray Train sends one request for the whole cluster and renews it, so a second request of our own would be
overwritten and overwrite it. What changes here is the number in Ray Train's own request: the reservation
that comes back is then the plan, and where no node comes the run goes on with what it has, accumulating.
Relies on `ElasticScalingPolicy` taking that number from one method; a test fails when this changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy


def ask_for_wanted_workers(wanted: Callable[[], int | None]) -> None:
    """Has this process's elastic policy request `wanted()` workers; None is the minimum."""
    ask_for_most = ElasticScalingPolicy._get_num_workers_for_resource_request
    renew = ElasticScalingPolicy._maybe_send_resource_request
    sent: dict[int, int] = {}

    @functools.wraps(ask_for_most)
    def number(policy: ElasticScalingPolicy) -> int:
        least = policy.scaling_config.min_workers
        return max(least, min(ask_for_most(policy), wanted() or least))

    @functools.wraps(renew)
    def renew_or_change(policy: ElasticScalingPolicy) -> None:
        now = number(policy)
        if sent.get(id(policy)) == now:
            renew(policy)
            return
        sent[id(policy)] = now
        policy._send_resource_request()
        # Asked for anew, or the answer to the former request would count for a moment more.
        policy._latest_reserved_resources_query_time = float("-inf")

    ElasticScalingPolicy._get_num_workers_for_resource_request = number
    ElasticScalingPolicy._maybe_send_resource_request = renew_or_change
