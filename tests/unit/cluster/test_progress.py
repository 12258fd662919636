"""The live line, lines about changes, and requested faults."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.faults import FaultPlan
from elastic_kfac.cluster.run.progress import ProgressLine, event_line, status_line
from elastic_kfac.cluster.run.states import RunState
from elastic_kfac.errors import UsageError

RUNNING = RunView(
    state=RunState.RUNNING,
    reason="",
    attempt=1,
    world_size=2,
    pids={0: 10, 1: 11},
    progress={"step": 120, "epoch": 2.5, "loss": 0.25, "accuracy": 0.875, "samples_per_s": 4321.0},
    evaluation={"eval_accuracy": 0.9721},
    events=(),
    num_events=0,
    outcome=None,
    error=None,
    world_sizes=(2,),
    worker_seconds=1.0,
    in_state_s=0.0,
)


def test_status_line_running_names_everything_a_watcher_wants() -> None:
    assert status_line(RUNNING) == (
        "step 120  epoch 2.50  loss 0.2500  accuracy 87.5%  test accuracy 97.21%  "
        "4,321 samples/s  2 workers"
    )


def test_status_line_without_workers_says_what_is_waited_for() -> None:
    line = status_line(replace(RUNNING, state=RunState.WAITING, world_size=0))
    assert "waiting for workers" in line
    assert "samples/s" not in line


def test_event_line_change_tells_why_how_long_and_what_was_redone() -> None:
    event = {
        "kind": "recovery",
        "step": 60,
        "from_world_size": 2,
        "to_world_size": 1,
        "reason": "1 node lost",
        "downtime_s": 4.25,
        "steps_redone": 3,
    }
    expected = "[step 60] 2 -> 1 worker: 1 node lost; down 4.2 s, 3 steps redone"
    assert event_line(event) == expected
    resized = {**event, "way": "resize", "moved_bytes": 3 * 2**19}
    assert event_line(resized) == f"{expected}, state kept, 1.5 MiB moved"
    assert event_line({"kind": "restored", "step": 60}) is None
    # The line of the failure before has said why.
    recovered = event_line({**event, "reason": None})
    assert recovered == "[step 60] 2 -> 1 worker; down 4.2 s, 3 steps redone"
    in_place = event_line({**event, "in_place": True})
    assert in_place == expected.replace("1 worker:", "1 worker in place:")
    restarts = {"kind": "restarts", "step": 0, "reason": "plan.decomposers=1 are in use"}
    assert event_line(restarts) == (
        "changes of the world restart all workers: plan.decomposers=1 are in use"
    )


def test_event_line_names_a_slow_rank_and_says_when_it_is_over() -> None:
    slow = {"kind": "slow_rank", "step": 30, "reason": "rank 1 on b takes 2.0 times as long"}
    assert event_line(slow) == "[step 30] warning: rank 1 on b takes 2.0 times as long"
    over = {"kind": "rank_recovered", "step": 70, "reason": "rank 1 on b is as fast"}
    assert event_line(over) == "[step 70] rank 1 on b is as fast"


def test_progress_line_without_terminal_is_throttled_but_tells_every_change() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, plain_interval_s=3600.0)
    for step in range(1, 50):
        line.update(replace(RUNNING, progress={"step": step}))
    event = {"kind": "failure", "step": 50, "reason": "1 node lost"}
    line.update(replace(RUNNING, events=(event,)))
    line.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1 ")
    assert lines[1].startswith("[step 50] 1 node lost")


class _Nodes:
    """Stands for an embedded cluster."""

    def __init__(self) -> None:
        self.nodes: tuple[int, ...] = (0, 1)
        self.killed: list[int] = []

    def remove_node(self, index: int) -> None:
        self.nodes = tuple(node for node in self.nodes if node != index)

    def add_node(self) -> None:
        self.nodes = (*self.nodes, max(self.nodes) + 1)

    def kill_worker(self, pid: int) -> None:
        self.killed.append(pid)


def test_fault_plan_fires_in_order_and_only_when_due() -> None:
    cluster, recorded = _Nodes(), list[Mapping[str, Any]]()
    plan = FaultPlan(cluster, resize_at=[(20, 2), (10, 1)], kill_at=[(30, 1)])  # type: ignore[arg-type]

    assert (plan.next_step, plan.fire_due(9, {}, recorded.append), cluster.nodes) == (
        10,
        False,
        (0, 1),
    )
    assert (plan.fire_due(10, {}, recorded.append), cluster.nodes) == (False, (0,))
    assert (plan.fire_due(25, {}, recorded.append), cluster.nodes) == (True, (0, 1))
    # Rank 1 has no process yet: the kill waits for it.
    assert (plan.fire_due(30, {0: 5}, recorded.append), cluster.killed) == (False, [])
    assert (plan.fire_due(31, {0: 5, 1: 6}, recorded.append), cluster.killed) == (False, [6])
    assert plan.pending == ()
    assert [row["asked_at_step"] for row in recorded] == [10, 20, 30]


def test_fault_plan_without_embedded_cluster_is_refused() -> None:
    with pytest.raises(UsageError, match="embedded cluster only; given: --kill-at 5:0"):
        FaultPlan(None, resize_at=[], kill_at=[(5, 0)])
