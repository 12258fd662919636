"""Worlds that change while their processes live: kills, departures and newcomers over gloo."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from elastic_kfac.errors import CommunicationError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callbacks, KeepGoing, Point
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.membership import Membership, World, regroup
from support.faults import Faults
from support.gloo import disband, run_ranks
from support.reproducible_problems import REPRODUCIBLE, final_sha256, play_schedules
from support.training_problems import (
    KFAC,
    AtPoints,
    MemoryOrder,
    RecordingCallback,
    Script,
    Seen,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
)

# One kill in the middle of an update, and a departure followed by a newcomer.
REPRODUCIBLE_SCRIPTS: dict[str, Script] = {
    "kill": Script((0, 1, 2), REPRODUCIBLE, kills={1: (6, "decomposition")}),
    "kill-rank-0": Script((0, 1, 2), REPRODUCIBLE, kills={0: (7, "gradients_exchanged")}),
    "change": Script((0, 1), REPRODUCIBLE, leaves={1: 4}, joins={2: 8}),
}
EVERY_STEP = {"elastic.snapshot_interval_s": 1e-9}


class DiesBeforeTheRendezvous(Membership):
    """Of a process that dies once the plan counts on it; whoever supervises it says so."""

    def await_members(self, world: World) -> None:
        self.bury(self._groups, self._slot)
        os._exit(1)


def member(folder: str, script: Script, dying: int = -1) -> Seen:
    slot = dist.get_rank()
    store = disband()
    kind = DiesBeforeTheRendezvous if slot == dying else Membership
    membership = kind(store, slot, settle_s=2, timeout_s=60)
    if slot == min(script.founders):
        Membership.found(store, script.founders)
    store.wait(["membership/generation"])
    seen, faults, recorded = Seen(), Faults(slot), RecordingCallback()
    if slot in script.kills:
        faults.fail_at(slot, *script.kills[slot])

    def at_point(point: Point, step: int) -> None:
        if point == "committed":
            seen.steps.append(step)
            seen.times_s.append(time.monotonic())
            if step >= script.leaves.get(slot, 10**9):
                membership.leave_at_next_boundary()
            if slot == min(script.founders):
                store.set("reached", str(step))
                # The newcomer has asked before the next step begins: a test cannot be late.
                while list(script.joins.values()).count(step) and not membership.change_is_wanted():
                    time.sleep(0.002)

    if slot in script.joins:
        while not store.check(["reached"]) or int(store.get("reached")) < script.joins[slot]:
            time.sleep(0.005)
    seen.outcome = run_member(
        small_config({**EVERY_STEP, **script.changes}),
        membership,
        store=CheckpointStore(folder),
        callback=Callbacks(faults, AtPoints(at_point), recorded),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    seen.rewinds = recorded.rewinds
    seen.costs = [
        (row["world_size"], row["step"]) for row in recorded.events if row["kind"] == "costs"
    ]
    seen.ends = [row["kind"] for row in recorded.events if row["kind"] in ("parked", "finished")]
    seen.continued = [
        (row["world_size"], row["way"], row["moved_bytes"])
        for row in recorded.events
        if row["kind"] == "restored"
    ]
    return seen


def play(
    folder: Path, world_size: int, script: Script, dying: int = -1
) -> tuple[list[Seen], TrainingState]:
    seen = run_ranks(
        world_size,
        member,
        str(folder),
        script,
        dying,
        expect_death=(*script.kills, *([dying] if dying >= 0 else [])),
        timeout_s=200,
    )
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    report = audit_rows(state.ledger.tail, MemoryOrder())
    assert report.passed, report.line()
    return seen, state


def test_a_newcomer_plans_with_the_costs_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = {**KFAC, "kfac.grad_worker_frac": "auto", "plan.calibrate": True}
    alone = in_one_process(tmp_path / "alone", changes)
    _, state = play(tmp_path / "run", 3, Script((0, 1), changes, joins={2: 4}))
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (2, 3)


@pytest.mark.parametrize("changes", [{}, KFAC], ids=["sgd", "kfac"])
@pytest.mark.parametrize(
    "point", ["step_begin", "backward_done", "gradients_exchanged", "committed", "capture"]
)
def test_kill_of_one_of_three_survivors_go_on_and_end_as_one_process(
    tmp_path: Path, changes: dict[str, Any], point: Point
) -> None:
    alone = in_one_process(tmp_path / "alone", changes)
    script = Script((0, 1, 2), changes, kills={1: (6, point)})
    seen, state = play(tmp_path / "run", 3, script)
    assert seen[1] is None
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2)
    # The step of the kill is computed again at most once, and none is left out.
    for survivor in (seen[0], seen[2]):
        assert sorted(set(survivor.steps)) == list(range(1, 13))
        assert len(survivor.steps) <= 13


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("point", ["factor_exchange", "factor_update", "decomposition"])
def test_kill_within_a_kfac_update_redoes_no_committed_step(
    tmp_path: Path, point: Point, slot: int
) -> None:
    # Without a snapshot: what is not saved from the update itself would be computed from the start.
    changes = {**KFAC, "elastic.snapshot_interval_s": 1e9}
    alone = in_one_process(tmp_path / "alone", changes)
    # Factors and decompositions are both due in step 5; each rank decomposes some of them.
    script = Script((0, 1, 2), changes, kills={slot: (5, point)})
    seen, state = play(tmp_path / "run", 3, script)
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2)
    for survivor in seen:
        assert survivor is None or survivor.steps == list(range(1, 13))


@pytest.mark.parametrize(
    ("point", "interval_s"),
    # With a saved state of every step: without one, what was under way may have arrived or be lost.
    [(point, 1e-9) for point in ("step_begin", "factor_exchange", "factor_update", "committed")],
)
def test_kill_with_a_reduction_under_way_ends_as_one_process(
    tmp_path: Path, point: Point, interval_s: float
) -> None:
    changes = {
        **KFAC,
        "kfac.overlap_reduction": True,
        "kfac.factor_update_steps": 1,
        "elastic.snapshot_interval_s": interval_s,
    }
    alone = in_one_process(tmp_path / "alone", changes)
    seen, state = play(tmp_path / "run", 3, Script((0, 1, 2), changes, kills={1: (6, point)}))
    assert seen[1] is None
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2)


def test_survivors_without_a_saved_state_go_on_without_the_statistics_that_were_lost(
    tmp_path: Path,
) -> None:
    changes = {
        **KFAC,
        "kfac.overlap_reduction": True,
        "kfac.factor_update_steps": 1,
        "elastic.snapshot_interval_s": 1e9,
    }
    # The lost rank has taken step 6, but for its part of the reduction that ends it.
    script = Script((0, 1, 2), changes, kills={1: (6, "factor_exchange")})
    seen, state = play(tmp_path / "run", 3, script)
    assert state.ledger.world_sizes == (3, 2)
    for survivor in (seen[0], seen[2]):
        assert survivor is not None and survivor.steps == list(range(1, 13))
    layers = state.part("kfac")["layers"].values()
    assert {layer["factor_updates"] for layer in layers} == {11}


@pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")
@pytest.mark.parametrize(
    "variant",
    [{"kfac.method": "ekfac"}, {"kfac.max_factor_dim": 8, "kfac.factor_rank": 3}],
    ids=["ekfac", "low-rank"],
)
def test_survivor_continues_the_last_decomposition_where_the_new_one_was_lost(
    tmp_path: Path, variant: dict[str, Any]
) -> None:
    changes = {**KFAC, **variant, "elastic.snapshot_interval_s": 1e9}
    alone = in_one_process(tmp_path / "alone", changes)
    script = Script((0, 1, 2), changes, kills={1: (9, "decomposition")})
    seen, state = play(tmp_path / "run", 3, script)
    assert states_differ_in(alone, state) == []
    for survivor in seen:
        assert survivor is None or survivor.steps == list(range(1, 13))


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"kfac.grad_worker_frac": 0.34}, "restore"),
        ({"kfac.grad_worker_frac": 1.0}, "resize"),
    ],
    ids=["decompositions-kept-by-one", "by-all"],
)
def test_survivors_resize_unless_the_lost_rank_alone_kept_decompositions(
    tmp_path: Path, changes: dict[str, Any], way: str
) -> None:
    changes = {**KFAC, **changes}
    alone = in_one_process(tmp_path / "alone", changes)
    # Captured right before: what survivors hold in memory is at most one step old.
    script = Script((0, 1, 2), changes, kills={2: (7, "backward_done")})
    seen, state = play(tmp_path / "run", 3, script)
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2)
    ((world_size, used, moved),) = seen[0].continued
    assert (world_size, used) == (2, way)
    assert moved == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "sharded_kfac", "kfac.damping": 0.01},
        {"communication.wire_format": "int8", **KFAC},
        {**KFAC, "kfac.grad_worker_frac": 0.5},
    ],
    ids=["sharded", "compressed", "two-columns"],
)
def test_newcomer_receives_what_it_lacks_and_all_end_alike(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    script = Script((0, 1), changes, joins={2: 6})
    seen, state = play(tmp_path / "run", 3, script)
    assert state.ledger.world_sizes == (2, 3)
    ((world_size, way, moved),) = seen[0].continued
    assert (world_size, way) == (3, "resize")
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    assert 0 < moved <= size
    hashes = {one.outcome.state_sha256 for one in seen if one.outcome is not None}
    assert hashes == {state.sha256()}


def test_kill_of_rank_zero_another_rank_takes_over_and_saves(tmp_path: Path) -> None:
    alone = in_one_process(tmp_path / "alone", KFAC)
    script = Script((0, 1, 2), KFAC, kills={0: (7, "backward_done")})
    seen, state = play(tmp_path / "run", 3, script)
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2)
    # What the steps before and after the loss cost, each world once.
    assert [one.costs for one in seen if one] == [[(3, 6), (2, 12)], []]


def test_two_kills_leave_one_that_finishes_alone(tmp_path: Path) -> None:
    alone = in_one_process(tmp_path / "alone", {})
    kills: dict[int, tuple[int, Point]] = {
        0: (5, "step_begin"),
        2: (9, "gradients_exchanged"),
    }
    _, state = play(tmp_path / "run", 3, Script((0, 1, 2), kills=kills))
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2, 1)


@pytest.mark.parametrize("changes", [{}, KFAC], ids=["sgd", "kfac"])
def test_departure_and_newcomer_end_as_one_process_without_a_step_redone(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    alone = in_one_process(tmp_path / "alone", changes)
    script = Script((0, 1), changes, leaves={1: 4}, joins={2: 8})
    seen, state = play(tmp_path / "run", 3, script)
    assert states_differ_in(alone, state) == []
    # Pauses for a change are no ends: nobody reports that the run was parked.
    assert [one.ends for one in seen] == [["finished"], [], []]
    assert state.ledger.world_sizes == (2, 1, 2)
    assert seen[0].steps == list(range(1, 13))
    assert [lost for _, lost in seen[0].rewinds] == [0, 0]
    # Nothing travels to the one that stays alone; the newcomer alone receives the state.
    (_, shrunk, grown) = [(1, "", 0), *seen[0].continued]
    assert shrunk == (1, "resize", 0)
    assert grown == (2, "resize", sum(t.nbytes for t in state.tensors.values()))
    assert seen[1].outcome is not None and seen[1].outcome.status == "left"
    assert seen[1].steps == [1, 2, 3, 4, 5]
    outcomes = [seen[0].outcome, seen[2].outcome]
    assert {o.state_sha256 for o in outcomes if o is not None} == {state.sha256()}


@pytest.mark.parametrize("name", REPRODUCIBLE_SCRIPTS)
def test_reproducible_mode_in_place_ends_with_the_bits_of_one_process(
    tmp_path: Path, name: str
) -> None:
    # In a process of its own, which has one thread, as the ranks have.
    run_ranks(1, play_schedules, str(tmp_path), {"alone": ({}, [(1, None)])})
    seen, state = play(tmp_path / "run", 3, REPRODUCIBLE_SCRIPTS[name])
    assert state.sha256() == final_sha256(tmp_path / "alone")
    worlds = {"kill": (3, 2), "kill-rank-0": (3, 2), "change": (2, 1, 2)}
    assert state.ledger.world_sizes == worlds[name]
    assert {
        one.outcome.state_sha256
        for one in seen
        if one and one.outcome and one.outcome.status == "finished"
    } == {state.sha256()}


def test_newcomer_into_a_world_of_one_receives_the_state_of_a_peer_not_of_a_file(
    tmp_path: Path,
) -> None:
    script = Script((0,), KFAC, joins={1: 3})
    seen, state = play(tmp_path / "run", 2, script)
    assert state.ledger.world_sizes == (1, 2)
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    assert seen[0].continued == [(2, "resize", size)]
    # Asked after step 3 was committed, admitted at the boundary of step 4.
    assert seen[1].steps == list(range(5, 13))


def test_newcomer_that_dies_before_the_rendezvous_is_left_out_of_the_next_world(
    tmp_path: Path,
) -> None:
    # Its place is taken over by the next newcomer: nobody's group has been spoilt meanwhile.
    script = Script((0, 1), KFAC, joins={2: 3, 3: 7})
    seen, state = play(tmp_path / "run", 4, script, dying=2)
    assert state.ledger.world_sizes == (2, 3)
    assert seen[0].steps == seen[1].steps == list(range(1, 13))
    assert [size for size, _, _ in seen[0].continued] == [2, 3]


def joins_after_a_failure() -> float:
    rank, store = dist.get_rank(), disband()
    if rank == 0:
        with pytest.raises(CommunicationError, match="could not join generation 1"):
            regroup(1, 0, 2, store, connect_s=0.2)
        store.set("failed", "")
    store.wait(["failed"])
    communicator = regroup(2, rank, 2, store, connect_s=20.0)
    return sum(communicator.all_gather_object(1.0 + rank, tag="test"))


def test_process_joins_a_group_after_it_failed_to_join_another_one() -> None:
    assert run_ranks(2, joins_after_a_failure) == [3.0, 3.0]
