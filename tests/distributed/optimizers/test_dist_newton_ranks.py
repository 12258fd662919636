"""DistNewton over ranks is the merge of one process, whatever the shards (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import NumericalError
from elastic_kfac.optimizers.dist_newton import DistNewton, merge, merge_ranks
from support.gloo import run_ranks

SIZES = (1, 2, 7, 40)  # fewer elements than ranks, ragged shards
MODES: tuple[Any, ...] = ("paper", "sym", "abs")


def contribution(rank: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    theta = torch.randn(size, dtype=torch.float64, generator=generator)
    scale = torch.linspace(0.5, 9.0, size, dtype=torch.float64)
    return theta, scale * theta + 1


def run_all() -> dict[str, Any]:
    world = Communicator.world()
    seen: dict[str, Any] = {"merged": [], "traffic": []}
    for size in SIZES:
        for mode in MODES:
            theta, gradient = contribution(world.rank, size)
            world.counters.reset()
            found = merge_ranks(theta, gradient, DistNewton(0.4, mode=mode), world, block_size=3)
            seen["traffic"].append(world.counters.snapshot()["distnewton"].payload_bytes)
            seen["merged"].append(found)
    theta, gradient = contribution(world.rank, 7)
    if world.rank == 1:
        gradient[6] = torch.nan
    seen["torn"] = merge_ranks(theta, gradient, DistNewton(0.4), world)
    try:
        merge_ranks(theta * torch.nan, gradient, DistNewton(0.4), world)
    except NumericalError as error:
        seen["all_torn"] = str(error)
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_sharded_merge_is_the_replicated_one(world_size: int) -> None:
    results = run_ranks(world_size, run_all)
    cases = [(size, mode) for size in SIZES for mode in MODES]
    for index, (size, mode) in enumerate(cases):
        pairs = [contribution(rank, size) for rank in range(world_size)]
        expected = merge([p[0] for p in pairs], [p[1] for p in pairs], DistNewton(0.4, mode=mode))
        shard = -(-size // world_size)
        m = world_size
        for seen in results:
            found = seen["merged"][index]
            torch.testing.assert_close(found.parameters, expected.parameters, rtol=0, atol=1e-10)
            assert (found.rank, found.workers) == (expected.rank, world_size)
            assert found.sigma == pytest.approx(expected.sigma, rel=1e-9)
            assert torch.equal(found.parameters, results[0]["merged"][index].parameters)
            # 2n (+ flags) to all, one m×m all-reduce, n/m gathered: nothing of size n×m.
            assert seen["traffic"][index] == 8 * (m * (2 * shard + 1) + 3 * m * m + m + 1 + shard)


def test_rank_with_torn_numbers_gets_the_others_merge() -> None:
    results = run_ranks(3, run_all)
    pairs = [contribution(rank, 7) for rank in (0, 2)]
    expected = merge([p[0] for p in pairs], [p[1] for p in pairs], DistNewton(0.4))
    for seen in results:
        torch.testing.assert_close(seen["torn"].parameters, expected.parameters, rtol=0, atol=1e-12)
        assert seen["torn"].workers == 2
        assert "no worker" in seen["all_torn"]
