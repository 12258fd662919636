"""Divides the workers of a cluster among the trials of a search.

Ray Tune does not see the workers of a nested trainer, and two elastic runs can be promised the same
nodes. So trials do not look at the cluster but ask one actor per search. Shares never add up to more
than the cluster can carry; once no trial is left to start, free workers go to the running trials,
which grow by an ordinary planned resize.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from elastic_kfac.cluster.ray.nodes import room_for_workers


def shares(room: int, slots: int, live: Sequence[str], waiting: int) -> dict[str, int]:
    """Workers for every running trial; they never add up to more than `room`.

    Args:
        room: How many workers the cluster can carry.
        slots: How many trials may run at the same time.
    """
    # While others wait, a free place stays free for them: a resize costs more than it would win.
    parties = max(len(live), min(slots, len(live) + waiting), 1)
    each, rest = divmod(max(room, 0), parties)
    return {trial: each + (index < rest) for index, trial in enumerate(live)}


class ResourceBroker:
    """The actor: shares of workers, and the reason to stop."""

    def __init__(self, slots: int, per_worker: Mapping[str, float]) -> None:
        self._slots = slots
        self._per_worker = dict(per_worker)
        self._live: list[str] = []
        self._waiting = 0
        self._stop_reason: str | None = None
        self._room = 0
        self._counted = -1.0

    def enter(self, trial: str) -> str | None:
        """Registers a trial that starts to train; returns the reason to stop instead, if there is one."""
        if self._stop_reason is None and trial not in self._live:
            self._live.append(trial)
        return self._stop_reason

    def live(self) -> list[str]:
        """Trials that are training."""
        return list(self._live)

    def leave(self, trial: str) -> None:
        """Removes a trial that has stopped training."""
        if trial in self._live:
            self._live.remove(trial)

    def set_waiting(self, waiting: int) -> None:
        """Sets how many trials will still start."""
        self._waiting = waiting

    def share(self, trial: str) -> int:
        """How many workers a trial may have now."""
        return shares(self._present_room(), self._slots, self._live, self._waiting).get(trial, 0)

    def stop(self, reason: str) -> None:
        """Asks every trial to save its state and stop."""
        self._stop_reason = reason

    def stop_reason(self) -> str | None:
        """Why trials should stop, or None."""
        return self._stop_reason

    def _present_room(self) -> int:
        if time.monotonic() - self._counted > 0.5:
            self._room = room_for_workers(self._per_worker)
            self._counted = time.monotonic()
        return self._room


@dataclass(frozen=True)
class TrialShare:
    """How many workers a trial may use now; called in the controller of its run."""

    broker: Any
    """Handle of the `ResourceBroker`."""
    trial: str

    def __call__(self) -> int:
        try:
            return int(ray.get(self.broker.share.remote(self.trial), timeout=10))
        except ray.exceptions.RayError:
            # The search has ended; this trial is about to.
            return 0
