"""States of a run, its worker group, and the change from one group to the next.

A *group* is what Ray Train starts together, one process per rank; its *attempt* is its number in the
run, from 1. The *world* is the set of ranks that step together. Without `elastic.in_place` it is the
whole group and lives as long; with it the members of an attempt come and go (`supervisor.py`), and
`training/membership.py` numbers their worlds by *generation*.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from elastic_kfac.errors import RunError


class RunState(enum.StrEnum):
    """State of a run, as the live line and the metric `run_state` show it."""

    STARTING = "starting"
    """Ray Train places or starts a group; no step has been committed in it."""
    RUNNING = "running"
    """The group commits steps; in place, also while lost ranks are being replaced."""
    DRAINING = "draining"
    """The ranks have been asked to save the state and exit, before a planned change."""
    WAITING = "waiting"
    """The group is gone after a failure; Ray Train looks for capacity for the next one."""
    ENDED = "ended"
    """The driver has closed the run."""


TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.STARTING: frozenset({RunState.RUNNING, RunState.DRAINING, RunState.WAITING}),
    RunState.RUNNING: frozenset({RunState.DRAINING, RunState.WAITING}),
    # A group that is still starting may be drained; its first steps do not make it run again.
    RunState.DRAINING: frozenset({RunState.STARTING, RunState.WAITING}),
    RunState.WAITING: frozenset({RunState.STARTING}),
    RunState.ENDED: frozenset(),
}
"""The states that may follow a state, besides itself and `ENDED`."""


def transition(before: RunState, after: RunState) -> RunState:
    """Returns `after`.

    Raises:
        RunError: If `after` cannot follow `before`.
    """
    if after is before or after in TRANSITIONS[before]:
        return after
    if after is RunState.ENDED:
        return after
    allowed = ", ".join(sorted({*TRANSITIONS[before], before, RunState.ENDED}))
    raise RunError(
        "illegal change of the run's state", given=f"{before} -> {after}", allowed=allowed
    )


@dataclass
class Change:
    """A change of the group or world that is under way; it ends with the first new step."""

    kind: Literal["resize", "failure"]
    reason: str
    from_world_size: int
    steps_redone: int = 0
    restored_from: str | None = None
    """Source of the state: a replica, the disk or a member."""
    in_place: bool = False
    """Whether the survivors kept their processes."""
    way: Literal["resize", "restore"] | None = None
    """Whether survivors kept their state or every rank restored one (`training/continuation.py`)."""
    moved_bytes: int | None = None
    """Tensors received over all ranks together; of the last attempt when a restart is retried."""
    marks: dict[str, float] = field(default_factory=dict)
    """When its phases were reached (monotonic clock of the coordinator)."""

    @property
    def hand_over_s(self) -> float | None:
        """From the notice that a node leaves until the state of all ranks was safe: on disk, or in place
        with the members that stay."""
        told = self.marks.get("preemption")
        safe = self.marks.get("restored" if self.in_place else "parked")
        return None if told is None or safe is None else round(safe - told, 3)

    def mark(self, name: str) -> None:
        """A phase was reached; when a restart is retried, the last time counts."""
        self.marks[name] = time.monotonic()


@dataclass
class Group:
    """One worker group, from its start to its end."""

    attempt: int
    world_size: int
    pids: dict[int, int]
    nodes: dict[int, str]
    began: float
    """Start of the present world (monotonic clock of the coordinator)."""
    ended: dict[int, str] = field(default_factory=dict)
    """How each rank left the training function: a status, or `failed`."""
    loss: str = ""
    """In place, why a member is gone, until the others step on."""
    drain_reason: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when ranks have to look at the stop reason, or when the group is over."""
    store_address: asyncio.Future[tuple[str, int]] | None = None
    stepped: bool = False
    """Whether the present world has committed a step."""
    next_change: Change | None = None
    """A resize that was decided before this group's first step; it begins after that."""

    @property
    def has_left(self) -> bool:
        """Whether the training function of every rank that is there has returned."""
        return set(self.ended) >= set(self.pids)
