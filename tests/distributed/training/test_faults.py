"""Faults of every kind at every moment: they fire, and the run ends with the bits of one that saw none.

A pool of processes plays case after case: a world meets the fault, and those that are left go on from
the newest durable checkpoint that verifies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise as neighbours
from pathlib import Path
from typing import Any, get_args

import pytest

from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Point
from support.fault_cases import DAMAGE, PHASES, PLACES, Case, Lived, play_cases
from support.faults import FaultKind, Fired
from support.gloo import run_ranks
from support.held_resources import is_alive, left_in_shared_memory
from support.reproducible_problems import final_sha256, play_schedules
from support.selection import pairwise
from support.training_problems import MemoryOrder

KINDS = get_args(FaultKind)
PRODUCT = [
    case
    for kind in KINDS
    for place in PLACES
    for chief in (True, False)
    if (case := Case(kind, place, chief)).is_possible
]
SELECTED = pairwise(
    PRODUCT,
    lambda case: {
        "chief": case.chief,
        "kills": case.kills,
        "kind": case.kind,
        "phase": case.phase,
        "place": case.place,
    },
    # Every kind in every phase, and at every place one that kills and one that does not.
    apart=[("kind", "place")],
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the final state of a run that sees no fault."""
    folder = tmp_path_factory.mktemp("alone")
    schedules: dict[str, Any] = {"alone": ({}, [(1, None)])}
    run_ranks(1, play_schedules, str(folder), schedules)
    return final_sha256(folder / "alone")


def play(folder: Path, cases: Sequence[Case], expected: str, *, most: int) -> None:
    """Plays the cases in worlds of `most` ranks at most, and looks at what they left behind."""
    killing = sum(case.kills for case in cases)
    processes = killing + 1 if killing else most
    dead = range(processes - killing, processes)
    results = run_ranks(
        processes, play_cases, str(folder), list(cases), most, expect_death=dead, timeout_s=280
    )
    lives, pids = results[0]
    for case in cases:
        check_run(folder / case.name, case, expected)
        check_steps(case, lives[case.name])
        if case.kind in DAMAGE and case.chief:
            # Rank 0 is the one that writes: nothing newer than what it damaged can appear.
            worlds = [life for result in results if result for life in result[0][case.name]]
            assert any("was skipped" in line for life in worlds for line in life.said), case
    check_nothing_leaks([life for case in cases for life in lives[case.name]])
    assert not any(is_alive(pid) for pid in pids)
    assert left_in_shared_memory(pids) == []


def check_run(folder: Path, case: Case, expected: str) -> None:
    """The fault fired, the final bits are right, and every sample was used exactly once."""
    fired = [
        Fired(**json.loads(line)) for line in (folder / "fired.jsonl").read_text().splitlines()
    ]
    assert fired[0] == Fired(case.kind, case.point, case.step)
    assert final_sha256(folder) == expected, case
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    assert audit_rows(state.ledger.tail, MemoryOrder()).passed, case
    assert state.ledger.tail["step"].tolist() == list(range(1, 13)), case


def check_steps(case: Case, lives: list[Lived]) -> None:
    """Each world counts up without a gap, and the next one goes on no later than where it ended."""
    before, faulty, *after = lives if case.point == "recovery" else [Lived(), *lives]
    assert (faulty.ending == "finished") == case.survives == (not after), (case, faulty.ending)
    worlds = [life.steps for life in (before, faulty, *after) if life.steps]
    assert worlds[0][0] == 1 and worlds[-1][-1] == 12, case
    for steps in worlds:
        assert steps == list(range(steps[0], steps[-1] + 1)), (case, steps)
    for earlier, later in neighbours(worlds):
        assert later[0] <= earlier[-1] + 1, (case, earlier, later)


def check_nothing_leaks(lives: list[Lived]) -> None:
    """A process that lives on holds no more after the last world than after the first ones."""
    assert lives[0].held is not None
    assert (lives[0].held.listening, lives[0].held.children) == (0, 0)
    for life in lives[1:]:
        assert life.held is not None
        assert life.held.more_than(lives[0].held) == {}


@pytest.mark.parametrize("part", range(3))
def test_selected_runs_end_with_the_bits_of_a_run_without_a_fault(
    tmp_path: Path, expected: str, part: int
) -> None:
    play(tmp_path, [case for case in SELECTED if not case.kills][part::3], expected, most=2)


@pytest.mark.parametrize("part", range(4))
def test_selected_kills_end_with_the_bits_of_a_run_without_a_fault(
    tmp_path: Path, expected: str, part: int
) -> None:
    play(tmp_path, [case for case in SELECTED if case.kills][part::4], expected, most=3)


def test_product_has_every_kind_point_and_phase() -> None:
    for cases in (PRODUCT, SELECTED):
        assert {case.kind for case in cases} == set(KINDS)
        assert {case.place for case in cases} == set(PLACES)
        assert {case.point for case in cases} == {*get_args(Point), "manifest_rename"}
        met = {(case.kind, case.phase) for case in cases}
        assert met == {(kind, phase) for kind in KINDS for phase in PHASES}
    assert len({case.name for case in PRODUCT}) == len(PRODUCT)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_moment(tmp_path: Path, expected: str, kind: FaultKind) -> None:
    cases = [case for case in PRODUCT if case.kind == kind]
    for index in range(0, len(cases), 8):
        play(tmp_path / str(index), cases[index : index + 8], expected, most=2)
