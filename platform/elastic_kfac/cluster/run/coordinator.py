"""The run coordinator: one actor that outlives every worker group and keeps the record of the run.

It sits beside the driver. Rank 0 sends it rows (`reporting.py`), Ray Train's controller reports changes
of the group and asks it to drain, every rank waits in it for a reason to stop, and the driver polls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from elastic_kfac.cluster.run.crash_loop import CrashLoopBreaker, RankError
from elastic_kfac.cluster.run.event_record import LOST, EventRecord
from elastic_kfac.cluster.run.messages import Message
from elastic_kfac.cluster.run.states import Change, Group, RunState, transition
from elastic_kfac.observability.telemetry import RunTelemetry, TelemetryOptions
from elastic_kfac.runs.summary import duration
from elastic_kfac.state.recorder import Recorder
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import event_row

if TYPE_CHECKING:
    from elastic_kfac.cluster.run.replicas import Places
    from elastic_kfac.config import Config

MEMBER = "a member"
"""Source of the state after a change in place."""
JOINED = "a worker joined the others"

REPLICAS_INTERVAL_S = 5.0
"""Between two measurements of what the replica actors hold."""


@dataclass
class RunView:
    """The record of a run: the coordinator keeps it, and sends the driver snapshots of it."""

    state: RunState = RunState.STARTING
    reason: str = ""
    """Reason of the state."""
    in_state_s: float = 0.0
    """Time in this state."""
    attempt: int = 0
    world_size: int = 0
    pids: Mapping[int, int] = field(default_factory=dict)
    rank_nodes: Mapping[int, str] = field(default_factory=dict)
    """Ray's identifier of every rank's node."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """The newest row of a step."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """The newest metrics row of an evaluation."""
    events: Sequence[Mapping[str, Any]] = ()
    """Event rows after the ones the driver has seen."""
    num_events: int = 0
    outcome: Mapping[str, Any] | None = None
    """Result of the training function when the run ended."""
    error: RankError | None = None
    """Why the run has to end."""
    world_sizes: Sequence[int] = field(default_factory=list)
    worker_seconds: float = 0.0
    controller: Sequence[Any] = ()
    """A reference to Ray's handle of the controller, once there is one."""
    placement_group: Any = None
    """Ray's handle of the newest group's placement group."""
    is_accepted: bool = True
    """Whether the state of a run that is resumed was restored."""
    unwritten_rows: int = 0
    """Rows that the run's folder lacks at the end."""


