"""Runs that meet a fault, and go on: played case after case by one pool of processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from elastic_kfac.data.dataset import Datasets
from elastic_kfac.errors import ElasticKfacError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callbacks, KeepGoing, Point
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.membership import leave, regroup
from support.faults import (
    FaultKind,
    FaultPoint,
    Faults,
    FaultyDataset,
    Fired,
    InjectedFault,
    lift_quota,
)
from support.gloo import disband, wait_for
from support.held_resources import Held, held_at_rest
from support.reproducible_problems import reproducible_config
from support.training_problems import AtPoints, StopAt, memory_datasets

LETHAL: tuple[FaultKind, ...] = ("sigkill", "sigstop")
DAMAGE: tuple[FaultKind, ...] = (
    "corrupted_snapshot",
    "torn_checkpoint",
    "missing_checkpoint_file",
)


class StoreOfEveryStep(CheckpointStore):
    """Leaves out no snapshot because the one before is still being written."""

    def save_async(self, state: TrainingState) -> Future[bool] | None:
        future = super().save_async(state)
        self.wait()
        return future


# Steps 3, 6, 9 end epochs, 12 the run; factors are due in odd steps, decompositions in 1, 6 and 11.
PLACES: dict[str, tuple[FaultPoint, int]] = {
    "first step": ("step_begin", 1),
    "gradient exchange": ("backward_done", 4),
    "factor exchange": ("factor_exchange", 5),
    "gradients exchanged": ("gradients_exchanged", 8),
    "factor update": ("factor_update", 7),
    "decomposition": ("decomposition", 6),
    "preconditioned": ("preconditioned", 7),
    "snapshot": ("capture", 5),
    "manifest rename": ("manifest_rename", 4),
    "recovery": ("recovery", 0),
    "epoch boundary": ("evaluation", 6),
    "last step": ("step_begin", 12),
    "last commit": ("committed", 12),
    "last manifest": ("manifest_rename", 12),
}
"""Where a fault can happen: the point, and the step that is computed or was committed last."""

PHASES: dict[str, tuple[str, ...]] = {
    "start": ("first step", "recovery"),
    "step": (
        "gradient exchange",
        "factor exchange",
        "gradients exchanged",
        "factor update",
        "decomposition",
        "preconditioned",
    ),
    "save": ("snapshot", "manifest rename", "epoch boundary"),
    "end": ("last step", "last commit", "last manifest"),
}


@dataclass(frozen=True)
class Case:
    """The fault of one run, and whether its rank 0 or its last rank meets it."""

    kind: FaultKind
    place: str
    chief: bool = True

    @property
    def point(self) -> FaultPoint:
        return PLACES[self.place][0]

    @property
    def step(self) -> int:
        return PLACES[self.place][1]

    @property
    def phase(self) -> str:
        return next(phase for phase, places in PHASES.items() if self.place in places)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.place.replace(' ', '_')}-{'first' if self.chief else 'last'}"

    @property
    def kills(self) -> bool:
        """Whether a process dies of it; damage is noticed only by those who read after a death."""
        return self.kind in LETHAL or (self.kind in DAMAGE and self.point != "recovery")

    @property
    def survives(self) -> bool:
        """Whether the world that meets the fault finishes the run all the same."""
        return (
            self.kind == "slow_disk"
            or (self.kind in DAMAGE and not self.kills)
            # A snapshot that could not be written is a warning, for there will be another one.
            or (self.kind == "exception" and self.place == "manifest rename")
        )

    @property
    def is_possible(self) -> bool:
        """Whether there is such a fault at all."""
        by_rank_zero_alone = self.kind in ("disk_full", "slow_disk") or (
            self.point == "manifest_rename" or (self.kind in DAMAGE and self.point == "recovery")
        )
        nothing_to_damage = self.kind in DAMAGE and self.place == "first step"
        nothing_more_is_read = self.kind == "nan_batch" and self.place in (
            "last commit",
            "last manifest",
        )
        return not (nothing_to_damage or nothing_more_is_read) and (
            self.chief or not by_rank_zero_alone
        )


@dataclass
class Lived:
    """One world as one of its ranks saw it."""

    ending: str = ""
    steps: list[int] = field(default_factory=list)
    """Steps in the order in which they were committed."""
    said: list[str] = field(default_factory=list)
    """Warnings of its checkpoints."""
    held: Held | None = None
    """What the process holds after it."""


def play_world(
    folder: Path, case: Case | None, world: tuple[int, int, int, dist.Store], steps: int | None
) -> Lived:
    """One world; says how it ended."""
    generation, rank, world_size, _ = world
    lived = Lived()
    faults = Faults(rank, folder, on_fire=lambda fired: note(folder, fired))
    if case is not None:
        victim = 0 if case.chief else world_size - 1
        faults.fail_at(victim, case.step, case.point, case.kind)
        if case.kind in DAMAGE and case.kills:
            faults.fail_at(victim, case.step, case.point, "sigkill")

    def committed(point: Point, step: int) -> None:
        if point == "committed":
            lived.steps.append(step)

    datasets = memory_datasets()
    store = StoreOfEveryStep(folder, on_warning=lived.said.append)
    store.before_manifest = lambda step: faults.on_point("manifest_rename", step)
    # Only a timeout tells that a peer stands still.
    timeout_s = 6 if case is not None and case.kind == "sigstop" else 60
    try:
        outcome = run_rank(
            reproducible_config({"elastic.snapshot_interval_s": 1e-9}),
            regroup(*world, timeout_s=timeout_s),
            store=store,
            callback=Callbacks(AtPoints(committed), faults),
            control=KeepGoing() if steps is None else StopAt(steps),
            datasets=Datasets(FaultyDataset(datasets.train, faults), datasets.evaluation),
        )
        lived.ending = str(outcome.status)
    except (ElasticKfacError, InjectedFault, OSError) as error:
        lived.ending = type(error).__name__
    # Outside of the handler: its traceback holds on to the group, whose peers would wait for it.
    lift_quota()
    store.close()
    leave()
    lived.held = held_at_rest()
    return lived


def note(folder: Path, fired: Fired) -> None:
    """On disk, because the process may have no time for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fired.jsonl").open("a") as stream:
        stream.write(json.dumps(asdict(fired)) + "\n")


