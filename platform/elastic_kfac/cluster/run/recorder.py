"""What a run has done so far, kept by one actor that outlives every worker group.

The actor sits beside the driver. Rank 0 sends it rows, Ray Train's controller tells it about groups,
every rank learns from it that it should park, and the driver asks it what to show.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_kfac.cluster.run.crash_loop import CrashLoopBreaker, RankError
from elastic_kfac.cluster.run.telemetry import RunTelemetry, TelemetryOptions
from elastic_kfac.cluster.run.vault import VaultPlace
from elastic_kfac.cluster.run.world_change import Change, Group
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import event_row

Phase = Literal["starting", "running", "parking", "waiting", "ended"]
Message = tuple[Literal["metrics", "event", "progress", "rewound", "measured"], Mapping[str, Any]]
"""What rank 0 sends: a kind and a row."""


@dataclass(frozen=True)
class RunView:
    """What the driver sees of a run."""

    phase: Phase
    reason: str
    attempt: int
    world_size: int
    pids: Mapping[int, int]
    progress: Mapping[str, Any]
    """The newest progress row."""
    evaluation: Mapping[str, Any]
    """The newest metrics row of an evaluation."""
    events: Sequence[Mapping[str, Any]]
    """Event rows after the ones the driver has seen."""
    num_events: int
    outcome: Mapping[str, Any] | None
    """What rank 0 returned when the run ended."""
    error: RankError | None
    """Why the run has to end."""
    world_sizes: Sequence[int]
    resizes: int
    steps_redone: int
    worker_seconds: float
    phase_since: float
    rank_nodes: Mapping[int, str] = field(default_factory=dict)
    """Ray's identifier of every rank's node."""
    controller: Any = None
    """Ray's handle of the controller."""
    placement_group: Any = None
    """Ray's handle of the newest group's places."""


