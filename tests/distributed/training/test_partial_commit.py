"""Survivors that disagree on the last step: the commit of one of them counts, and nothing is torn."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callbacks, KeepGoing, Point
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.membership import Membership
from support.faults import Faults
from support.gloo import disband, run_ranks
from support.training_problems import (
    KFAC,
    AtPoints,
    MemoryOrder,
    RecordingCallback,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
)

STEP = 6
NO_SNAPSHOTS = {"elastic.snapshot_interval_s": 3600.0}


def member(folder: str, torn: bool) -> tuple[list[int], list[int]]:
    """Slot 1 dies once it has committed; slot 0 has committed too, slot 2 lost the exchange."""
    slot = dist.get_rank()
    store = disband()
    membership = Membership(store, slot, settle_s=2, timeout_s=60)
    if slot == 0:
        Membership.found(store, (0, 1, 2))
    store.wait(["membership/generation"])
    steps: list[int] = []
    recorded = RecordingCallback()
    once: list[int] = []

    def at_point(point: Point, step: int) -> None:
        if point == "committed":
            steps.append(step)
        if step != STEP or once:
            return
        if slot == 2 and point == ("gradients_exchanged" if torn else "backward_done"):
            once.append(step)
            if not torn:
                return
            # The others have what they need of this rank and go on to commit.
            store.wait(["committed/0", "committed/1"])
            raise CommunicationError("the last part of the exchange did not arrive")
        if point == "committed" and slot in (0, 1):
            once.append(step)
            store.set(f"committed/{slot}", "yes")
            store.wait(["committed/0", "committed/1"])
            if slot == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    run_member(
        small_config({**KFAC, **NO_SNAPSHOTS}),
        membership,
        store=CheckpointStore(folder),
        callback=Callbacks(AtPoints(at_point), recorded),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    return steps, [lost for _, lost in recorded.rewinds]


@pytest.mark.parametrize("torn", [True, False], ids=["one_survivor_torn", "both_whole"])
def test_partial_commit_goes_on_from_the_survivor_that_committed(
    tmp_path: Path, torn: bool
) -> None:
    alone = in_one_process(tmp_path / "alone", KFAC)
    seen = run_ranks(3, member, str(tmp_path / "run"), torn, expect_death=(1,))
    state = CheckpointStore(tmp_path / "run").load_latest()
    assert state is not None
    report = audit_rows(state.ledger.tail, MemoryOrder())
    assert report.passed, report.line()
    assert states_differ_in(alone, state) == []
    assert state.ledger.world_sizes == (3, 2)
    # Without any snapshot in memory or on disk: the live state of slot 0 is the only one there is.
    committed, _ = seen[0]
    assert committed == list(range(1, 13))
    assert sorted({*committed[:STEP], *seen[2][0]}) == list(range(1, 13))
    assert STEP not in seen[2][0] or not torn


class Kept:
    """Where survivors leave their state."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def save_survivor(self, state: TrainingState, rows: Sequence[Mapping[str, Any]]) -> None:
        self.seen.append((state.progress.step, [row["step"] for row in rows]))


def lose_a_peer(folder: str, changes: dict[str, Any]) -> list[tuple[int, list[int]]]:
    communicator, kept, recorded = Communicator.world(), Kept(), RecordingCallback()
    faults = Faults(communicator.rank).fail_at(1, STEP, "backward_done")
    with pytest.raises(CommunicationError):
        run_rank(
            small_config({**changes, **NO_SNAPSHOTS}),
            communicator,
            store=CheckpointStore(folder),
            callback=Callbacks(faults, recorded),
            control=KeepGoing(),
            datasets=memory_datasets(),
            save_survivor=kept.save_survivor,
        )
    [costs] = [row for row in recorded.events if row["kind"] == "costs"]
    assert (costs["world_size"], costs["step"], costs["steps"]) == (2, STEP - 1, STEP - 2)
    return kept.seen


@pytest.mark.parametrize(
    ("changes", "left"),
    [(KFAC, [(STEP - 1, list(range(1, STEP)))]), ({"elastic.merge_every_steps": 2}, [])],
    ids=["whole", "steps-of-its-own"],
)
def test_survivor_leaves_its_last_committed_state_if_it_holds_all_of_it(
    tmp_path: Path, changes: dict[str, Any], left: list[tuple[int, list[int]]]
) -> None:
    seen = run_ranks(2, lose_a_peer, str(tmp_path), changes, expect_death=(1,))
    assert seen[0] == left
