"""Every system that keeps state, on every schedule of world sizes, equals one process.

Each schedule is played once for all of its systems, by one group of processes.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch.distributed as dist

from elastic_kfac.errors import CommunicationError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callbacks, KeepGoing, Point
from elastic_kfac.training.loop import Outcome, run_rank
from elastic_kfac.training.membership import leave, regroup
from support.faults import Faults
from support.gloo import RankFailed, disband, run_ranks, wait_for
from support.training_problems import (
    KFAC,
    AwaitCheckpoint,
    MemoryDataset,
    MemoryOrder,
    RecordingCallback,
    StopAt,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
    train_here,
)

pytestmark = pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")

TESTS = Path(__file__).parents[2]

World = tuple[int, int | None]
"""World size, and after how many steps it parks (None: it trains to the end)."""

SCHEDULES: dict[str, tuple[World, ...]] = {
    # The last batch of an epoch has 2 samples: one of three ranks has none.
    "2": ((2, None),),
    "3": ((3, None),),
    # An epoch has two steps or four: the first end of one comes in the first or the second world.
    "3-2-3": ((3, 3), (2, 2), (3, None)),
    "4-3-4": ((4, 4), (3, 4), (4, None)),
    "4-2-3-4": ((4, 3), (2, 3), (3, 3), (4, None)),
    "3-2-1": ((3, 5), (2, 3), (1, None)),
}
RESIZES = ("3-2-3", "4-3-4", "4-2-3-4")
"""Schedules that shrink and grow: every system is trained on one of them at least."""
LEFT_OUT = {
    "2": "systems without a cell train in a world of two or three ranks within a resize",
    "3": "systems without a cell train in a world of three ranks within a resize",
    "3-2-3": "systems without a cell shrink and grow in 4-3-4 or 4-2-3-4",
    "4-3-4": "systems without a cell shrink and grow in 3-2-3 or 4-2-3-4",
    "4-2-3-4": "systems without a cell shrink and grow in 3-2-3 or 4-3-4",
    "3-2-1": "one process alone reads the same checkpoint: with and without K-FAC is enough",
    "kill 4-3": "survivors read a checkpoint, as after parking: a row per optimizer is enough",
}
"""Why a system may lack a cell of a schedule."""


@dataclass(frozen=True)
class System:
    """A configuration, the schedules that it is trained on and what is expected of it."""

    changes: dict[str, Any]
    schedules: tuple[str, ...]
    killed_at: tuple[int, Point] | None = None
    """The step that is never committed, and where in it one of four ranks dies."""
    expected: Literal["exact", "alike"] = "exact"
    """Equal to one process to 1e-10, or only equal on all ranks: passes of another size round
    differently in BatchNorm and in half precision."""
    grows: bool = False
    """Its batch must have grown."""
    kinds: tuple[str, ...] = field(default=())
    """The kinds of state that this row covers."""


STEP: dict[str, Any] = {
    "optimizer.lr_schedule": "step",
    "optimizer.decay_epochs": (1, 2),
    "optimizer.decay_factor": 0.5,
}
ABS: dict[str, Any] = {
    "batch.policy": "abs",
    "batch.max_batch_size": 32,
    "batch.patience_epochs": 1,
    "batch.hessian_samples": 23,
    "optimizer.lr": 0.01,
}
FGSM: dict[str, Any] = {"adversarial.attack": "fgsm", "adversarial.radius": 0.05}
BATCH_NORM: dict[str, Any] = {"model.name": "support.training_problems:batch_norm_cnn"}
SYNC_BATCH_NORM: dict[str, Any] = {**BATCH_NORM, "train.sync_batch_norm": True}
OSAWA: dict[str, Any] = {
    "optimizer.name": "sharded_kfac",
    "kfac.damping": 0.01,
    "kfac.kl_clip": None,
    "kfac.method": "inverse",
}
MOMENTUM_BEFORE: dict[str, Any] = {
    "kfac.momentum": 0.9,
    "optimizer.momentum": 0.0,
    "kfac.trust_region": "adaptive",
}
CONSTANT = ("2", "3")
SYSTEMS: dict[str, System] = {
    "sgd": System(
        {},
        (*CONSTANT, "3-2-1", "4-2-3-4"),
        killed_at=(6, "gradients_exchanged"),
        kinds=("SGD", "data"),
    ),
    "micro-batches": System({"train.micro_batch_size": 3}, (*CONSTANT, "3-2-3")),
    "adamw": System({"optimizer.name": "adamw", "optimizer.lr": 0.01}, (*CONSTANT, "3-2-3")),
    "mse": System({"train.loss": "mse"}, (*CONSTANT, "3-2-3")),
    "lars": System(
        {"optimizer.name": "lars", "optimizer.trust": 0.02}, ("3-2-3",), kinds=("LARS",)
    ),
    "lars-rate": System({"optimizer.name": "lars", "optimizer.lr": 1.0}, ("4-2-3-4",)),
    "lamb": System(
        {"optimizer.name": "lamb", "optimizer.lr": 0.01},
        ("3-2-3", "4-2-3-4"),
        killed_at=(6, "preconditioned"),
        kinds=("LAMB",),
    ),
    "cosine-warmup": System(
        {"optimizer.lr_schedule": "cosine", "optimizer.warmup_epochs": 1}, ("4-2-3-4",)
    ),
    "velocity": System(
        {
            "optimizer.name": "velocity_sgd",
            "optimizer.momentum_rule": "ratio0",
            "optimizer.lr_schedule": "polynomial",
            "optimizer.decay_start_epoch": 0.5,
            "optimizer.decay_end_epoch": 4,
            "optimizer.rescale_weights": "shrink",
        },
        ("3-2-3",),
        kinds=("velocity and momentum rule",),
    ),
    "velocity-previous": System(
        {"optimizer.name": "velocity_sgd", "optimizer.momentum_rule": "ratio_prev", **STEP},
        ("3-2-3",),
        kinds=("velocity and momentum rule",),
    ),
    "kfac-eigen": System(
        KFAC,
        (*CONSTANT, "3-2-1", "4-2-3-4"),
        killed_at=(7, "factor_exchange"),
        kinds=("K-FAC",),
    ),
    "kfac-eigen-memopt": System(
        {**KFAC, "kfac.grad_worker_frac": 1e-6},
        (*CONSTANT, "4-2-3-4"),
        killed_at=(5, "decomposition"),
        kinds=("K-FAC",),
    ),
    "kfac-inverse-micro-batches": System(
        {**KFAC, "kfac.method": "inverse", "train.micro_batch_size": 3}, (*CONSTANT, "3-2-3")
    ),
    "kfac-inverse-hybrid": System(
        {**KFAC, "kfac.method": "inverse", "kfac.grad_worker_frac": 0.5},
        ("4-2-3-4",),
        killed_at=(5, "preconditioned"),
        kinds=("K-FAC",),
    ),
    "kfac-stagger": System(
        {**KFAC, "kfac.stagger": True, "kfac.grad_worker_frac": 0.5},
        (*CONSTANT, "4-2-3-4"),
        kinds=("K-FAC",),
    ),
    "ekfac": System(
        {
            **KFAC,
            "kfac.method": "ekfac",
            "kfac.trust_region": "adaptive",
            "kfac.factor_update_steps": 1,
        },
        ("3-2-3",),
        kinds=("EK-FAC",),
    ),
    "ekfac-memopt": System(
        {**KFAC, "kfac.method": "ekfac", "kfac.grad_worker_frac": 1e-6},
        ("4-2-3-4",),
        kinds=("EK-FAC",),
    ),
    "osawa-ekfac": System({**OSAWA, "kfac.method": "ekfac"}, ("4-3-4",), kinds=("EK-FAC",)),
    "kfac-one-sided": System(
        {
            **KFAC,
            "kfac.method": "one_sided",
            "kfac.trust_region": "adaptive",
            "kfac.grad_worker_frac": 0.5,
        },
        ("4-2-3-4",),
        kinds=("one-sided",),
    ),
    "osawa-one-sided": System(
        {
            **OSAWA,
            "kfac.method": "one_sided",
            "kfac.trust_region": "adaptive",
            "kfac.kl_clip": 1e-3,
        },
        ("4-3-4",),
        kinds=("one-sided",),
    ),
    "kfac-low-rank": System(
        {
            **KFAC,
            "kfac.max_factor_dim": 8,
            "kfac.factor_rank": 3,
            "kfac.trust_region": "adaptive",
            "kfac.grad_worker_frac": 0.5,
        },
        ("4-2-3-4",),
        kinds=("low rank",),
    ),
    "kfac-trust-region": System(
        {**KFAC, "kfac.trust_region": "adaptive", "kfac.grad_worker_frac": 0.5},
        (*CONSTANT, "4-2-3-4"),
        kinds=("trust region",),
    ),
    "osawa-trust-region": System(
        {**OSAWA, "kfac.trust_region": "adaptive", "kfac.kl_clip": 1e-3},
        ("4-3-4",),
        kinds=("trust region",),
    ),
    "kfac-momentum": System(
        {
            **KFAC,
            **MOMENTUM_BEFORE,
            "kfac.grad_worker_frac": 0.5,
            "train.micro_batch_size": 3,
        },
        (*CONSTANT, "3-2-1", "4-2-3-4"),
        killed_at=(6, "preconditioned"),
        kinds=("trust region",),
    ),
    "osawa-momentum": System(
        {**OSAWA, **MOMENTUM_BEFORE, "kfac.kl_clip": 1e-3},
        ("3-2-1", "4-3-4"),
        killed_at=(6, "gradients_exchanged"),
        kinds=("trust region",),
    ),
    "osawa": System(
        OSAWA,
        ("4-3-4", "4-2-3-4"),
        killed_at=(6, "gradients_exchanged"),
        kinds=("Osawa pipeline",),
    ),
    "osawa-clipped": System(
        {**OSAWA, "kfac.kl_clip": 1e-4, "sharded.v_method": "padded"}, ("4-3-4",)
    ),
    "osawa-gradients": System({**OSAWA, "sharded.gather": "gradients"}, ("4-3-4",)),
    "osawa-adaptive": System(
        {**OSAWA, "kfac.refresh": "adaptive"},
        ("4-3-4", "4-2-3-4"),
        killed_at=(7, "preconditioned"),
        kinds=("adaptive refresh",),
    ),
    "osawa-tied-momentum": System(
        {
            "optimizer.name": "sharded_kfac",
            "optimizer.momentum_rule": "ratio0",
            "optimizer.lr_schedule": "polynomial",
            "optimizer.rescale_weights": "shrink",
            "optimizer.weight_decay": 0.0,
            "kfac.damping": 0.01,
            "kfac.kl_clip": None,
            "mixing.erasing": 0.5,
        },
        ("3-2-3",),
        kinds=("Osawa pipeline",),
    ),
    "ring": System({"communication.algorithm": "ring"}, ("4-3-4",)),
    "rabenseifner": System({"communication.algorithm": "rabenseifner"}, ("4-3-4",)),
    "hierarchical": System({"communication.algorithm": "hierarchical"}, ("4-3-4",)),
    "fb": System(
        {"batch.policy": "fb", "batch.max_batch_size": 32, "batch.warmup_epochs": 2}, ("3-2-3",)
    ),
    "gg": System(
        {"batch.policy": "gg", "batch.max_batch_size": 40, **STEP},
        ("3-2-3",),
        kinds=("batch of the world",),
    ),
    "warmup": System(
        {
            "batch.policy": "warmup",
            "batch.max_batch_size": 32,
            "batch.stages": ((1, 20), (2, 32)),
            "elastic.batch_policy": "abs",
        },
        ("3-2-3",),
    ),
    "abs": System({**ABS, "train.micro_batch_size": 5}, ("3-2-3",), grows=True, kinds=("ABS",)),
    "abs-last-layer": System(
        {**ABS, "batch.eigenvalue": "last_layer"}, ("3-2-3",), grows=True, kinds=("ABS",)
    ),
    "absa": System(
        {**ABS, **FGSM, "batch.policy": "absa", "batch.max_batch_size": 64},
        ("3-2-3",),
        grows=True,
        kinds=("ABSA",),
    ),
    "absa-kfac": System(
        {
            **ABS,
            **FGSM,
            **KFAC,
            "batch.policy": "absa",
            "batch.eigenvalue": "kfac",
            "batch.report_both": True,
        },
        ("3-2-3",),
        grows=True,
        kinds=("ABSA",),
    ),
    "robust": System(
        {
            "adversarial.attack": "pgd",
            "adversarial.radius": 0.1,
            "adversarial.steps": 2,
            "adversarial.random_start": True,
            "adversarial.fraction": 1.0,
            "train.micro_batch_size": 3,
        },
        ("3-2-3",),
        kinds=("RNG",),
    ),
    "sync-bn": System(SYNC_BATCH_NORM, ("3-2-3",), kinds=("BN stats",)),
    "sync-bn-kfac": System({**SYNC_BATCH_NORM, **KFAC}, ("3-2-3",), kinds=("BN stats",)),
    # 25 samples over three ranks: unequal shares.
    "batch-norm-unequal": System(
        {**BATCH_NORM, "train.global_batch_size": 25}, ("3", "3-2-3"), expected="alike"
    ),
    "batch-norm": System(BATCH_NORM, ("4-2-3-4",), expected="alike", kinds=("BN stats",)),
    "loss-scaler": System(
        {"model.name": "support.reproducible_problems:dropout_net", "train.precision": "fp16"},
        ("4-2-3-4",),
        expected="alike",
        kinds=("loss scaler",),
    ),
}
CELLS = [(s, name) for s in SCHEDULES for name in SYSTEMS if s in SYSTEMS[name].schedules]
KILLED = {name: system.killed_at for name, system in SYSTEMS.items() if system.killed_at}
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "SGD": (
        "distributed/training/test_in_place.py"
        "::test_departure_and_newcomer_end_as_one_process_without_a_step_redone",
    ),
    "K-FAC": (
        "distributed/optimizers/test_kfac_ranks.py"
        "::test_state_saved_at_three_continues_at_two_as_if_nothing_happened",
        "distributed/optimizers/test_kfac_ranks.py"
        "::test_resize_in_a_living_process_equals_constant_world",
    ),
    "Osawa pipeline": (
        "distributed/optimizers/test_sharded_kfac.py"
        "::test_four_three_four_ranks_equal_constant_world",
    ),
    # Batches that are mixed with the one before: a restore forgets the partner.
    "running mixup": (
        "distributed/training/test_steps_apart.py::test_mixed_batches_are_dropped_by_a_restore",
        "distributed/training/test_steps_apart.py"
        "::test_four_ranks_that_stepped_apart_rejoin_and_go_on_as_three",
    ),
    # Ranks that step apart take other steps than one process.
    "DistNewton": (
        "distributed/training/test_steps_apart.py"
        "::test_four_ranks_that_stepped_apart_rejoin_and_go_on_as_three",
        "ray/test_async_newton.py::test_server_merges_what_is_fresh_and_drops_what_is_too_old",
    ),
    # Lossy: near one process, with a residual that moves.
    "compression": (
        "distributed/communication/test_compression_gloo.py"
        "::test_residual_sum_survives_leaving_ranks",
        "distributed/training/test_lossy_wires.py"
        "::test_lossy_wires_stay_near_fp32_and_keep_their_residual_through_a_resize",
    ),
    "loss scaler": (
        "unit/training/test_loop.py::test_half_precision_learns_and_resumes_in_the_same_bits",
    ),
    "data": (
        "distributed/training/test_in_place.py"
        "::test_kill_of_one_of_three_survivors_go_on_and_end_as_one_process",
        "unit/data/test_order.py::test_assignment_random_world_changes_every_sample_once",
    ),
    # Bits, not 1e-10.
    "RNG": (
        "distributed/training/test_reproducible.py"
        "::test_final_state_has_the_same_bits_for_every_world_size_and_schedule",
    ),
    # The batch and the rate follow the world size.
    "batch of the world": (
        "distributed/training/test_keep_local.py"
        "::test_keep_local_shrinks_batch_and_rate_and_ramps_after_a_change",
    ),
}
"""Kinds of state with tests of their own, beside rows of the table or because no row can be compared
with one process."""


Part = tuple[Outcome, list[tuple[int, int]], list[int]]
"""What one rank saw of one world: how it ended, rewinds, sample ids that it read."""


def play(folder: str, schedule: str) -> dict[str, list[Part | None]]:
    """Every system of a schedule through all worlds, with the ranks of the present group as a pool."""
    slot, store, generation = dist.get_rank(), disband(), 0
    parts: dict[str, list[Part | None]] = {}
    for name in [name for played, name in CELLS if played == schedule]:
        parts[name] = []
        for world_size, steps in SCHEDULES[schedule]:
            generation += 1
            part = None
            if slot < world_size:
                recorded, datasets = RecordingCallback(), memory_datasets()
                # One rank alone is asked to stop; all park at its boundary.
                asked = steps is not None and slot == world_size - 1
                outcome = run_rank(
                    small_config(SYSTEMS[name].changes),
                    regroup(generation, slot, world_size, store, timeout_s=120),
                    store=CheckpointStore(f"{folder}/{name}"),
                    callback=recorded,
                    control=StopAt(steps or 0) if asked else KeepGoing(),
                    datasets=datasets,
                )
                assert isinstance(datasets.train, MemoryDataset)
                part = (outcome, recorded.rewinds, datasets.train.read_ids)
                leave()
            parts[name].append(part)
            store.set(f"done/{generation}/{slot}", "")
            wait_for(store, (f"done/{generation}/{member}" for member in range(world_size)))
    return parts


@dataclass
class Played:
    folder: Path
    ranks: list[dict[str, list[Part | None]]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Played]:
    """A schedule, played once for all of its systems; a failure is the failure of all of them."""
    found: dict[str, Played | RankFailed] = {}

    def of(schedule: str) -> Played:
        if schedule not in found:
            folder = tmp_path_factory.mktemp("worlds")
            largest = max(world_size for world_size, _ in SCHEDULES[schedule])
            try:
                ranks = run_ranks(largest, play, str(folder), schedule, timeout_s=500)
                found[schedule] = Played(folder, ranks)
            except RankFailed as error:
                found[schedule] = error
        result = found[schedule]
        if isinstance(result, RankFailed):
            raise result
        return result

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrainingState]:
    """The final state of a system that one process has trained; trained once."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda name: in_one_process(folder / name, SYSTEMS[name].changes))