class RunRecorder:
    """The actor. Methods never block: waiting is done on events."""

    def __init__(
        self,
        run_uri: str,
        *,
        breaker: CrashLoopBreaker | None = None,
        survivors_timeout_s: float = 3.0,
        telemetry: TelemetryOptions | None = None,
    ) -> None:
        """Opens the run's folder.

        Args:
            run_uri: The run's folder.
            breaker: Decides when a run that keeps failing has to end.
            survivors_timeout_s: How long, after processes died, the others have to save their state.
            telemetry: What to export to Ray's metrics; None exports nothing.
        """
        self._telemetry = RunTelemetry(telemetry)
        self._survivors_timeout_s = survivors_timeout_s
        self._folder = RunFolder(run_uri)
        self._breaker = breaker or CrashLoopBreaker()
        rows = self._folder.metrics()
        self._last_step = max((int(row.get("step", 0)) for row in rows), default=0)
        self._last_row_step = max((int(r["step"]) for r in rows if "loss" in r), default=0)
        self._continued = self._last_step > 0
        self._wanted_workers = next(
            (r["wanted_workers"] for r in rows[:-9:-1] if "wanted_workers" in r), None
        )
        self._attempt = 0
        self._group: Group | None = None
        self._change: Change | None = None
        self._stop_reason: str | None = None
        self._progress: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {}
        self._events: list[dict[str, Any]] = []
        self._outcome: dict[str, Any] | None = None
        self._error: RankError | None = None
        self._plan: Any = None
        self._world_sizes: list[int] = []
        self._resizes = self._steps_redone = 0
        self._worker_seconds = 0.0
        self._phase: Phase = "starting"
        self._phase_since = self._last_step_time = time.time()
        self._reason = ""
        self._controller: Any = None
        self._placement_group: Any = None
        self._step_reached = asyncio.Condition()
        self._vaults: tuple[VaultPlace, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder.uri.rpartition('/')[2]})"  # Ray shows it

    # ---- the controller's side -------------------------------------------------------------

    async def controller_started(self, controller: Any) -> None:
        """Keeps the controller's handle for the driver."""
        self._controller = controller

    async def group_starts(self, world_size: int) -> None:
        """Ray has begun to place a group of this size."""
        self._mark("planned")
        self._set_phase("starting", f"{world_size} worker{'s' if world_size != 1 else ''}")

    async def group_started(self, pids: Mapping[int, int], nodes: Mapping[int, str]) -> None:
        """All processes of the next group are up."""
        self._mark("started")
        self._close_group()
        self._attempt += 1
        self._group = Group(self._attempt, len(pids), dict(pids), dict(nodes), time.time())
        self._group.store_address = asyncio.get_running_loop().create_future()

    async def park(self, reason: str, *, timeout_s: float, notice_s: float | None = None) -> bool:
        """Asks all ranks to stop at the same boundary; returns whether the run is over instead.

        `notice_s` is given for a preemption: what is left until the first node goes.
        """
        group = self._group
        if group is None:
            return self._outcome is not None
        self._begin_change("resize", reason)
        if notice_s is not None:
            change = group.next_change or self._change
            assert change is not None
            change.is_preemption = True
            self._record_event(
                event_row("preemption", self._last_step, reason=reason, notice_s=round(notice_s, 3))
            )
        self._set_phase("parking", reason)
        group.park_reason = reason
        group.changed.set()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and "failed" not in group.ended.values():
            if group.everybody_left:
                break
            await asyncio.sleep(0.005)
        ends = set(group.ended.values()) if group.everybody_left else set()
        if ends == {"parked"}:
            self._change = self._change or group.next_change
            self._mark("parked")
        return ends == {"finished"}

    async def group_failed(
        self, errors: Mapping[int, str], lost_nodes: Sequence[str]
    ) -> RankError | None:
        """Notes a failure; returns why the run must end, or None when another try is due."""
        group = self._group
        silent = {rank for rank in (group.pids if group else {}) if rank in errors}
        died = sorted(silent - self._breaker.reported_ranks)
        if group is not None and died:
            await self._hear_survivors(group, gone=set(died))
        verdict = self._breaker.judge(
            step=self._last_step, died=died, errors=errors, lost_nodes=len(lost_nodes)
        )
        reason = self._breaker.last_reason
        self._begin_change("failure", reason)
        self._record_event(
            event_row(
                "failure",
                self._last_step,
                from_world_size=group.world_size if group else None,
                to_world_size=None,
                reason=reason,
                downtime_s=None,
                steps_redone=None,
                plan=None,
            )
        )
        self._close_group()
        self._set_phase("waiting", reason)
        self._error = verdict
        return verdict

    # ---- the ranks' side -------------------------------------------------------------------

    async def join(
        self, rank: int, pid: int = 0, node_id: str = "", places: Any = None
    ) -> dict[str, Any]:
        """What a rank has to know when its training function begins."""
        self._mark("joined")
        self._placement_group = places
        if self._group is None:
            raise RuntimeError(f"rank {rank} joined a group that nobody announced")
        return {
            "attempt": self._group.attempt,
            "last_step": self._last_step,
            "stop_reason": self._stop_reason_of(self._group),
        }

    async def publish_store(self, host: str, port: int) -> None:
        """Rank 0 tells where its rendezvous store listens."""
        if self._group is not None and self._group.store_address is not None:
            self._group.store_address.set_result((host, port))

    async def store_address(self, attempt: int) -> tuple[str, int]:
        """Waits for rank 0's rendezvous store."""
        group = self._group
        if group is None or group.attempt != attempt or group.store_address is None:
            raise RuntimeError("this group has been replaced")
        return await asyncio.shield(group.store_address)

    async def stop_reason(self, attempt: int) -> str | None:
        """Returns when this group should park (why) or is over (None)."""
        group = self._group
        while group is not None and group.attempt == attempt:
            reason = self._stop_reason_of(group)
            if reason is not None:
                return reason
            await group.changed.wait()
            group = self._group
        return None

    async def vaults(self) -> tuple[VaultPlace, ...]:
        """Where copies of the state are kept."""
        return self._vaults

    async def wanted_workers(self) -> int | None:
        """How many workers the batch keeps busy; None before the first step."""
        return self._wanted_workers

    async def record(self, attempt: int, messages: Sequence[Message]) -> None:
        """Rows of rank 0, in order. Rows of a group that was replaced are too late."""
        group = self._group
        if group is None or group.attempt != attempt:
            return
        metrics = []
        for kind, row in messages:
            if kind == "metrics":
                if "loss" in row:
                    if int(row["step"]) <= self._last_row_step:
                        continue  # a survivor repeats what the lost rank 0 may not have sent
                    self._last_row_step = int(row["step"])
                metrics.append(row)
                self._telemetry.logged(row)
                if row.get("eval_accuracy") is not None:
                    self._evaluation = dict(row)
            elif kind == "event":
                self._plan = row.get("plan") or self._plan
                if row.get("kind") == "state_found" and self._change is not None:
                    self._change.restored_from = str(row["source"])
                self._record_event({**row, "world_size": group.world_size})
            elif kind == "rewound":
                self._folder.append_metrics(metrics)
                metrics = []
                self._rewind(int(row["step"]), int(row["lost_steps"]))
            elif kind == "measured":
                self._telemetry.measured(dict(row))
                self._telemetry.ask_vaults(self._vaults)
            else:
                self._stepped(group, row)
        self._folder.append_metrics(metrics)
        async with self._step_reached:
            self._step_reached.notify_all()

    async def rank_left(self, attempt: int, rank: int, outcome: Mapping[str, Any]) -> None:
        """A rank's training function returned."""
        group = self._group
        if group is None or group.attempt != attempt:
            return
        group.ended[rank] = str(outcome.get("status", ""))
        is_last = outcome.get("status") != "parked" or self._stop_reason is not None
        if rank == 0 and is_last:
            self._outcome = dict(outcome)

    async def rank_failed(self, attempt: int, error: RankError) -> None:
        """A rank's training function raised."""
        if self._group is not None and self._group.attempt == attempt:
            self._group.ended[error.rank] = "failed"
            self._breaker.reported(error)
            self._telemetry.rank_failed(error.kind)

    # ---- the driver's side -----------------------------------------------------------------

    async def view(self, seen_events: int) -> RunView:
        """A snapshot for the display; `seen_events` events are not sent again."""
        group = self._group
        running = (time.time() - group.began) * group.world_size if group is not None else 0.0
        return RunView(
            phase=self._phase,
            reason=self._reason,
            attempt=self._attempt,
            world_size=group.world_size if group is not None else 0,
            pids=dict(group.pids) if group is not None else {},
            progress=dict(self._progress),
            evaluation=dict(self._evaluation),
            events=list(self._events[seen_events:]),
            num_events=len(self._events),
            outcome=self._outcome,
            error=self._error,
            world_sizes=list(self._world_sizes),
            resizes=self._resizes,
            steps_redone=self._steps_redone,
            worker_seconds=self._worker_seconds + running,
            phase_since=self._phase_since,
            rank_nodes=dict(group.nodes) if group is not None else {},
            controller=self._controller,
            placement_group=self._placement_group,
        )

    async def reached(self, step: int) -> int:
        """Waits until `step` is committed; returns the newest committed step."""
        async with self._step_reached:
            await self._step_reached.wait_for(lambda: self._progress.get("step", -1) >= step)
        return int(self._progress["step"])

    async def stop(self, reason: str) -> None:
        """Parks this group and every later one: the run ends with its state safe."""
        self._stop_reason = reason
        if self._group is not None:
            self._group.changed.set()

    async def set_vaults(self, places: Sequence[VaultPlace]) -> None:
        """Tells where copies of the state are kept."""
        self._vaults = tuple(places)

    async def add_event(self, row: Mapping[str, Any]) -> None:
        """An event that the driver caused."""
        self._record_event(row)

    async def close(self) -> RunView:
        """Ends the books and returns the last view."""
        self._close_group()
        self._set_phase("ended", "")
        return await self.view(0)

    # ---- inside ----------------------------------------------------------------------------

    def _stop_reason_of(self, group: Group) -> str | None:
        return self._stop_reason or group.park_reason

    def _begin_change(self, kind: Literal["resize", "failure"], reason: str) -> None:
        change, group = self._change, self._group
        before = group.world_size if group is not None else 0
        if kind == "resize" and group is not None and not group.stepped:
            group.next_change = Change(kind, reason, before, marks={"noticed": time.time()})
            return
        if change is None:
            self._change = Change(kind, reason, before)
        elif kind == "failure":
            # A failure before the first new step is part of the same downtime.
            change.kind, change.reason = kind, reason
        self._mark("noticed")

    async def _hear_survivors(self, group: Group, *, gone: set[int]) -> None:
        # Ray ends them as soon as the failure is dealt with; a rank speaks after its state is safe.
        deadline = time.monotonic() + self._survivors_timeout_s
        while set(group.pids) - gone - set(group.ended) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _mark(self, name: str) -> None:
        if self._change is not None:
            self._change.mark(name)

    def _rewind(self, step: int, lost_steps: int) -> None:
        self._mark("restored")
        self._folder.rewind_metrics(step)
        self._last_row_step = min(self._last_row_step, step)
        self._steps_redone += lost_steps
        if self._change is not None:
            self._change.steps_redone += lost_steps

    def _stepped(self, group: Group, row: Mapping[str, Any]) -> None:
        step, now = int(row["step"]), time.time()
        if not group.stepped:
            group.stepped = True
            self._first_step(group, now)
        self._progress = {**row, "world_size": group.world_size}
        self._last_step, self._last_step_time = step, now
        self._breaker.stepped(step)
        self._wanted_workers = row.get("wanted_workers")
        self._telemetry.stepped(self._progress)

    def _first_step(self, group: Group, now: float) -> None:
        change, self._change = self._change, group.next_change
        group.next_change = None
        self._set_phase("running", "")
        if not self._world_sizes or self._world_sizes[-1] != group.world_size:
            self._world_sizes.append(group.world_size)
        common = {"to_world_size": group.world_size, "plan": self._plan}
        if change is None:
            kind = "continue" if self._continued else "start"
            self._record_event(
                event_row(
                    kind,
                    self._last_step,
                    from_world_size=0,
                    reason="the run was continued" if self._continued else "the run began",
                    downtime_s=0.0,
                    steps_redone=self._steps_redone,
                    **common,
                )
            )
            return
        if change.from_world_size != group.world_size:
            self._resizes += 1
        self._record_event(
            event_row(
                "recovery" if change.kind == "failure" else "resize",
                self._last_step,
                from_world_size=change.from_world_size,
                reason=change.reason,
                downtime_s=round(now - self._last_step_time, 3),
                steps_redone=change.steps_redone,
                restored_from=change.restored_from,
                hand_over_s=change.hand_over_s,
                in_place=change.in_place,
                phases_s={
                    name: round(moment - self._last_step_time, 3)
                    for name, moment in change.marks.items()
                },
                **common,
            )
        )

    def _record_event(self, row: Mapping[str, Any]) -> None:
        self._events.append(dict(row))
        self._telemetry.event(row)
        self._folder.append_events([row])

    def _close_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            self._change = self._change or group.next_change
            self._worker_seconds += (time.time() - group.began) * group.world_size
            group.changed.set()
            if group.store_address is not None and not group.store_address.done():
                group.store_address.cancel()

    def _set_phase(self, phase: Phase, reason: str) -> None:
        self._phase, self._reason, self._phase_since = phase, reason, time.time()
        self._telemetry.state(phase, reason)
