"""The run coordinator's client in Ray Train's controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from elastic_kfac.cluster.ray.controller import RankProcess
from elastic_kfac.cluster.ray.nodes import seconds_left
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.progress import workers

DRAIN_TIMEOUT_S = 60.0
"""How long a planned resize waits for the ranks to save their state."""


class ControllerClient:
    """Implements the protocol that `ElasticCallback` and `InPlaceCallback` call."""

    def __init__(self, coordinator: Any, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        self._coordinator = coordinator
        self._drain_timeout_s = drain_timeout_s

    def controller_started(self, controller: Any) -> None:
        ray.get(self._coordinator.controller_started.remote(controller))

    def group_planned(self, world_size: int) -> None:
        self._coordinator.group_planned.remote(world_size)

    def group_started(self, ranks: Sequence[RankProcess]) -> None:
        pids = {rank.rank: rank.pid for rank in ranks}
        nodes = {rank.rank: rank.node_id for rank in ranks}
        ray.get(self._coordinator.group_started.remote(pids, nodes))

    def drain(
        self, new_world_size: int, is_alive: Callable[[], bool], *, draining: Sequence[str]
    ) -> bool:
        reason = f"the cluster has room for {workers(new_world_size)}"
        if draining:
            names = ", ".join(node_id[:8] for node_id in draining)
            plural = "s are" if len(draining) > 1 else " is"
            reason = f"node{plural} being drained ({names}); {reason}"
        drained = self._coordinator.drain.remote(
            reason, timeout_s=self._drain_timeout_s, notice_s=seconds_left(draining)
        )
        while not ray.wait([drained], timeout=1.0)[0]:
            if not is_alive():
                return False
        return bool(ray.get(drained))

    def group_failed(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> str | None:
        return _line(self._coordinator.group_failed.remote(dict(errors), list(lost_nodes)))

    def members_lost(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> str | None:
        return _line(self._coordinator.members_lost.remote(dict(errors), list(lost_nodes)))

    def is_over(self) -> bool:
        return bool(ray.get(self._coordinator.is_over.remote()))

    def fall_back(self, reason: str) -> bool:
        return bool(
            ray.get(self._coordinator.fall_back.remote(reason, timeout_s=self._drain_timeout_s))
        )

    def wanted_workers(self) -> int | None:
        wanted: int | None = ray.get(self._coordinator.wanted_workers.remote())
        return wanted


def _line(answer: Any) -> str | None:
    error: RankError | None = ray.get(answer)
    return None if error is None else error.line