def play_cases(
    folder: str, cases: Sequence[Case], most: int
) -> tuple[dict[str, list[Lived]], list[int]]:
    """All cases with one pool of processes, in worlds of `most` ranks at most.

    Slots from 0 on stay alive. By case the worlds that this process was in, and all process ids.
    """
    processes = dist.get_world_size()
    alive = list(range(processes))
    slot = dist.get_rank()
    store = disband()
    store.set(f"pid/{slot}", str(os.getpid()))
    lives: dict[str, list[Lived]] = {case.name: [] for case in cases}
    generation = 0

    def play(case: Case | None, members: list[int], steps: int | None, name: str) -> None:
        nonlocal generation
        generation += 1
        if slot in members:
            world = (generation, members.index(slot), len(members), store)
            lived = play_world(Path(folder) / name, case, world, steps)
            lives[name].append(lived)
            store.set(f"done/{generation}/{slot}", lived.ending)

    def ending_of(members: list[int]) -> str:
        """How it ended for the first of them, once all are done."""
        wait_for(store, (f"done/{generation}/{member}" for member in members))
        return str(store.get(f"done/{generation}/{members[0]}").decode())

    for case in cases:
        staying = alive[: most - 1] if alive[-1] >= most - 1 else alive[:-1]
        # The one that shall die is the last slot, whatever its rank.
        order = [alive[-1], *staying] if case.chief else [*staying, alive[-1]]
        if case.point == "recovery":
            play(None, order, 5, case.name)
            ending_of(order)
        play(case, order, None, case.name)
        if case.kills:
            dead = alive.pop()
            order.remove(dead)
            # A stopped process holds its connections; those who wait for it time out.
            ending_of(order)
            if case.kind == "sigstop" and slot == 0:
                os.kill(int(store.get(f"pid/{dead}")), signal.SIGKILL)  # fenced off
        if ending_of(order) != "finished":
            play(None, order, None, case.name)
            ending_of(order)
        else:
            generation += 1
    return lives, [int(store.get(f"pid/{index}")) for index in range(processes)]