@pytest.mark.parametrize(("schedule", "name"), CELLS)
def test_system_ends_as_one_process(
    schedule: str,
    name: str,
    played: Callable[[str], Played],
    alone: Callable[[str], TrainingState],
) -> None:
    worlds, run = SCHEDULES[schedule], played(schedule)
    expected, together = alone(name), final_state(run.folder / name)
    compare(name, expected, together)
    assert together.ledger.world_sizes == tuple(world_size for world_size, _ in worlds)
    step = 0
    for index, (world_size, steps) in enumerate(worlds):
        parts = [part for rank in run.ranks if (part := rank[name][index]) is not None]
        outcomes = [outcome for outcome, _, _ in parts]
        assert len(outcomes) == world_size
        assert len({outcome.state_sha256 for outcome in outcomes}) == 1
        _, rewinds, _ = parts[0]
        assert rewinds == ([(step, 0)] if index else [])
        step = expected.progress.step if steps is None else step + steps
        ended = ("finished", ()) if steps is None else ("parked", ("test",))
        assert {(o.status, o.reasons, o.progress.step) for o in outcomes} == {(*ended, step)}
        if steps is None:
            assert outcomes[0].state_sha256 == together.sha256()
        if len(worlds) == 1:
            seen = sorted(itertools.chain.from_iterable(ids for _, _, ids in parts))
            assert seen == sorted(3 * list(range(50)))


