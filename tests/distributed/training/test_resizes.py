"""What a resize keeps, system by system: graceful 4→2→3→4 and a kill 4→3 against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from elastic_kfac.errors import CommunicationError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import KeepGoing, Point
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.regroup import leave, regroup
from support.faults import Faults
from support.gloo import disband, run_ranks, wait_for
from support.training_problems import (
    KFAC,
    MemoryOrder,
    StopAt,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
)

GRACEFUL: tuple[tuple[int, int | None], ...] = ((4, 3), (2, 3), (3, 3), (4, None))
"""Ranks, and after how many steps they park."""

OSAWA: dict[str, Any] = {
    "optimizer.name": "sharded_kfac",
    "kfac.damping": 0.01,
    "kfac.kl_clip": None,
    "kfac.method": "inverse",
}
# No BatchNorm, float64: equal to 1e-10.
EXACT: dict[str, dict[str, Any]] = {
    "sgd": {},
    "lars": {"optimizer.name": "lars", "optimizer.lr": 1.0},
    "lamb": {"optimizer.name": "lamb", "optimizer.lr": 0.01},
    "schedule": {"optimizer.lr_schedule": "cosine", "optimizer.warmup_epochs": 1},
    "kfac-eigen": KFAC,
    "kfac-eigen-memopt": {**KFAC, "kfac.grad_worker_frac": 1e-6},
    "kfac-inverse-hybrid": {**KFAC, "kfac.method": "inverse", "kfac.grad_worker_frac": 0.5},
    "kfac-stagger": {**KFAC, "kfac.stagger": True, "kfac.grad_worker_frac": 0.5},
    "osawa": OSAWA,
    "osawa-adaptive": {**OSAWA, "kfac.refresh": "adaptive"},
}
# Passes of another size round differently; what is kept must be the same on all ranks.
ALIKE: dict[str, dict[str, Any]] = {
    "batch-norm": {"model.name": "support.training_problems:batch_norm_cnn"},
    "loss-scaler": {
        "model.name": "support.reproducible_problems:dropout_net",
        "train.precision": "fp16",
    },
}
KILLED: dict[str, tuple[int, Point]] = {
    "sgd": (6, "gradients_exchanged"),
    "lamb": (6, "preconditioned"),
    "kfac-eigen": (7, "factor_exchange"),
    "kfac-eigen-memopt": (5, "decomposition"),
    "kfac-inverse-hybrid": (5, "preconditioned"),
    "osawa": (6, "gradients_exchanged"),
    "osawa-adaptive": (7, "preconditioned"),
}
"""The step that is never committed, and where in it a rank dies."""


def train(
    folder: str,
    changes: dict[str, Any],
    world: tuple[int, int, int, dist.Store],
    steps: int | None,
    faults: Faults,
) -> str | None:
    """The state's hash at the end of one world; None if a peer was lost."""
    try:
        outcome = run_rank(
            small_config(changes),
            regroup(*world, timeout_s=60),
            store=CheckpointStore(folder),
            callback=faults,
            control=KeepGoing() if steps is None else StopAt(steps),
            datasets=memory_datasets(),
        )
        sha256: str | None = outcome.state_sha256
    except CommunicationError:
        sha256 = None
    leave()
    return sha256


def resize_gracefully(folder: str) -> dict[str, list[str | None]]:
    """Every row through all worlds; what this rank ended with in those that it was in."""
    slot, store, generation = dist.get_rank(), disband(), 0
    ends: dict[str, list[str | None]] = {}
    for name, changes in {**EXACT, **ALIKE}.items():
        ends[name] = []
        for world_size, steps in GRACEFUL:
            generation += 1
            end = None
            if slot < world_size:
                world = (generation, slot, world_size, store)
                end = train(f"{folder}/{name}", changes, world, steps, Faults())
            ends[name].append(end)
            store.set(f"done/{generation}/{slot}", "")
            wait_for(store, (f"done/{generation}/{member}" for member in range(world_size)))
    return ends


def final_state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None and (state.progress.epoch, state.progress.step) == (3, 12)
    assert audit_rows(state.ledger.tail, MemoryOrder()).passed
    assert state.ledger.tail["step"].tolist() == list(range(1, 13))
    return state


def test_four_two_three_four_ranks_end_as_one_process_in_every_system(tmp_path: Path) -> None:
    ends = run_ranks(4, resize_gracefully, str(tmp_path / "ranks"), timeout_s=280)
    for name, changes in {**EXACT, **ALIKE}.items():
        together = final_state(tmp_path / "ranks" / name)
        assert together.ledger.world_sizes == (4, 2, 3, 4), name
        for index, (world_size, _) in enumerate(GRACEFUL):
            found = {end[name][index] for end in ends[:world_size]}
            assert len(found) == 1 and None not in found, name
        alone = in_one_process(tmp_path / "alone" / name, changes)
        if name in EXACT:
            assert states_differ_in(alone, together) == [], name
        # The loss scale has seen every step once, whoever computed it.
        assert together.part("scaler") == alone.part("scaler"), name


def lose_one_of_four(folder: str) -> None:
    """Each row begins with a victim of its own beside the three that stay."""
    slot, store = dist.get_rank(), disband()
    for index, (name, (step, moment)) in enumerate(KILLED.items()):
        members, victim = [0, 1, 2, 3 + index], 3 + index
        if slot in members:
            changes = {**EXACT[name], "elastic.snapshot_interval_s": 1e-9}
            faults = Faults(slot).fail_at(victim, step, moment)
            world = (2 * index + 1, members.index(slot), 4, store)
            end = train(f"{folder}/{name}", changes, world, None, faults)
            assert end is None, "the victim lived"
            train(f"{folder}/{name}", EXACT[name], (2 * index + 2, slot, 3, store), None, Faults())
    store.set(f"end/{slot}", "")
    wait_for(store, ["end/0"])


def test_kill_of_one_of_four_three_go_on_as_one_process_in_every_system(tmp_path: Path) -> None:
    victims = range(3, 3 + len(KILLED))
    run_ranks(
        3 + len(KILLED),
        lose_one_of_four,
        str(tmp_path / "ranks"),
        expect_death=victims,
        timeout_s=280,
    )
    for name in KILLED:
        alone = in_one_process(tmp_path / "alone" / name, EXACT[name])
        together = final_state(tmp_path / "ranks" / name)
        assert states_differ_in(alone, together) == [], name
        assert together.ledger.world_sizes == (4, 3), name
