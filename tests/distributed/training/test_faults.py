"""Faults of every kind at every moment: they fire, and the run ends with the bits of one that saw none.

A pool of processes plays case after case: a world of all that are alive meets the fault, and those that
are left go on from the newest durable checkpoint that verifies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from elastic_kfac.training.audit import audit_rows
from elastic_kfac.training.checkpoint import CheckpointStore
from elastic_kfac.training.moments import FaultKind, Fired, Moment
from support.fault_cases import DAMAGE, Case, kills, play_cases
from support.gloo import run_ranks
from support.reproducible_problems import final_sha256, play_schedules
from support.training_problems import FeedOrder

# Steps 3, 6, 9 end epochs; factors are due in odd steps, decompositions in steps 1, 6 and 11.
SELECTED: dict[str, list[Case]] = {
    "killed": [
        Case("sigkill", "step_begin", 1, chief=False),
        Case("sigkill", "factor_exchange", 5),
        Case("sigkill", "manifest_rename", 4),
        Case("sigstop", "decomposition", 6, chief=False),
    ],
    "killed-late": [
        Case("sigkill", "committed", 12, chief=False),
        Case("corrupted_snapshot", "evaluation", 6),
        Case("torn_checkpoint", "capture", 8),
        Case("sigstop", "backward_done", 7),
    ],
    "living": [
        Case("exception", "decomposition", 6),
        Case("nan_batch", "step_begin", 8, chief=False),
        Case("missing_checkpoint_file", "recovery", 0),
        Case("disk_full", "capture", 9),
        Case("slow_disk", "manifest_rename", 3),
    ],
}

AT: dict[Moment, int] = {
    "step_begin": 4,
    "backward_done": 4,
    "factor_exchange": 5,
    "gradients_exchanged": 4,
    "decomposition": 6,
    "preconditioned": 6,
    "committed": 12,
    "evaluation": 6,
    "capture": 5,
    "recovery": 0,
}


def check(folder: Path, processes: int, cases: list[Case]) -> None:
    """Plays the cases and one run without any fault."""
    dead = [processes - 1 - index for index in range(sum(map(kills, cases)))]
    schedules: dict[str, Any] = {"alone": ({}, [(1, None)])}
    run_ranks(1, play_schedules, str(folder), schedules)
    seen = run_ranks(processes, play_cases, str(folder), cases, expect_death=dead, timeout_s=240)
    expected = final_sha256(folder / "alone")
    for case in cases:
        lines = (folder / case.name / "fired.jsonl").read_text().splitlines()
        fired = [Fired(**json.loads(line)) for line in lines]
        assert Fired(case.kind, case.moment, case.step) in fired
        assert final_sha256(folder / case.name) == expected, case
        state = CheckpointStore(folder / case.name).load_latest()
        assert state is not None
        assert audit_rows(state.ledger.tail, FeedOrder()).passed, case
        assert state.ledger.tail["step"].tolist() == list(range(1, 13)), case
        ended = seen[0][case.name]
        survives = case.kind == "slow_disk" or (case.kind in DAMAGE and not kills(case))
        assert (ended == "finished") == survives, (case, ended)


@pytest.mark.parametrize("selection", list(SELECTED))
def test_run_after_a_fault_ends_with_the_bits_of_a_run_without(
    tmp_path: Path, selection: str
) -> None:
    check(tmp_path, 2 if selection == "living" else 5, SELECTED[selection])


def test_selection_covers_every_kind_of_fault() -> None:
    kinds = {case.kind for cases in SELECTED.values() for case in cases}
    assert kinds == set(get_args(FaultKind))


@pytest.mark.soak
@pytest.mark.parametrize("chief", [True, False], ids=["chief", "last"])
@pytest.mark.parametrize("kind", get_args(FaultKind))
def test_every_fault_at_every_moment(tmp_path: Path, kind: FaultKind, chief: bool) -> None:
    moments = [moment for moment in AT if chief or moment != "recovery" or kind not in DAMAGE]
    for index, moment in enumerate(moments):
        case = Case(kind, moment, AT[moment], chief)
        if kind in ("nan_batch", "disk_full") and moment != "step_begin":
            case = Case(kind, "step_begin", 1 + index, chief)
        if kind == "disk_full" and not chief:
            continue  # only rank 0 writes
        check(tmp_path / str(index), 2, [case])
