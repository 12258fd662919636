"""The reproducible mode: equal bits for every world size, schedule and kill; controls that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.summation_tree import Node
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.sync import reproducible
from support.faults import Faults
from support.gloo import run_ranks
from support.reproducible_problems import (
    Segment,
    final_sha256,
    play_kill,
    play_schedules,
    random_schedule,
)
from support.training_problems import MemoryOrder

CASES: dict[str, dict[str, Any]] = {
    "eigen": {},
    "inverse-memopt": {"kfac.method": "inverse", "kfac.grad_worker_frac": 1e-6},
    "sampled-fisher": {"kfac.fisher": "1mc", "kfac.bn_fisher": "full", "kfac.stagger": True},
    "adamw-four-shards": {
        "kfac.enabled": False,
        "optimizer.name": "adamw",
        "optimizer.lr": 0.01,
        "elastic.logical_shards": 4,
        "elastic.max_workers": 4,
    },
}


def test_final_state_has_the_same_bits_for_every_world_size_and_schedule(tmp_path: Path) -> None:
    schedules: dict[str, tuple[dict[str, Any], list[Segment]]] = {}
    for case, changes in CASES.items():
        sizes = (1, 2, 3, 5) if case == "eigen" else (1, 3, 4)
        for world_size in sizes:
            schedules[f"{case}/{world_size}"] = (changes, [(world_size, None)])
        for seed in range(3 if case == "eigen" else 1):
            schedules[f"{case}/random-{seed}"] = (changes, random_schedule(seed, max(sizes)))
    run_ranks(5, play_schedules, str(tmp_path), schedules, timeout_s=200)
    for case in CASES:
        hashes = {n: final_sha256(tmp_path / n) for n in schedules if n.startswith(f"{case}/")}
        assert len(set(hashes.values())) == 1, hashes
    # Something is compared: the cases differ from each other.
    assert len({final_sha256(tmp_path / case / "1") for case in CASES}) == len(CASES)


def test_seven_ranks_and_a_schedule_with_them_have_the_bits_of_one_process(tmp_path: Path) -> None:
    schedules: dict[str, tuple[dict[str, Any], list[Segment]]] = {
        "1": ({}, [(1, None)]),
        "7": ({}, [(7, None)]),
        "7-6-4": ({}, [(7, 5), (6, 3), (4, None)]),
    }
    run_ranks(7, play_schedules, str(tmp_path), schedules, timeout_s=250)
    assert len({final_sha256(tmp_path / name) for name in schedules}) == 1


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_every_world_size_up_to_the_shards_and_random_schedules_have_the_same_bits(
    tmp_path: Path, case: str
) -> None:
    most = int(CASES[case].get("elastic.logical_shards", 8))
    schedules: dict[str, tuple[dict[str, Any], list[Segment]]] = {}
    for world_size in range(1, most + 1):
        schedules[str(world_size)] = (CASES[case], [(world_size, None)])
    for seed in range(8):
        schedules[f"random-{seed}"] = (CASES[case], random_schedule(100 + seed, most))
    run_ranks(most, play_schedules, str(tmp_path), schedules, timeout_s=1800)
    hashes = {name: final_sha256(tmp_path / name) for name in schedules}
    assert len(set(hashes.values())) == 1, hashes


def kill_slot_one(folder: str) -> str:
    faults = Faults(Communicator.world().rank).fail_at(1, 7, "gradients_exchanged")
    return play_kill(folder, faults, victim=1)


def test_final_state_after_a_sigkill_has_the_bits_of_one_process(tmp_path: Path) -> None:
    alone: dict[str, tuple[dict[str, Any], list[Segment]]] = {"alone": ({}, [(1, None)])}
    run_ranks(1, play_schedules, str(tmp_path), alone)
    said = run_ranks(3, kill_slot_one, str(tmp_path / "killed"), expect_death=[1])
    assert all("failed on rank" in line for line in (said[0], said[2]))
    assert final_sha256(tmp_path / "killed") == final_sha256(tmp_path / "alone")
    state = CheckpointStore(tmp_path / "killed").load_latest()
    assert state is not None and state.ledger.world_sizes == (3, 2)
    assert audit_rows(state.ledger.tail, MemoryOrder()).passed


def sum_by_rank(
    communicator: Communicator,
    partials: Sequence[tuple[Node, Tensor | None]],
    flags: Tensor,
    *,
    size: int,
    tag: str,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What everybody else does: each rank adds up its own, then an all-reduce."""
    total = flags.new_zeros(size)
    for _, value in partials:
        if value is not None:
            total += value
    communicator.all_reduce(total, tag=tag).wait()
    communicator.all_reduce(flags, tag=tag).wait()
    return total, flags


def play_with_sums_by_rank(
    folder: str, schedules: dict[str, tuple[dict[str, Any], list[Segment]]]
) -> None:
    reproducible.exchange_partials = sum_by_rank  # type: ignore[assignment]
    play_schedules(folder, schedules)


def test_sums_by_rank_instead_of_the_tree_have_other_bits(tmp_path: Path) -> None:
    # The control of the tests above: the same shards, the same seeds, ordinary sums.
    schedules: dict[str, tuple[dict[str, Any], list[Segment]]] = {
        "1": ({}, [(1, None)]),
        "3": ({}, [(3, None)]),
    }
    run_ranks(3, play_with_sums_by_rank, str(tmp_path), schedules)
    assert final_sha256(tmp_path / "1") != final_sha256(tmp_path / "3")


def exchange_large_and_small() -> list[bool]:
    """Both ways of the exchange on this group, compared with the sums of one process."""
    communicator = Communicator.world()
    equal = []
    for num_shards, num_filled, size in ((8, 8, 1000), (8, 2, 37), (16, 16, 5), (4, 1, 64)):
        generator = torch.Generator().manual_seed(size)
        leaves = torch.randn(num_shards, size, generator=generator)
        results = []
        for group, small in ((Communicator.solo(), 0), (communicator, 0), (communicator, 10**9)):
            sums = reproducible.PartialSums(size, dtype=torch.float32, device=torch.device("cpu"))
            for shard in reproducible.shards_of_ranks(group.world_size, num_shards)[group.rank]:
                filled = shard < num_filled
                sums.push(shard, sums.buffer().copy_(leaves[shard]) if filled else None)
            total, flags = reproducible.exchange_partials(
                group,
                sums.partials(),
                torch.tensor([1.0, float(group.rank)]),
                size=size,
                num_shards=num_shards,
                num_filled=num_filled,
                tag="sums",
                small_bytes=small,
            )
            world = range(group.world_size)
            equal.append(flags.tolist() == [float(len(world)), float(sum(world))])
            results.append(total.clone())
        equal += [torch.equal(results[0], other) for other in results[1:]]
    return equal


def test_both_ways_of_the_exchange_give_the_bits_of_one_process() -> None:
    for world_size in (2, 3, 5):
        for equal in run_ranks(world_size, exchange_large_and_small):
            assert len(equal) == 20 and all(equal)
