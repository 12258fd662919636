"""The run coordinator without Ray: states, groups, rows, draining, downtime, redone steps."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cluster.run import event_record
from elastic_kfac.cluster.run.coordinator import RunCoordinator, RunView
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.progress import event_line
from elastic_kfac.cluster.run.states import TRANSITIONS, RunState, transition
from elastic_kfac.config import parse_config
from elastic_kfac.errors import RunError
from elastic_kfac.observability.metric_names import label
from elastic_kfac.runs.history import read_run
from elastic_kfac.state import recorder
from elastic_kfac.state.run_folder import METRICS, RunFolder

PIDS = {0: 10, 1: 11}
NODES = {0: "127.0.0.3", 1: "127.0.0.4"}


def _steps(*steps: int) -> list[Any]:
    return [
        message
        for step in steps
        for message in (
            ("step", {"step": step, "loss": 1.0}),
            ("metrics", {"step": step, "loss": 1.0}),
        )
    ]


def test_coordinator_node_lost_writes_failure_and_recovery_with_redone_steps(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1, 2, 3, 4))
        failing = asyncio.create_task(coordinator.group_failed({1: "ActorDied"}, ["node"]))
        await asyncio.sleep(0.05)
        # Rank 0 may still be saving what it has.
        assert not failing.done()
        await coordinator.rank_failed(1, RankError(0, "CommunicationError", "rank 0 lost a peer"))
        assert await failing is None
        await coordinator.group_started({0: 10}, {0: "127.0.0.3"})
        joined = await coordinator.join(0)
        assert joined == {"attempt": 2, "stop_reason": None}
        assert await coordinator.last_step() == 4
        await coordinator.record(2, [("rollback", {"step": 2, "lost_steps": 2}), *_steps(3, 4, 5)])

    asyncio.run(scenario())
    folder = RunFolder(tmp_path)
    start, failure, recovery = folder.events()
    assert (start["kind"], start["to_world_size"]) == ("start", 2)
    assert (failure["kind"], failure["step"], failure["reason"]) == ("failure", 4, "1 node lost")
    assert recovery["kind"] == "recovery"
    assert (recovery["from_world_size"], recovery["to_world_size"]) == (2, 1)
    assert (recovery["step"], recovery["steps_redone"]) == (4, 2)
    assert recovery["downtime_s"] >= 0.0
    # The row of the failure has said why, and only that one.
    assert recovery["reason"] is None
    assert "to_world_size" not in failure and "downtime_s" not in failure
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4, 5]


def test_coordinator_drain_wakes_every_rank_and_waits_for_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        waiting = [asyncio.create_task(coordinator.stop_reason(1)) for _ in PIDS]
        draining = asyncio.create_task(coordinator.drain("room for 3 workers", timeout_s=30.0))
        assert await asyncio.gather(*waiting) == ["room for 3 workers"] * 2
        await coordinator.rank_left(1, 0, {"status": "parked"})
        await asyncio.sleep(0.05)
        assert not draining.done()
        await coordinator.rank_left(1, 1, {"status": "parked"})
        assert await draining is False
        assert (await coordinator.view(0)).outcome is None

    asyncio.run(scenario())


def test_coordinator_drain_asked_before_the_first_step_is_a_change_of_its_own(
    tmp_path: Path,
) -> None:
    async def parked_after(coordinator: RunCoordinator, attempt: int, *steps: int) -> None:
        draining = asyncio.create_task(
            coordinator.drain("a node goes", timeout_s=30.0, notice_s=9.0)
        )
        await asyncio.sleep(0)
        await coordinator.record(attempt, _steps(*steps))
        await coordinator.rank_left(attempt, 0, {"status": "parked"})
        assert await draining is False

    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started({0: 10}, NODES)
        await parked_after(coordinator, 1, 1, 2)
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(2, _steps(3))
        await coordinator.group_failed({0: "ActorDied", 1: "ActorDied"}, ["node"])
        await coordinator.group_started({0: 12}, NODES)
        await parked_after(coordinator, 3, 4)
        await coordinator.group_started({0: 13}, NODES)
        # This group is over before it has stepped: the next one's change is the same.
        await parked_after(coordinator, 4)
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(5, _steps(5))

    asyncio.run(scenario())
    changes = [row for row in RunFolder(tmp_path).events() if "from_world_size" in row]
    assert [(r["kind"], r["from_world_size"], r.get("to_world_size")) for r in changes] == [
        ("start", 0, 1),
        ("resize", 1, 2),
        ("failure", 2, None),
        ("recovery", 2, 1),
        ("resize", 1, 2),
    ]
    handed_over = [row.get("hand_over_s") is not None for row in changes]
    assert handed_over == [False, True, False, False, True]


def test_coordinator_drain_of_a_finished_run_says_that_it_is_over(tmp_path: Path) -> None:
    async def scenario() -> bool:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        for rank in PIDS:
            await coordinator.rank_left(1, rank, {"status": "finished", "steps": 9})
        over = await coordinator.drain("room for 3 workers", timeout_s=30.0)
        assert (await coordinator.view(0)).outcome == {"status": "finished", "steps": 9}
        return over

    assert asyncio.run(scenario())


def test_coordinator_drain_does_not_wait_for_a_rank_that_failed(tmp_path: Path) -> None:
    async def scenario() -> bool:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        await coordinator.rank_failed(1, RankError(1, "ValueError", "ValueError: no"))
        return await coordinator.drain("room for 3 workers", timeout_s=3600.0)

    assert not asyncio.run(asyncio.wait_for(scenario(), 20.0))


def test_coordinator_stop_holds_for_later_groups_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.stop("SIGTERM")
        await coordinator.group_started(PIDS, NODES)
        assert (await coordinator.join(1))["stop_reason"] == "SIGTERM"
        assert await coordinator.stop_reason(1) == "SIGTERM"
        await coordinator.rank_left(1, 0, {"status": "parked", "steps": 5})
        assert (await coordinator.view(0)).outcome == {"status": "parked", "steps": 5}

    asyncio.run(scenario())


def test_coordinator_rows_of_a_replaced_group_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1))
        await coordinator.group_failed({}, [])
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(2))
        assert (await coordinator.view(0)).progress["step"] == 1
        assert await coordinator.stop_reason(1) is None

    asyncio.run(scenario())
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == [1]


def test_coordinator_reached_answers_at_the_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        reached = asyncio.create_task(coordinator.reached(3))
        await coordinator.record(1, _steps(1, 2))
        await asyncio.sleep(0.02)
        assert not reached.done()
        await coordinator.record(1, _steps(3))
        assert await asyncio.wait_for(reached, 10.0) == 3

    asyncio.run(scenario())


def test_coordinator_opened_on_an_earlier_run_continues_it(tmp_path: Path) -> None:
    RunFolder(tmp_path).append(METRICS, [{"step": 1}, {"step": 7}])

    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        assert await coordinator.last_step() == 7
        await coordinator.record(1, _steps(8))

    asyncio.run(scenario())
    (event,) = RunFolder(tmp_path).events()
    assert (event["kind"], event["step"], event["steps_redone"]) == ("continue", 7, 0)


def test_coordinator_view_sends_each_event_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.add_event({"kind": "fault", "step": 1})
        first = await coordinator.view(0)
        await coordinator.add_event({"kind": "fault", "step": 2})
        second = await coordinator.view(first.num_events)
        assert [row["step"] for row in first.events] == [1]
        assert [row["step"] for row in second.events] == [2]

    asyncio.run(scenario())


@pytest.mark.parametrize(("before", "after"), [*itertools.product(RunState, RunState)])
def test_transition_is_legal_or_raises(before: RunState, after: RunState) -> None:
    if after in {*TRANSITIONS[before], before, RunState.ENDED}:
        assert transition(before, after) is after
        return
    with pytest.raises(RunError, match=f"given: {before} -> {after}; allowed: "):
        transition(before, after)


def test_every_state_is_documented_reachable_and_exported() -> None:
    assert set(TRANSITIONS) == set(RunState)
    reachable = {RunState.STARTING, RunState.ENDED}.union(*TRANSITIONS.values())
    assert reachable == set(RunState)
    assert tuple(RunState) == label("state").values
    # The states that a closed or failed run must not come back from.
    assert TRANSITIONS[RunState.ENDED] == frozenset()
    assert RunState.RUNNING not in TRANSITIONS[RunState.WAITING]


def test_coordinator_passes_through_the_states_and_refuses_to_leave_the_last(
    tmp_path: Path,
) -> None:
    async def scenario() -> list[RunState]:
        coordinator = RunCoordinator(str(tmp_path))
        states = [(await coordinator.view(0)).state]

        async def note() -> None:
            states.append((await coordinator.view(0)).state)

        await coordinator.group_planned(2)
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1))
        await note()
        draining = asyncio.create_task(coordinator.drain("a node was added", timeout_s=30.0))
        await asyncio.sleep(0)
        await note()
        for rank in PIDS:
            await coordinator.rank_left(1, rank, {"status": "parked"})
        await draining
        await coordinator.group_planned(2)
        await note()
        await coordinator.group_started(PIDS, NODES)
        await coordinator.group_failed({0: "ActorDied", 1: "ActorDied"}, ["node"])
        await note()
        await coordinator.close()
        await note()
        with pytest.raises(RunError, match="illegal change of the run's state"):
            await coordinator.group_planned(2)
        return states

    assert asyncio.run(scenario()) == [
        "starting",
        "running",
        "draining",
        "starting",
        "waiting",
        "ended",
    ]


def _restored(step: int, world_size: int, way: str = "resize", lost: int = 0) -> list[Any]:
    """What rank 0 reports at the beginning of a world."""
    row = {"kind": "restored", "step": step, "world_size": world_size, "way": way}
    return [
        ("rollback", {"step": step, "lost_steps": lost}),
        ("event", {**row, "moved_bytes": 4096 if way == "resize" else 0}),
    ]


def test_coordinator_in_place_follows_the_worlds_of_one_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        assert await coordinator.supervisor_started() is None
        assert await coordinator.group_started(PIDS, NODES) == 1
        await coordinator.record(1, _steps(1, 2))
        assert await coordinator.members_lost({1: "ActorDied"}, [], 1) is None
        # Both worlds begin in the middle of a batch of rows.
        await coordinator.record(1, [*_steps(3), *_restored(2, 1, "restore", 1), *_steps(3)])
        await coordinator.world_formed(1, {0: 10, 1: 12}, {0: "a", 1: "n"})
        await coordinator.record(1, [*_restored(3, 2), *_steps(4)])
        view = await coordinator.view(0)
        assert (view.world_sizes, view.pids[1], view.state) == ([2, 1, 2], 12, "running")
        await coordinator.member_leaves("1 node being drained (n)", 30.0)
        await coordinator.record(1, [*_restored(4, 1), *_steps(5)])
        for slot in (0, 2):
            await coordinator.rank_left(1, slot, {"status": "finished", "steps": 5})
        assert (await coordinator.close()).outcome == {"status": "finished", "steps": 5}

    asyncio.run(scenario())
    rows = [row for row in RunFolder(tmp_path).events() if "from_world_size" in row]
    told = ("to_world_size", "steps_redone", "reason")
    assert [(r["kind"], *(r.get(name) for name in told)) for r in rows] == [
        ("start", 2, 0, "the run began"),
        ("failure", None, None, "worker process of rank 1 died"),
        ("recovery", 1, 1, None),
        ("resize", 2, 0, "a worker joined the others"),
        ("resize", 1, 0, "1 node being drained (n)"),
    ]
    lines = [str(event_line(row)).partition("; down")[0] for row in rows]
    assert lines == [
        "[step 0] training started on 2 workers",
        "[step 2] worker process of rank 1 died; the others continue",
        "[step 3] 2 -> 1 worker in place",
        "[step 3] 1 -> 2 workers in place: a worker joined the others",
        "[step 4] 2 -> 1 worker in place: 1 node being drained (n)",
    ]
    changes = [row for row in rows if "way" in row]
    [noticed] = [row for row in RunFolder(tmp_path).events() if row["kind"] == "preemption"]
    assert (noticed["step"], noticed["notice_s"]) == (4, 30.0)
    assert [row["hand_over_s"] is not None for row in changes] == [False, False, True]
    assert [(r["way"], r["moved_bytes"], r["in_place"]) for r in changes] == [
        ("restore", 0, True),
        ("resize", 4096, True),
        ("resize", 4096, True),
    ]
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_explained_after_the_run_was_stopped_was_in_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        await coordinator.supervisor_started()
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, [*_steps(1), *_restored(1, 1), *_steps(2)])
        # The survivor has ended by now, so that nobody is left.
        await coordinator.members_lost({1: "NodeDied"}, ["b"], 0)
        await coordinator.close()

    asyncio.run(scenario())
    rows = [row for row in RunFolder(tmp_path).events() if "from_world_size" in row]
    assert [(r["kind"], r["step"], r["reason"], r["in_place"]) for r in rows[1:]] == [
        ("failure", 1, "1 node lost", True),
        ("recovery", 1, None, True),
    ]


def test_survivors_that_step_before_the_supervisor_knows_of_a_loss_get_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_record, "EXPLAINED_S", 0.05)

    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        await coordinator.supervisor_started()
        await coordinator.group_started({**PIDS, 2: 12}, {**NODES, 2: "c"})
        await coordinator.record(1, [*_steps(1), *_restored(1, 2), *_steps(2)])
        assert await coordinator.members_lost({2: "ActorDied"}, [], 2) is None
        # Nobody ever tells why the next one was lost.
        await coordinator.record(1, [*_restored(2, 1), *_steps(3)])
        await asyncio.sleep(0.2)
        await coordinator.record(1, [*_restored(3, 2), *_steps(4)])
        await coordinator.close()

    asyncio.run(scenario())
    rows = [row for row in RunFolder(tmp_path).events() if "from_world_size" in row]
    assert [
        (r["kind"], r["from_world_size"], r.get("to_world_size"), r["step"], r["reason"])
        for r in rows
    ] == [
        ("start", 0, 3, 0, "the run began"),
        ("failure", 3, None, 1, "worker process of rank 2 died"),
        ("recovery", 3, 2, 1, None),
        ("recovery", 2, 1, 2, "a member of the world was lost"),
        ("resize", 1, 2, 3, "a worker joined the others"),
    ]


def test_the_wait_for_the_reason_of_one_loss_does_not_end_that_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = event_record.EventRecord(lambda row: None)

    def lose(step: int, explained_s: float) -> None:
        monkeypatch.setattr(event_record, "EXPLAINED_S", explained_s)
        record.add_change({"step": step, "reason": event_record.LOST}, may_wait=True)

    async def scenario() -> None:
        lose(1, 0.02)
        record.add_cause("failure", 1, "1 node lost")
        record.explain("1 node lost")
        lose(2, 3600)
        await asyncio.sleep(0.1)  # the wait for the first one is over
        assert record.unexplained is not None
        record.explain("worker process of rank 0 died")
        lose(3, 0.02)
        await asyncio.sleep(0.1)

    asyncio.run(scenario())
    assert [(row["step"], row["reason"]) for row in record.rows] == [
        (1, "1 node lost"),
        (1, None),
        (2, "worker process of rank 0 died"),
        (3, event_record.LOST),
    ]


def test_coordinator_of_an_attempt_without_members_begins_another_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        assert await coordinator.supervisor_started() is None
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1, 2))
        assert await coordinator.members_lost({0: "died", 1: "died"}, [], 0) is None
        await coordinator.attempt_over()
        assert (await coordinator.view(0)).state == "waiting"
        assert await coordinator.group_started({0: 20}, {0: "b"}) == 2
        await coordinator.record(2, [*_restored(1, 1, "restore", 1), *_steps(2)])
        # The process that supervises is lost, and the members with it, whose store it held.
        await coordinator.rank_failed(
            2, RankError(0, "DistNetworkError", "DistNetworkError: reset")
        )
        assert await coordinator.supervisor_started() is None
        assert (await coordinator.view(0)).state == "waiting"

    asyncio.run(scenario())
    rows = [r for r in RunFolder(tmp_path).events() if r["kind"] in ("recovery", "failure")]
    assert [(r["kind"], r["reason"], bool(r.get("in_place"))) for r in rows] == [
        ("failure", "worker processes of rank 0, 1 died", False),
        ("recovery", None, False),
        ("failure", "the supervisor of the workers was lost", False),
    ]


def test_two_losses_before_the_next_step_are_two_causes_of_one_recovery(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        await coordinator.supervisor_started()
        await coordinator.group_started({**PIDS, 2: 12}, {**NODES, 2: "c"})
        await coordinator.record(1, _steps(1, 2))
        await coordinator.members_lost({2: "ActorDied"}, [], 2)
        await coordinator.record(1, _restored(2, 2))
        await coordinator.members_lost({1: "NodeDied"}, ["b"], 1)
        await coordinator.record(1, [*_restored(2, 1), *_steps(3)])
        # The same words again are another loss.
        await coordinator.members_lost({0: "NodeDied"}, ["a"], 0)
        await coordinator.attempt_over()
        await coordinator.group_started({0: 20}, {0: "d"})
        await coordinator.record(2, [*_restored(3, 1, "restore"), *_steps(4)])
        await coordinator.close()

    asyncio.run(scenario())
    folder = RunFolder(tmp_path)
    rows = [row for row in folder.events() if row["kind"] in ("recovery", "failure")]
    assert [(r["kind"], r["reason"], r["in_place"], r.get("to_world_size")) for r in rows] == [
        ("failure", "worker process of rank 2 died", True, None),
        ("failure", "1 node lost", True, None),
        ("recovery", None, True, 1),
        ("failure", "1 node lost", False, None),
        ("recovery", None, False, 1),
    ]
    folder.write_config(parse_config({}))
    assert [(row["kind"], row["reason"]) for row in read_run(folder.uri).changes] == [
        ("recovery", "worker process of rank 2 died; 1 node lost"),
        ("recovery", "1 node lost"),
    ]


def test_members_that_park_for_want_of_others_give_their_reason_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        await coordinator.supervisor_started()
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1, 2))
        await coordinator.park("2 nodes being drained (a, b)")
        await coordinator.attempt_over()
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(2, [*_restored(2, 2, "restore"), *_steps(3)])
        # A later change for the same reason that no event of its own announces.
        await coordinator.member_leaves("2 nodes being drained (a, b)")
        await coordinator.record(2, [*_restored(3, 1), *_steps(4)])
        await coordinator.close()

    asyncio.run(scenario())
    kinds = ("fallback", "failure", "recovery", "resize")
    rows = [row for row in RunFolder(tmp_path).events() if row["kind"] in kinds]
    assert [(row["kind"], row["reason"]) for row in rows] == [
        ("fallback", "2 nodes being drained (a, b)"),
        ("resize", None),
        ("resize", "2 nodes being drained (a, b)"),
    ]


def test_coordinator_ends_a_run_whose_supervisor_fails_again_and_again(tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        verdicts = []
        for _ in range(4):
            verdicts.append(await coordinator.supervisor_started())
            await coordinator.supervisor_failed(RankError(-1, "TypeError", "TypeError: no"))
        return verdicts

    *goes_on, verdict = asyncio.run(scenario())
    assert goes_on == [None] * 3
    assert verdict.line == "TypeError: no"


def test_coordinator_restart_that_is_retried_reports_the_bytes_of_its_last_attempt(
    tmp_path: Path,
) -> None:
    def restored(moved_bytes: int) -> Any:
        row = {"kind": "restored", "step": 2, "world_size": 2, "way": "restore"}
        return ("event", {**row, "moved_bytes": moved_bytes})

    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1, 2))
        await coordinator.group_failed({1: "ActorDied"}, [])
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(2, [restored(100)])
        await coordinator.group_failed({1: "ActorDied"}, [])
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(3, [restored(300), *_steps(3)])
        # A change that moves nothing does not inherit the bytes of the one before.
        await coordinator.group_failed({1: "ActorDied"}, [])
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(4, _steps(4))

    asyncio.run(scenario())
    rows = [row for row in RunFolder(tmp_path).events() if row["kind"] == "recovery"]
    assert [(row["way"], row["moved_bytes"]) for row in rows] == [("restore", 300), (None, None)]


def test_coordinator_whose_folder_cannot_be_written_says_so_and_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.05)
    run = tmp_path / "run"
    run.write_text("a file in the place of the folder")

    async def scenario() -> list[str]:
        coordinator = RunCoordinator(str(run))
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1, 2))
        await coordinator.record(1, [("rollback", {"step": 1, "lost_steps": 1}), *_steps(2, 3)])
        seen = [str(row["reason"]) for row in (await coordinator.view(0)).events]
        run.unlink()
        view = await coordinator.close()
        assert view.unwritten_rows == 0
        return [*seen, str(view.events[-1]["reason"])]

    *_, failing, working = asyncio.run(scenario())
    assert "cannot be written" in failing and "can be written again" in working
    folder = RunFolder(run)
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3]
    assert [row["kind"] for row in folder.events()] == [
        "start",
        "recovery",
        "warning",
        "warning",
    ]


def test_coordinator_of_a_resumed_run_writes_once_the_state_is_restored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(parse_config({"train": {"epochs": 1}}))
    folder.append(METRICS, [{"step": 7}])
    config = parse_config({"train": {"epochs": 2}})

    async def scenario(*messages: Any) -> bool:
        coordinator = RunCoordinator(str(tmp_path), config=config)
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, [("event", {"kind": "state_found", "source": "disk"})])
        assert folder.events() == [] and folder.read_config().train.epochs == 1
        await coordinator.record(1, messages)
        return (await coordinator.close()).is_accepted

    assert not asyncio.run(scenario())
    assert folder.events() == [] and folder.read_config().train.epochs == 1
    restored = {"kind": "restored", "step": 5, "world_size": 2, "way": "restore", "moved_bytes": 0}
    assert asyncio.run(scenario(("event", restored)))
    assert [row["kind"] for row in folder.events()] == ["state_found", "restored"]
    assert folder.read_config().train.epochs == 2


def test_coordinator_whose_clock_is_set_back_counts_no_negative_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time

    async def scenario() -> RunView:
        coordinator = RunCoordinator(str(tmp_path))
        first = await coordinator.wall_time()
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(1))
        await coordinator.group_failed({0: "ActorDied", 1: "ActorDied"}, ["node"])
        monkeypatch.setattr(time, "time", lambda: real() - 3600)
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(2, _steps(2))
        assert 0 <= first <= await coordinator.wall_time() < 60
        return await coordinator.close()

    view = asyncio.run(scenario())
    assert 0 <= view.worker_seconds < 120 and 0 <= view.in_state_s < 60
    (recovery,) = [row for row in RunFolder(tmp_path).events() if row["kind"] == "recovery"]
    assert 0 <= recovery["downtime_s"] < 60
    assert all(0 <= at < 60 for at in recovery["phases_s"].values())


def test_coordinator_of_a_continued_run_counts_only_time_in_which_it_existed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.append(METRICS, [{"step": 6, "wall_time_s": 12.0}, {"step": 7, "wall_time_s": 14.0}])
    folder.append_events([{"kind": "start", "time": time.time() - 7200}])

    async def scenario() -> None:
        coordinator = RunCoordinator(str(tmp_path))
        # Placing the first group is not counted, as at the run's first start.
        await asyncio.sleep(0.3)
        assert await coordinator.wall_time() == 14.0
        await asyncio.sleep(0.05)
        assert 14.05 <= await coordinator.wall_time() < 30.0
        await coordinator.group_started(PIDS, NODES)
        await coordinator.record(1, _steps(8))

    asyncio.run(scenario())
    event = folder.events()[-1]
    assert event["kind"] == "continue" and 7200 <= event["away_s"] < 7260
    assert event["reason"] == "the run was continued after 2 h 00 min"


def test_coordinator_tells_once_that_no_worker_can_join_and_lets_the_others_go_on(
    tmp_path: Path,
) -> None:
    async def scenario() -> list[Any]:
        coordinator = RunCoordinator(str(tmp_path), in_place=True)
        await coordinator.supervisor_started()
        await coordinator.group_started(PIDS, NODES)
        verdicts = []
        for step in range(1, 6):
            # The others step on, which is no sign that newcomers can.
            await coordinator.record(1, _steps(step))
            await coordinator.rank_failed(1, RankError(0, "ValueError", "ValueError: a defect"))
            verdicts.append(await coordinator.newcomer_lost("RayTaskError: a defect", 2))
        await coordinator.newcomer_stays()
        verdicts.append(await coordinator.newcomer_lost("RayTaskError: another", 2))
        # What newcomers reported is no reason to end the run when a member is lost.
        assert await coordinator.members_lost({1: "ActorDied"}, [], 1) is None
        await coordinator.close()
        return verdicts

    *first, third, fourth, fifth, after = asyncio.run(scenario())
    assert first == [None, None] and after is None
    assert {error.line for error in (third, fourth, fifth)} == {"ValueError: a defect"}
    events = RunFolder(tmp_path).events()
    assert [row["reason"] for row in events if row["kind"] == "warning"] == [
        "no worker can join (ValueError: a defect); the run goes on with 2"
    ]
    assert [row["reason"] for row in events if row["kind"] == "failure"] == [
        "worker process of rank 1 died"
    ]
