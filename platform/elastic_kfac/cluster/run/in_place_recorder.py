"""The recorder of a run whose ranks live through changes of their group."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.recorder import Message, RunRecorder
from elastic_kfac.cluster.run.world_change import Change, Group
from elastic_kfac.training.callbacks import event_row

LOST = "a member of the world was lost"
RETURNED = "a replacement joined the world"


class InPlaceRecorder(RunRecorder):
    """The actor. A group is one attempt of Ray Train; inside it the world shrinks and grows again."""

    async def group_started(self, pids: Mapping[int, int], nodes: Mapping[int, str]) -> None:
        """All processes of the next group are up; they are the founders of its first world."""
        await super().group_started(pids, nodes)
        self._joined: set[int] = set()
        self._founders = self._next_slot = len(pids)

    async def join(
        self, rank: int, pid: int = 0, node_id: str = "", places: Any = None
    ) -> dict[str, Any]:
        """What a process has to know when its training function begins."""
        joined = await super().join(rank, pid, node_id, places)
        assert self._group is not None
        slot = rank
        if rank in self._joined:
            # Another process in the place of one that was lost: a slot is not used again.
            slot, self._next_slot = self._next_slot, self._next_slot + 1
            self._group.pids[rank], self._group.nodes[rank] = pid, node_id
        over = self._is_over(self._group)
        self._joined.add(rank)
        self._group.away.discard(rank)
        return {**joined, "slot": slot, "founders": self._founders, "over": over}

    async def last_step(self) -> int:
        """The newest committed step that was reported."""
        return self._last_step

    async def record(self, attempt: int, messages: Sequence[Message]) -> None:
        """Rows of the present world's rank 0, in order; a rewind begins another world."""
        group = self._group
        if group is None or group.attempt != attempt:
            return
        begin = 0
        for index, (kind, row) in enumerate(messages):
            if kind == "rewound":
                await super().record(attempt, messages[begin:index])
                begin = index
                if group.stepped:
                    # The controller may have heard of the loss before the survivors stepped on.
                    reason = self._breaker.last_reason if group.away else LOST
                    self._change = self._change or Change(
                        "failure", reason, group.world_size, restored_from="a member", in_place=True
                    )
                    self._mark("noticed")
                    group.stepped = False
            elif kind == "event" and row.get("kind") == "restored":
                await super().record(attempt, messages[begin:index])
                begin = index
                self._enter_world(group, int(row["world_size"]))
        await super().record(attempt, messages[begin:])

    async def rank_left(self, attempt: int, rank: int, outcome: Mapping[str, Any]) -> None:
        """A rank's training function returned; every member knows how the run ended."""
        await super().rank_left(attempt, rank, outcome)
        group = self._group
        if group is None or group.attempt != attempt or "steps" not in outcome:
            return
        if outcome.get("status") != "parked" or self._stop_reason is not None:
            self._outcome = dict(outcome)

    async def rank_failed(self, attempt: int, error: RankError) -> None:
        """A rank's training function raised; Ray will replace its process."""
        await super().rank_failed(attempt, error)
        group = self._group
        if group is not None and group.attempt == attempt:
            group.ended.pop(error.rank, None)
            group.away.add(error.rank)

    async def members_lost(
        self, errors: Mapping[int, str], lost_nodes: Sequence[str]
    ) -> RankError | None:
        """Ranks are gone while others step on; returns why the run must end, or None."""
        group = self._group
        if group is None:
            return None
        silent = sorted(set(errors) - self._breaker.reported_ranks)
        group.away.update(rank for rank in errors if rank in group.pids)
        for rank in group.away:
            group.ended.pop(rank, None)
        self._error = self._breaker.judge(
            step=self._last_step, died=silent, errors=errors, lost_nodes=len(lost_nodes)
        )
        reason = self._breaker.last_reason
        if self._change is not None and self._change.reason == LOST:
            self._change.reason = reason
        self._record_event(
            event_row(
                "failure",
                self._last_step,
                from_world_size=len(group.pids),
                to_world_size=len(group.pids) - len(group.away),
                reason=reason,
                downtime_s=None,
                steps_redone=None,
                plan=None,
                in_place=True,
            )
        )
        return self._error

    async def is_over(self) -> bool:
        """Whether everybody who is there has left for good."""
        return self._group is not None and self._is_over(self._group)

    async def fall_back(self, reason: str, *, timeout_s: float) -> bool:
        """Parks the members for a restart; returns whether the run is over instead."""
        self._record_event(event_row("fallback", self._last_step, reason=reason))
        over = await self.park(reason, timeout_s=timeout_s)
        self._close_group()
        self._set_phase("waiting", reason)
        return over

    def _is_over(self, group: Group) -> bool:
        present = set(group.pids) - group.away
        return self._outcome is not None and bool(present) and set(group.ended) >= present

    def _enter_world(self, group: Group, world_size: int) -> None:
        now = time.time()
        self._worker_seconds += (now - group.began) * group.world_size
        group.began = now
        change = self._change
        if change is not None and change.in_place and world_size > group.world_size:
            change.kind, change.reason = "resize", RETURNED
        group.world_size = world_size
