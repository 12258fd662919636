"""The recorder's books, without Ray: groups, rows, parking, downtime, redone steps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.recorder import RunRecorder
from elastic_kfac.state.run_folder import RunFolder

PIDS = {0: 10, 1: 11}
NODES = {0: "127.0.0.3", 1: "127.0.0.4"}


def _steps(*steps: int) -> list[Any]:
    return [
        message
        for step in steps
        for message in (
            ("progress", {"step": step, "loss": 1.0}),
            ("metrics", {"step": step, "loss": 1.0}),
        )
    ]


def test_recorder_node_lost_writes_failure_and_recovery_with_redone_steps(tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        await recorder.record(1, _steps(1, 2, 3, 4))
        failing = asyncio.create_task(recorder.group_failed({1: "ActorDied"}, ["node"]))
        await asyncio.sleep(0.05)
        # Rank 0 may still be saving what it has.
        assert not failing.done()
        await recorder.rank_failed(1, RankError(0, "CommunicationError", "rank 0 lost a peer"))
        assert await failing is None
        await recorder.group_started({0: 10}, {0: "127.0.0.3"})
        joined = await recorder.join(0)
        assert (joined["attempt"], joined["last_step"], joined["stop_reason"]) == (2, 4, None)
        await recorder.record(2, [("rewound", {"step": 2, "lost_steps": 2}), *_steps(3, 4, 5)])

    asyncio.run(scenario())
    folder = RunFolder(tmp_path)
    start, failure, recovery = folder.events()
    assert (start["kind"], start["to_world_size"]) == ("start", 2)
    assert (failure["kind"], failure["step"], failure["reason"]) == ("failure", 4, "1 node lost")
    assert recovery["kind"] == "recovery"
    assert (recovery["from_world_size"], recovery["to_world_size"]) == (2, 1)
    assert (recovery["step"], recovery["steps_redone"]) == (4, 2)
    assert recovery["downtime_s"] >= 0.0
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4, 5]


def test_recorder_park_wakes_every_rank_and_waits_for_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        waiting = [asyncio.create_task(recorder.stop_reason(1)) for _ in PIDS]
        parking = asyncio.create_task(recorder.park("room for 3 workers", timeout_s=30.0))
        assert await asyncio.gather(*waiting) == ["room for 3 workers"] * 2
        await recorder.rank_left(1, 0, {"status": "parked"})
        await asyncio.sleep(0.05)
        assert not parking.done()
        await recorder.rank_left(1, 1, {"status": "parked"})
        assert await parking is False
        assert (await recorder.view(0)).outcome is None

    asyncio.run(scenario())


def test_recorder_park_asked_before_the_first_step_is_a_change_of_its_own(tmp_path: Path) -> None:
    async def parked_after(recorder: RunRecorder, attempt: int, *steps: int) -> None:
        parking = asyncio.create_task(recorder.park("a node goes", timeout_s=30.0, notice_s=9.0))
        await asyncio.sleep(0)
        await recorder.record(attempt, _steps(*steps))
        await recorder.rank_left(attempt, 0, {"status": "parked"})
        assert await parking is False

    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started({0: 10}, NODES)
        await parked_after(recorder, 1, 1, 2)
        await recorder.group_started(PIDS, NODES)
        await recorder.record(2, _steps(3))
        await recorder.group_failed({0: "ActorDied", 1: "ActorDied"}, ["node"])
        await recorder.group_started({0: 12}, NODES)
        await parked_after(recorder, 3, 4)
        await recorder.group_started({0: 13}, NODES)
        # This group is over before it has stepped: the next one's change is the same.
        await parked_after(recorder, 4)
        await recorder.group_started(PIDS, NODES)
        await recorder.record(5, _steps(5))

    asyncio.run(scenario())
    changes = [row for row in RunFolder(tmp_path).events() if "to_world_size" in row]
    assert [(row["kind"], row["from_world_size"], row["to_world_size"]) for row in changes] == [
        ("start", 0, 1),
        ("resize", 1, 2),
        ("failure", 2, None),
        ("recovery", 2, 1),
        ("resize", 1, 2),
    ]
    handed_over = [row.get("hand_over_s") is not None for row in changes]
    assert handed_over == [False, True, False, False, True]


def test_recorder_park_of_a_finished_run_says_that_it_is_over(tmp_path: Path) -> None:
    async def scenario() -> bool:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        for rank in PIDS:
            await recorder.rank_left(1, rank, {"status": "finished", "steps": 9})
        over = await recorder.park("room for 3 workers", timeout_s=30.0)
        assert (await recorder.view(0)).outcome == {"status": "finished", "steps": 9}
        return over

    assert asyncio.run(scenario())


def test_recorder_park_does_not_wait_for_a_rank_that_failed(tmp_path: Path) -> None:
    async def scenario() -> bool:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        await recorder.rank_failed(1, RankError(1, "ValueError", "ValueError: no"))
        return await recorder.park("room for 3 workers", timeout_s=3600.0)

    assert not asyncio.run(asyncio.wait_for(scenario(), 20.0))


def test_recorder_stop_holds_for_later_groups_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.stop("SIGTERM")
        await recorder.group_started(PIDS, NODES)
        assert (await recorder.join(1))["stop_reason"] == "SIGTERM"
        assert await recorder.stop_reason(1) == "SIGTERM"
        await recorder.rank_left(1, 0, {"status": "parked", "steps": 5})
        assert (await recorder.view(0)).outcome == {"status": "parked", "steps": 5}

    asyncio.run(scenario())


def test_recorder_rows_of_a_replaced_group_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        await recorder.record(1, _steps(1))
        await recorder.group_started(PIDS, NODES)
        await recorder.record(1, _steps(2))
        assert (await recorder.view(0)).progress["step"] == 1
        assert await recorder.stop_reason(1) is None

    asyncio.run(scenario())
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == [1]


def test_recorder_reached_answers_at_the_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        reached = asyncio.create_task(recorder.reached(3))
        await recorder.record(1, _steps(1, 2))
        await asyncio.sleep(0.02)
        assert not reached.done()
        await recorder.record(1, _steps(3))
        assert await asyncio.wait_for(reached, 10.0) == 3

    asyncio.run(scenario())


def test_recorder_opened_on_an_earlier_run_continues_it(tmp_path: Path) -> None:
    RunFolder(tmp_path).append_metrics([{"step": 1}, {"step": 7}])

    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.group_started(PIDS, NODES)
        assert (await recorder.join(0))["last_step"] == 7
        await recorder.record(1, _steps(8))

    asyncio.run(scenario())
    (event,) = RunFolder(tmp_path).events()
    assert (event["kind"], event["step"], event["steps_redone"]) == ("continue", 7, 0)


def test_recorder_view_sends_each_event_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = RunRecorder(str(tmp_path))
        await recorder.add_event({"kind": "fault", "step": 1})
        first = await recorder.view(0)
        await recorder.add_event({"kind": "fault", "step": 2})
        second = await recorder.view(first.num_events)
        assert [row["step"] for row in first.events] == [1]
        assert [row["step"] for row in second.events] == [2]

    asyncio.run(scenario())