class RunCoordinator:
    """The actor. Methods never block: waiting is done on events."""

    def __init__(
        self,
        run_uri: str,
        *,
        in_place: bool = False,
        breaker: CrashLoopBreaker | None = None,
        survivors_timeout_s: float = 3.0,
        telemetry: TelemetryOptions | None = None,
        config: Config | None = None,
    ) -> None:
        """Opens the run's folder.

        Args:
            in_place: Whether ranks are members of worlds that change while the others run on.
            breaker: Decides when a run that keeps failing has to end.
            survivors_timeout_s: How long survivors have to save their state after processes died.
            telemetry: Settings of the exporter; None exports nothing.
            config: Configuration of a run that is resumed: nothing is written before its state is
                restored. None writes at once.
        """
        self._telemetry = RunTelemetry(telemetry, _gauge)
        self._in_place = in_place
        self._survivors_timeout_s = survivors_timeout_s
        self._folder = RunFolder(run_uri)
        self._breaker = breaker or CrashLoopBreaker()
        self._newcomers = CrashLoopBreaker()
        self._given_up = ""
        self._recorder = Recorder(self._folder)
        self._events = EventRecord(self._keep_event)
        self._config = config
        if config is not None:
            self._recorder.hold()
        rows = self._folder.metrics()
        self._last_step = max((int(row.get("step", 0)) for row in rows), default=0)
        self._last_row_step = max((int(r["step"]) for r in rows if "loss" in r), default=0)
        self._continued = self._last_step > 0
        self._wall_time_s = max((float(row.get("wall_time_s") or 0) for row in rows), default=0.0)
        self._asked_at: float | None = None
        stamps = (float(row.get("time") or 0) for row in self._folder.events())
        self._left_at = max(stamps, default=0.0) if self._continued else 0.0
        self._wanted_workers = next(
            (r["wanted_workers"] for r in rows[:-9:-1] if "wanted_workers" in r), None
        )
        self._group: Group | None = None
        self._is_supervised = False
        self._change: Change | None = None
        self._stop_reason: str | None = None
        self._run = RunView()
        self._plan: Any = None
        self._steps_redone = 0
        self._state_since = self._last_step_time = time.monotonic()
        self._step_reached = asyncio.Condition()
        self._replicas: Places = {}
        self._replicas_measured_at = float("-inf")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder.uri.rpartition('/')[2]})"  # Ray shows it

    # ---- called by Ray Train's controller --------------------------------------------------

    async def controller_started(self, controller: Sequence[Any]) -> None:
        """Keeps a reference to the controller's handle for the driver."""
        self._run.controller = controller

    async def group_planned(self, world_size: int) -> None:
        """Ray has begun to place a group of this size."""
        self._mark("planned")
        self._enter(RunState.STARTING, f"{world_size} worker{'s' if world_size != 1 else ''}")

    async def group_started(self, pids: Mapping[int, int], nodes: Mapping[int, str]) -> int:
        """All processes of the next group are up; in place, those of its first world.

        Returns:
            The number of the attempt.
        """
        self._enter(RunState.STARTING, self._run.reason)
        self._mark("started")
        self._close_group()
        self._run.attempt += 1
        self._group = Group(self._run.attempt, len(pids), dict(pids), dict(nodes), time.monotonic())
        self._group.store_address = asyncio.get_running_loop().create_future()
        return self._run.attempt

    async def drain(self, reason: str, *, timeout_s: float, notice_s: float | None = None) -> bool:
        """Asks all ranks to stop at the same boundary and waits until they have exited.

        Args:
            notice_s: For a preemption, the time until the first node leaves.

        Returns:
            Whether the run is over instead.
        """
        group = self._group
        if group is None:
            return self._run.outcome is not None
        await self.park(reason, notice_s)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and "failed" not in group.ended.values():
            if group.has_left:
                break
            await asyncio.sleep(0.005)
        ends = set(group.ended.values()) if group.has_left else set()
        if ends == {"parked"}:
            self._change = self._change or group.next_change
            self._mark("parked")
        return ends == {"finished"}

    async def park(self, reason: str, notice_s: float | None = None) -> None:
        """Asks all ranks to save the state and stop at the same boundary; does not wait for it."""
        group = self._group
        if group is None:
            return
        self._begin_change("resize", reason)
        if notice_s is not None:
            self._note_preemption(reason, notice_s)
        self._enter(RunState.DRAINING, reason)
        group.drain_reason = reason
        group.changed.set()

    async def group_failed(
        self, errors: Mapping[int, str], lost_nodes: Sequence[str]
    ) -> RankError | None:
        """Notes a failure; returns why the run must end, or None to restart the group."""
        group = self._group
        silent = {rank for rank in (group.pids if group else {}) if rank in errors}
        died = sorted(silent - self._breaker.reported_ranks)
        if group is not None and died:
            await self._await_survivors(group, gone=set(died))
        self._run.error = self._breaker.judge(
            step=self._last_step, died=died, errors=errors, lost_nodes=len(lost_nodes)
        )
        reason = self._breaker.last_reason
        self._begin_change("failure", reason)
        self._record_failure(group.world_size if group else None, self._last_step)
        self._close_group()
        self._enter(RunState.WAITING, reason)
        return self._run.error

    async def has_stepped(self) -> bool:
        """Whether the group has committed a step."""
        return self._group is not None and self._group.stepped

    async def wanted_workers(self) -> int | None:
        """How many workers the batch keeps busy; None before the first step."""
        return self._wanted_workers

    # ---- called by the supervisor of members -------------------------------------------------

    async def supervisor_started(self, places: Any = None) -> RankError | None:
        """A supervisor begins; if one was lost, its members are, and the run may have to end.

        Args:
            places: Ray's handle of its placement group.
        """
        self._run.placement_group = places
        if not self._is_supervised:
            self._is_supervised = True
            self._enter(RunState.STARTING, "")
            return None
        # Members lose their store with it: what they report follows from that.
        for report in self._breaker.take_reports():
            if report.rank < 0:
                self._breaker.reported(report)
        return await self.group_failed({-1: "the supervisor of the workers was lost"}, [])

    async def supervisor_failed(self, error: RankError) -> None:
        """The supervisor raised; Ray Train starts it again."""
        self._breaker.reported(error)

    async def supervision(self) -> dict[str, Any]:
        """Why the run has to stop, if it has to, how many workers its batch keeps busy, and its step."""
        return {
            "stop_reason": self._stop_reason,
            "wanted_workers": self._wanted_workers,
            "step": self._last_step,
        }

    async def world_formed(
        self, attempt: int, pids: Mapping[int, int], nodes: Mapping[int, str]
    ) -> None:
        """The members have agreed on another world: the process and node of every rank."""
        group = self._group
        if group is not None and group.attempt == attempt:
            group.pids, group.nodes = dict(pids), dict(nodes)

    async def member_leaves(self, reason: str, notice_s: float | None = None) -> None:
        """A member has been asked to leave at the next boundary.

        Args:
            notice_s: Seconds until its node leaves; None if it stays, or was named already.
        """
        self._begin_change("resize", reason)
        if notice_s is not None:
            self._note_preemption(reason, notice_s)
        group, change = self._group, self._change
        change = group.next_change if group is not None and not group.stepped else change
        if change is not None:
            change.in_place, change.restored_from = True, MEMBER

    async def members_lost(
        self, errors: Mapping[int, str], lost_nodes: Sequence[str], left: int
    ) -> RankError | None:
        """These ranks are gone while `left` run on; returns why the run must end, or None."""
        error = self._judge(errors, lost_nodes)
        reason, group = self._breaker.last_reason, self._group
        if group is not None:
            before, step, in_place = group.world_size, self._last_step, left > 0
            if (row := self._events.unexplained) is not None:
                # As it was then: the run may have been stopped since.
                before, step, in_place = row["from_world_size"], row["step"], row["in_place"]
            elif self._change is not None and self._change.reason == LOST:
                self._change.reason = reason
            else:
                group.loss = reason
            self._record_failure(before, step, in_place=in_place)
            self._events.explain(reason)
        return error

    async def newcomer_lost(self, error: str, left: int) -> RankError | None:
        """A process ended before it took a step.

        Args:
            left: How many members run on.

        Returns:
            The cause, if the run must end, or with members left go on without newcomers; None to retry.
        """
        if not left:
            return self._judge({-1: error}, [])
        for reported in self._breaker.take_reports():
            self._newcomers.reported(reported)
        cause = self._newcomers.judge(step=0, died=[], errors={-1: error}, lost_nodes=0)
        if cause is not None and cause.line != self._given_up:
            self._given_up = cause.line
            reason = f"no worker can join ({cause.line}); the run goes on with {left}"
            self._events.add(event_row("warning", self._last_step, reason=reason))
        return cause

    async def newcomer_stays(self) -> None:
        """A newcomer steps with the others; what ended those before it counts no more."""
        self._newcomers, self._given_up = CrashLoopBreaker(), ""

    async def attempt_over(self) -> None:
        """No member is left: the next attempt restores the newest state that was kept."""
        group = self._group
        if group is None:
            return
        if group.drain_reason is None:
            self._change = None if self._change is None or self._change.in_place else self._change
            self._begin_change("failure", self._breaker.last_reason)
        reason = group.drain_reason or self._breaker.last_reason
        if group.drain_reason is not None:
            # A failure has been recorded as such.
            self._events.add_cause("fallback", self._last_step, reason)
        self._close_group()
        self._enter(RunState.WAITING, reason)

    # ---- called by ranks -------------------------------------------------------------------

    async def join(self, rank: int, places: Any = None) -> dict[str, Any]:
        """Registers a rank whose training function begins; returns its place in the run."""
        self._mark("joined")
        self._run.placement_group = places
        group = self._group
        if group is None:
            raise RuntimeError(f"rank {rank} joined before its group was started")
        return {"attempt": group.attempt, "stop_reason": self._stop_reason_of(group)}

    async def last_step(self) -> int:
        """The newest committed step that was reported."""
        return self._last_step

    async def wall_time(self) -> float:
        """Time [s] in which the run existed: that of earlier calls, and since this was first asked."""
        now = time.monotonic()
        self._asked_at = now if self._asked_at is None else self._asked_at
        return self._wall_time_s + (now - self._asked_at)

    async def publish_store(self, host: str, port: int) -> None:
        """Address of rank 0's rendezvous store."""
        if self._group is not None and self._group.store_address is not None:
            self._group.store_address.set_result((host, port))

    async def store_address(self, attempt: int) -> tuple[str, int]:
        """Waits for rank 0's rendezvous store."""
        group = self._group
        if group is None or group.attempt != attempt or group.store_address is None:
            raise RuntimeError("this group has been replaced")
        return await asyncio.shield(group.store_address)

    async def stop_reason(self, attempt: int) -> str | None:
        """Returns when this group should drain (why) or is over (None)."""
        group = self._group
        while group is not None and group.attempt == attempt:
            reason = self._stop_reason_of(group)
            if reason is not None:
                return reason
            await group.changed.wait()
            group = self._group
        return None

    async def replica_places(self) -> Places:
        """The present replica actors."""
        return self._replicas

    async def record(self, attempt: int, messages: Sequence[Message]) -> None:
        """Rows of rank 0, in order; those of a group that was replaced are dropped."""
        group = self._group
        if group is None or group.attempt != attempt:
            return
        metrics: list[Mapping[str, Any]] = []
        for kind, row in messages:
            if kind == "metrics":
                if "loss" in row:
                    if int(row["step"]) <= self._last_row_step:
                        continue  # a survivor repeats what the lost rank 0 may not have sent
                    self._last_row_step = int(row["step"])
                metrics.append(row)
                self._telemetry.logged(row)
                if row.get("eval_loss") is not None:
                    self._run.evaluation = dict(row)
            elif kind == "event":
                self._record_rank_event(group, row)
            elif kind == "rollback":
                self._recorder.metrics(metrics)
                metrics = []
                if group.stepped:
                    self._begin_world(group)
                self._roll_back(int(row["step"]), int(row["lost_steps"]))
            elif kind == "measured":
                self._telemetry.measured(dict(row))
                self._measure_replicas()
            else:
                self._stepped(group, row)
        self._recorder.metrics(metrics)
        async with self._step_reached:
            self._step_reached.notify_all()

    async def rank_left(self, attempt: int, rank: int, outcome: Mapping[str, Any]) -> None:
        """A rank's training function returned."""
        group = self._group
        if group is None or group.attempt != attempt:
            return
        group.ended[rank] = str(outcome.get("status", ""))
        is_last = outcome.get("status") != "parked" or self._stop_reason is not None
        # In place, a process may never have been taken into the world.
        knows = "steps" in outcome and (rank == 0 or self._in_place)
        if is_last and (knows or (rank == 0 and self._run.outcome is None)):
            self._run.outcome = dict(outcome)

    async def rank_failed(self, attempt: int, error: RankError) -> None:
        """A rank's training function raised."""
        group = self._group
        if group is None or group.attempt != attempt:
            return
        group.ended[error.rank] = "failed"
        self._breaker.reported(error)
        self._telemetry.rank_failed(error.kind)

    # ---- called by the driver --------------------------------------------------------------

    async def view(self, seen_events: int) -> RunView:
        """A snapshot for the display, without the first `seen_events` events."""
        for line in self._recorder.news():
            self._events.add(event_row("warning", self._last_step, reason=line))
        group = self._group
        running = (time.monotonic() - group.began) * group.world_size if group is not None else 0.0
        return replace(
            self._run,
            in_state_s=time.monotonic() - self._state_since,
            world_size=group.world_size if group is not None else 0,
            pids=dict(group.pids) if group is not None else {},
            rank_nodes=dict(group.nodes) if group is not None else {},
            events=self._events.rows[seen_events:],
            num_events=len(self._events.rows),
            worker_seconds=self._run.worker_seconds + running,
            is_accepted=not self._recorder.is_held,
        )

    async def reached(self, step: int) -> int:
        """Waits until `step` is committed; returns the newest committed step."""
        async with self._step_reached:
            await self._step_reached.wait_for(lambda: self._run.progress.get("step", -1) >= step)
        return int(self._run.progress["step"])

    async def stop(self, reason: str) -> None:
        """Drains this group and every later one: the run ends with its state safe."""
        self._stop_reason = reason
        if self._group is not None:
            self._group.changed.set()

    async def restarts(self, reason: str) -> None:
        """Records why changes of the world restart all workers although the run asks for it in place."""
        self._events.add(event_row("restarts", self._last_step, reason=reason))

    async def set_replica_places(self, places: Places) -> None:
        """The replica actors from now on."""
        self._replicas = places

    async def add_event(self, row: Mapping[str, Any]) -> None:
        """Records an event that the driver caused."""
        self._events.add(row)

    async def close(self) -> RunView:
        """Ends the run's record and returns the last view."""
        self._close_group()
        self._enter(RunState.ENDED, "")
        self._run.unwritten_rows = await asyncio.to_thread(self._recorder.close)
        return await self.view(0)

    # ---- inside ----------------------------------------------------------------------------

    def _enter(self, state: RunState, reason: str) -> None:
        run = self._run
        if state is not run.state or reason != run.reason:
            run.state, run.reason = transition(run.state, state), reason
            self._state_since = time.monotonic()
            self._telemetry.state(state, reason)

    def _stop_reason_of(self, group: Group) -> str | None:
        return self._stop_reason or group.drain_reason

    def _judge(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> RankError | None:
        died = sorted(rank for rank in set(errors) - self._breaker.reported_ranks if rank >= 0)
        self._run.error = self._breaker.judge(
            step=self._last_step, died=died, errors=errors, lost_nodes=len(lost_nodes)
        )
        return self._run.error

    def _begin_change(self, kind: Literal["resize", "failure"], reason: str) -> None:
        change, group = self._change, self._group
        before = group.world_size if group is not None else 0
        if kind == "resize" and group is not None and not group.stepped:
            if group.next_change is None or group.next_change.reason != reason:
                group.next_change = Change(
                    kind, reason, before, marks={"noticed": time.monotonic()}
                )
            return
        if change is None:
            self._change = Change(kind, reason, before)
        elif kind == "failure":
            # A failure before the first new step is part of the same downtime.
            change.kind, change.reason = kind, reason
        self._mark("noticed")

    def _note_preemption(self, reason: str, notice_s: float) -> None:
        """The change that is under way began with the notice that a node leaves."""
        change = (self._group and self._group.next_change) or self._change
        assert change is not None
        change.mark("preemption")
        row = event_row("preemption", self._last_step, reason=reason, notice_s=round(notice_s, 3))
        self._events.add(row)

    def _begin_world(self, group: Group) -> None:
        """Survivors of this group have formed another world."""
        # The supervisor may have heard of the loss before the survivors stepped on.
        reason, group.loss = group.loss or LOST, ""
        self._change = self._change or Change(
            "failure", reason, group.world_size, restored_from=MEMBER, in_place=True
        )
        self._mark("noticed")
        group.stepped = False

    def _enter_world(self, group: Group, world_size: int) -> None:
        now = time.monotonic()
        self._run.worker_seconds += (now - group.began) * group.world_size
        group.began = now
        change = self._change
        if change is not None and change.in_place and world_size > group.world_size:
            change.kind, change.reason = "resize", JOINED
        group.world_size = world_size

    async def _await_survivors(self, group: Group, *, gone: set[int]) -> None:
        # Ray ends them as soon as the failure is handled; a rank reports after its state is safe.
        deadline = time.monotonic() + self._survivors_timeout_s
        waiting_for = set(group.pids) - gone
        while waiting_for - set(group.ended) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _mark(self, name: str) -> None:
        if self._change is not None:
            self._change.mark(name)

    def _roll_back(self, step: int, lost_steps: int) -> None:
        self._mark("restored")
        self._recorder.rewind(step)
        self._last_row_step = min(self._last_row_step, step)
        self._steps_redone += lost_steps
        if self._change is not None:
            self._change.steps_redone += lost_steps

    def _stepped(self, group: Group, row: Mapping[str, Any]) -> None:
        step, now = int(row["step"]), time.monotonic()
        self._accept()
        if not group.stepped:
            group.stepped = True
            self._first_step(group, now)
        self._run.progress = {**row, "world_size": group.world_size}
        self._last_step, self._last_step_time = step, now
        self._breaker.stepped(step)
        self._wanted_workers = row.get("wanted_workers")
        self._telemetry.stepped(self._run.progress)

    def _first_step(self, group: Group, now: float) -> None:
        change, self._change = self._change, group.next_change
        group.next_change = None
        if self._run.state is not RunState.DRAINING:
            self._enter(RunState.RUNNING, "")
        if self._run.world_sizes[-1:] != [group.world_size]:
            self._run.world_sizes = [*self._run.world_sizes, group.world_size]
        if change is None:
            details: dict[str, Any] = {
                "kind": "start",
                "from_world_size": 0,
                "reason": "the run began",
                "downtime_s": 0.0,
                "steps_redone": self._steps_redone,
            }
            if self._continued:
                away_s = max(0.0, time.time() - self._left_at) if self._left_at else 0.0
                details |= {"kind": "continue", "away_s": round(away_s, 3)}
                details["reason"] = f"the run was continued after {duration(away_s)}"
        else:
            began = self._last_step_time
            details = {
                "kind": "recovery" if change.kind == "failure" else "resize",
                "from_world_size": change.from_world_size,
                "reason": change.reason,
                "downtime_s": round(now - began, 3),
                "steps_redone": change.steps_redone,
                "restored_from": change.restored_from,
                "hand_over_s": change.hand_over_s,
                "in_place": change.in_place,
                "way": change.way,
                "moved_bytes": change.moved_bytes,
                "phases_s": {name: round(at - began, 3) for name, at in change.marks.items()},
            }
        row = event_row(
            step=self._last_step, to_world_size=group.world_size, plan=self._plan, **details
        )
        # The survivors may be faster than the supervisor, who is about to tell why.
        self._events.add_change(row, may_wait=self._is_supervised)

    def _record_rank_event(self, group: Group, row: Mapping[str, Any]) -> None:
        self._plan = row.get("plan") or self._plan
        if row.get("kind") == "state_found" and self._change is not None:
            self._change.restored_from = str(row["source"])
        elif row.get("kind") == "restored":
            self._accept()
            self._enter_world(group, int(row["world_size"]))
            if self._change is not None:
                self._change.way, self._change.moved_bytes = row["way"], row["moved_bytes"]
        self._events.add({**row, "world_size": group.world_size})

    def _accept(self) -> None:
        if self._config is not None:
            self._recorder.accept(partial(self._folder.write_config, self._config))

    def _record_failure(self, before: int | None, step: int, *, in_place: bool = False) -> None:
        """Records what was lost and why; how the run went on is the row of the change that follows."""
        reason = self._breaker.last_reason
        self._events.add_cause("failure", step, reason, from_world_size=before, in_place=in_place)

    def _keep_event(self, row: Mapping[str, Any]) -> None:
        self._telemetry.event(row)
        self._recorder.events([row])

    def _measure_replicas(self) -> None:
        now = time.monotonic()
        if (
            self._telemetry.exports
            and self._replicas
            and now - self._replicas_measured_at >= REPLICAS_INTERVAL_S
        ):
            self._replicas_measured_at = now
            self._measuring = asyncio.create_task(self._sum_replicas(self._replicas))

    async def _sum_replicas(self, places: Places) -> None:
        # An actor that is gone is replaced by the driver; the next answer counts.
        with contextlib.suppress(Exception):
            answers = [actor.infos.remote(0) for actor in places.values()]
            held = await asyncio.wait_for(asyncio.gather(*answers), REPLICAS_INTERVAL_S)
            size = sum(info.num_bytes for infos in held for info in infos)
            self._telemetry.set("vault_bytes", size)

    def _close_group(self) -> None:
        group, self._group = self._group, None
        self._events.explain(LOST)
        if group is not None:
            self._change = self._change or group.next_change
            self._run.worker_seconds += (time.monotonic() - group.began) * group.world_size
            group.changed.set()
            if group.store_address is not None and not group.store_address.done():
                group.store_address.cancel()


def _gauge(*arguments: Any, **options: Any) -> Any:
    from ray.util.metrics import Gauge  # a run in this process has no Ray

    return Gauge(*arguments, **options)
