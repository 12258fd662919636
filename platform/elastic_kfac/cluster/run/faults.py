"""Requested faults: node losses, new nodes and kills on the embedded cluster, at given steps."""

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
    """A fault that is due once a step is committed."""

    step: int
    kind: str
    """`resize` or `kill`."""
    value: int
    """Target number of nodes, or the rank whose process is killed."""

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
        """Orders the faults.

        Raises:
            UsageError: If there are faults but no embedded cluster to act on.
        """
        faults = [PlannedFault(step, "resize", nodes) for step, nodes in resize_at]
        faults += [PlannedFault(step, "kill", rank) for step, rank in kill_at]
        if faults and cluster is None:
            raise UsageError(
                "requested faults act on the embedded cluster only",
                given=str(faults[0]),
                change="drop --address",
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
        self, step: int, pids: Mapping[int, int], record: Callable[[Mapping[str, Any]], None]
    ) -> bool:
        """Carries out the faults due at `step` and records each as an event.

        A kill waits until the rank has a process.

        Returns:
            Whether nodes were added.
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
            reason = f"--{fault.kind}-at: {reason}"
            record(event_row("fault", step, reason=reason, asked_at_step=fault.step))
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
        verb = "removed" if after < before else "added"
        number = abs(after - before)
        plural = "s" if number != 1 else ""
        return f"{verb} {number} node{plural} (capacity: {workers(after)})", after > before
