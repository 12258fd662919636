"""Faults on request: real node losses, returns and kills on the embedded cluster, at given steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.progress import workers
from elastic_kfac.errors import UsageError
from elastic_kfac.training.callbacks import event_row


@dataclass(frozen=True, order=True)
class PlannedFault:
    """What shall happen once a step is committed."""

    step: int
    kind: str
    """`resize` or `kill`."""
    value: int
    """Nodes that shall be there, or the rank whose process shall die."""

    def __str__(self) -> str:
        return f"--{self.kind}-at {self.step}:{self.value}"


class FaultPlan:
    """The faults of a run, in the order of their steps."""

    def __init__(
        self,
        cluster: LocalCluster | None,
        resize_at: Sequence[tuple[int, int]],
        kill_at: Sequence[tuple[int, int]],
    ) -> None:
        """Keeps the plan.

        Raises:
            UsageError: If there are faults but no embedded cluster to act on.
        """
        faults = [PlannedFault(step, "resize", nodes) for step, nodes in resize_at]
        faults += [PlannedFault(step, "kill", rank) for step, rank in kill_at]
        if faults and cluster is None:
            raise UsageError(
                "faults on request act on the embedded cluster only",
                given=str(faults[0]),
                change="leave --address away",
            )
        self._cluster = cluster
        self._pending = sorted(faults)
        self.fired: list[PlannedFault] = []

    @property
    def pending(self) -> tuple[PlannedFault, ...]:
        """Faults that have not happened yet."""
        return tuple(self._pending)

    @property
    def next_step(self) -> int | None:
        """The step of the next fault."""
        return self._pending[0].step if self._pending else None

    def fire_due(
        self, step: int, pids: Mapping[int, int], tell: Callable[[Mapping[str, Any]], None]
    ) -> bool:
        """Carries out what is due at `step`; every fault that happened is told as an event.

        A kill waits until the rank has a process; a resize waits for nothing.

        Returns:
            Whether nodes have come.
        """
        grown = False
        while self._pending and self._pending[0].step <= step:
            fault = self._pending[0]
            if fault.kind == "kill" and fault.value not in pids:
                return grown
            reason, added = self._fire(fault, pids)
            grown = grown or added
            self._pending.pop(0)
            self.fired.append(fault)
            tell(event_row("fault", step, reason=reason, asked_at_step=fault.step))
        return grown

    def _fire(self, fault: PlannedFault, pids: Mapping[int, int]) -> tuple[str, bool]:
        assert self._cluster is not None
        if fault.kind == "kill":
            self._cluster.kill_worker(pids[fault.value])
            return f"killed the worker process of rank {fault.value}", False
        before = len(self._cluster.nodes)
        while len(self._cluster.nodes) > fault.value:
            self._cluster.remove_node(self._cluster.nodes[-1])
        while len(self._cluster.nodes) < fault.value:
            self._cluster.add_node()
        after = len(self._cluster.nodes)
        verb = "took away" if after < before else "added"
        number = abs(after - before)
        plural = "s" if number != 1 else ""
        return f"{verb} {number} node{plural} (now room for {workers(after)})", after > before