def final_state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None and state.progress.epoch == 3
    return state


def compare(name: str, alone: TrainingState, together: TrainingState) -> None:
    """Everything that is kept, with what one process keeps."""
    system = SYSTEMS[name]
    if system.expected == "exact":
        assert states_differ_in(alone, together) == []
    assert audit_rows(together.ledger.tail, MemoryOrder()).passed
    assert together.progress.step == alone.progress.step
    assert together.ledger.tail["step"].tolist() == list(range(1, together.progress.step + 1))
    if "batch.policy" not in system.changes:
        batch = system.changes.get("train.global_batch_size", 16)
        assert together.progress.step == 3 * math.ceil(50 / batch)
    # The loss scale has seen every step once, whoever computed it.
    assert together.part("scaler") == alone.part("scaler")
    ours, theirs = alone.part("batch_size"), together.part("batch_size")
    assert _rounded(ours) == _rounded(theirs)
    if system.grows:
        assert theirs["state"]["batch_size"] > 16, "the batch never grew: nothing was tested"
        assert theirs["epochs"] == 3


def _rounded(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _rounded(value) for key, value in state.items()}
    return round(state, 10) if isinstance(state, float) else state


def lose_one_of_four(folder: str) -> None:
    """Each row begins with a victim of its own beside the three that stay."""
    slot, store = dist.get_rank(), disband()
    for index, (name, (step, moment)) in enumerate(KILLED.items()):
        members, victim = [0, 1, 2, 3 + index], 3 + index
        changes = SYSTEMS[name].changes
        if slot in members:
            snapshots = {**changes, "elastic.snapshot_interval_s": 1e-9}
            faults = Faults(slot).fail_at(victim, step, moment)
            world = (2 * index + 1, members.index(slot), 4, store)
            assert not ends(f"{folder}/{name}", snapshots, world, faults), "the victim lived"
            ends(f"{folder}/{name}", changes, (2 * index + 2, slot, 3, store), Faults())
    store.set(f"end/{slot}", "")
    wait_for(store, ["end/0"])


