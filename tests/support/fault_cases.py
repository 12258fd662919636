"""Runs that meet a fault, and go on: played case after case by one pool of processes."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from elastic_kfac.errors import ElasticKfacError
from elastic_kfac.training.checkpoint import CheckpointStore
from elastic_kfac.training.feeds import Feeds
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.moments import (
    FaultKind,
    Faults,
    FaultyFeed,
    Fired,
    InjectedFault,
    Moment,
    lift_quota,
)
from elastic_kfac.training.port import KeepGoing
from elastic_kfac.training.regroup import leave, regroup
from elastic_kfac.training.state import TrainingState
from support.gloo import disband
from support.reproducible_problems import reproducible_config
from support.training_problems import RecordingPort, StopAt, memory_feeds

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


@dataclass(frozen=True)
class Case:
    """The fault of one run, and whether its rank 0 or its last rank meets it."""

    kind: FaultKind
    moment: Moment
    step: int
    chief: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.moment}-{self.step}"


def kills(case: Case) -> bool:
    """Whether a process dies of it; damage is noticed only by those who read after a death."""
    return case.kind in LETHAL or (case.kind in DAMAGE and case.moment != "recovery")


def play_world(
    folder: Path, case: Case | None, world: tuple[int, int, int, dist.Store], steps: int | None
) -> str:
    """One world; says how it ended."""
    generation, rank, world_size, _ = world
    faults = Faults(rank, folder, on_fire=lambda fired: note(folder, fired))
    if case is not None:
        victim = 0 if case.chief else world_size - 1
        faults.fail_at(victim, case.step, case.moment, case.kind)
        if case.kind in DAMAGE and kills(case):
            faults.fail_at(victim, case.step, case.moment, "sigkill")
    feeds = memory_feeds()
    store = StoreOfEveryStep(folder)
    store.before_manifest = lambda step: faults("manifest_rename", step)
    timeout_s = 4 if case is not None and case.kind == "sigstop" else 20
    try:
        outcome = run_rank(
            reproducible_config({"elastic.snapshot_interval_s": 1e-9}),
            regroup(*world, timeout_s=timeout_s),
            store=store,
            port=RecordingPort(),
            control=KeepGoing() if steps is None else StopAt(steps),
            feeds=Feeds(FaultyFeed(feeds.train, faults), feeds.evaluation),
            moments=faults,
        )
        ending = str(outcome.status)
    except (ElasticKfacError, InjectedFault, OSError) as error:
        ending = type(error).__name__
    # Outside of the handler: its traceback holds on to the group, whose peers would wait for it.
    lift_quota()
    store.close()
    leave()
    return ending


def note(folder: Path, fired: Fired) -> None:
    """On disk, because the process may have no time for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fired.jsonl").open("a") as stream:
        stream.write(json.dumps(asdict(fired)) + "\n")


def play_cases(folder: str, cases: list[Case]) -> dict[str, str]:
    """All cases with one pool of processes; how their first worlds ended, as this process saw it."""
    alive = list(range(dist.get_world_size()))
    slot = dist.get_rank()
    store = disband()
    store.set(f"pid/{slot}", str(os.getpid()))
    endings: dict[str, str] = {}
    generation = 0

    def play(case: Case | None, members: list[int], steps: int | None, target: Path) -> str:
        nonlocal generation
        generation += 1
        ending = ""
        if slot in members:
            world = (generation, members.index(slot), len(members), store)
            ending = play_world(target, case, world, steps)
            store.set(f"done/{generation}/{slot}", "")
        return ending

    for case in cases:
        target = Path(folder) / case.name
        # The one that shall die is the last slot, whatever its rank: slots from 0 on stay alive.
        order = [alive[-1], *alive[:-1]] if case.chief else list(alive)
        if case.moment == "recovery":
            play(None, order, 5, target)
            store.wait([f"done/{generation}/{member}" for member in alive])
        endings[case.name] = play(case, order, None, target)
        if kills(case):
            dead = alive.pop()
            store.wait([f"done/{generation}/{member}" for member in alive])
            if case.kind == "sigstop" and slot == 0:
                os.kill(int(store.get(f"pid/{dead}")), signal.SIGKILL)  # fenced off
        store.wait([f"done/{generation}/{member}" for member in alive])
        if endings[case.name] != "finished":
            endings[f"{case.name}/after"] = play(None, alive, None, target)
            store.wait([f"done/{generation}/{member}" for member in alive])
        else:
            generation += 1
    return endings
