"""A worker group, and the change that leads from one to the next, as the recorder keeps books of them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Change:
    """A change of the group that is under way; it ends with the first new step."""

    kind: Literal["resize", "failure"]
    reason: str
    from_world_size: int
    steps_redone: int = 0
    is_preemption: bool = False
    """Whether it began with the notice that a node will go."""
    restored_from: str | None = None
    """Where the state came from: a vault, the disk or a member."""
    in_place: bool = False
    """Whether the survivors kept their processes."""
    marks: dict[str, float] = field(default_factory=dict)
    """When its phases were reached (Unix time)."""

    @property
    def hand_over_s(self) -> float | None:
        """From the notice of a preemption until the state of all ranks was safe."""
        if not self.is_preemption or "parked" not in self.marks:
            return None
        return round(self.marks["parked"] - self.marks["noticed"], 3)

    def mark(self, name: str) -> None:
        """A phase was reached; the last time counts when a restart has to be tried again."""
        self.marks[name] = time.time()


@dataclass
class Group:
    """One worker group, from its start to its end."""

    attempt: int
    world_size: int
    pids: dict[int, int]
    nodes: dict[int, str]
    began: float
    ended: dict[int, str] = field(default_factory=dict)
    """How each rank left the training function: a status, or `failed`."""
    park_reason: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when ranks have to look at the stop reason, or when the group is over."""
    store_address: asyncio.Future[tuple[str, int]] | None = None
    stepped: bool = False
    next_change: Change | None = None
    """A resize that was decided before this group's first step; it begins after that."""
    away: set[int] = field(default_factory=set)
    """Ranks that are gone while the others step on."""

    @property
    def everybody_left(self) -> bool:
        """Whether the training function of every rank that is there has returned."""
        return set(self.ended) >= set(self.pids) - self.away