def ends(
    folder: str, changes: dict[str, Any], world: tuple[int, int, int, dist.Store], faults: Faults
) -> bool:
    """Whether a world comes to the end; it does not if a peer is lost."""
    callback = Callbacks(faults, AwaitCheckpoint(Path(folder)))
    try:
        train_here(folder, changes, regroup(*world, timeout_s=60), callback=callback)
        ended = True
    except CommunicationError:
        ended = False
    # Outside of the handler: its traceback holds on to the group, whose peers would wait for it.
    leave()
    return ended


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every row that loses one of four ranks and goes on with the three that are left."""
    folder = tmp_path_factory.mktemp("killed")
    victims = range(3, 3 + len(KILLED))
    run_ranks(3 + len(KILLED), lose_one_of_four, str(folder), expect_death=victims, timeout_s=280)
    return folder


@pytest.mark.parametrize("name", KILLED)
def test_three_survivors_of_four_end_as_one_process(
    name: str, killed: Path, alone: Callable[[str], TrainingState]
) -> None:
    together = final_state(killed / name)
    compare(name, alone(name), together)
    assert together.ledger.world_sizes == (4, 3)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_shrinks_and_grows(name: str) -> None:
    schedules = set(SYSTEMS[name].schedules)
    assert schedules & set(RESIZES)
    assert schedules <= set(SCHEDULES)


def test_every_schedule_gives_a_reason_for_its_empty_cells() -> None:
    assert set(LEFT_OUT) == {*SCHEDULES, "kill 4-3"}


def test_every_kind_of_state_has_a_row_or_a_test_of_its_own() -> None:
    kinds = {"SGD", "LARS", "LAMB", "velocity and momentum rule", "K-FAC", "Osawa pipeline"}
    kinds |= {
        "adaptive refresh",
        "trust region",
        "low rank",
        "EK-FAC",
        "one-sided",
        "running mixup",
        "DistNewton",
        "ABS",
        "ABSA",
        "compression",
    }
    kinds |= {"loss scaler", "data", "BN stats", "RNG", "batch of the world"}
    rows = {kind for system in SYSTEMS.values() for kind in system.kinds}
    assert rows | set(ELSEWHERE) == kinds
    # After a kill, too.
    assert {kind for name in KILLED for kind in SYSTEMS[name].kinds} >= {
        *("SGD", "LAMB", "K-FAC", "Osawa pipeline", "adaptive refresh"),
    }


@pytest.mark.parametrize("proof", sorted({p for proofs in ELSEWHERE.values() for p in proofs}))
def test_tests_elsewhere_exist_and_assert(proof: str) -> None:
    file, _, name = proof.partition("::")
    functions = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
    (found,) = [f for f in functions if isinstance(f, ast.FunctionDef) and f.name == name]
    assert any(_asserts(node) for node in ast.walk(found))


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return name.startswith("assert_")
    return isinstance(node, ast.Assert)
