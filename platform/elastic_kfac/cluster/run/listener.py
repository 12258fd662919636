"""What Ray Train's controller asks and tells, passed on to the recorder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from elastic_kfac.cluster.ray.controller import RankProcess
from elastic_kfac.cluster.ray.nodes import draining_nodes
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.progress import workers

PARK_TIMEOUT_S = 60.0
"""How long a planned resize waits for the ranks to save their state."""


class RecorderListener:
    """Ray Train's controller tells the recorder."""

    def __init__(self, recorder: Any, *, park_timeout_s: float = PARK_TIMEOUT_S) -> None:
        self._recorder = recorder
        self._park_timeout_s = park_timeout_s

    def controller_started(self, controller: Any) -> None:
        ray.get(self._recorder.controller_started.remote(controller))

    def group_planned(self, world_size: int) -> None:
        self._recorder.group_starts.remote(world_size)

    def group_started(self, ranks: Sequence[RankProcess]) -> None:
        pids = {rank.rank: rank.pid for rank in ranks}
        nodes = {rank.rank: rank.node_id for rank in ranks}
        ray.get(self._recorder.group_started.remote(pids, nodes))

    def drain(
        self, new_world_size: int, is_alive: Callable[[], bool], *, draining: Sequence[str]
    ) -> bool:
        reason = f"the cluster has room for {workers(new_world_size)}"
        if draining:
            named = ", ".join(node_id[:8] for node_id in draining)
            plural = "s are" if len(draining) > 1 else " is"
            reason = f"node{plural} being drained ({named}); {reason}"
        notice_s = _time_left(draining)
        parked = self._recorder.park.remote(
            reason, timeout_s=self._park_timeout_s, notice_s=notice_s
        )
        while not ray.wait([parked], timeout=1.0)[0]:
            if not is_alive():
                return False
        return bool(ray.get(parked))

    def members_lost(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> str | None:
        verdict: RankError | None = ray.get(
            self._recorder.members_lost.remote(dict(errors), list(lost_nodes))
        )
        return None if verdict is None else verdict.line

    def wanted_workers(self) -> int | None:
        wanted: int | None = ray.get(self._recorder.wanted_workers.remote())
        return wanted

    def is_over(self) -> bool:
        return bool(ray.get(self._recorder.is_over.remote()))

    def fall_back(self, reason: str) -> bool:
        return bool(
            ray.get(self._recorder.fall_back.remote(reason, timeout_s=self._park_timeout_s))
        )

    def group_failed(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> str | None:
        verdict: RankError | None = ray.get(
            self._recorder.group_failed.remote(dict(errors), list(lost_nodes))
        )
        return None if verdict is None else verdict.line


def _time_left(draining: Sequence[str]) -> float | None:
    """Seconds until the first of these nodes goes; 0 without a deadline, None without nodes."""
    deadlines = draining_nodes()
    left = [deadlines.get(node_id, 0) / 1000 - time.time() for node_id in draining]
    return max(0.0, min(left)) if left else None
