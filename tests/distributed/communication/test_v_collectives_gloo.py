from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.v_collectives import (
    VMethod,
    all_gather_v,
    cheapest_method,
    received_elements,
    reduce_scatter_v,
)
from elastic_kfac.errors import ConfigError, UsageError
from support.gloo import run_ranks


def _layouts(world_size: int) -> list[list[int]]:
    return [
        [4] * world_size,
        [r + 1 for r in range(world_size)],
        [0] * (world_size - 1) + [9],  # one giant, at the end
        [9] + [0] * (world_size - 1),
        [0] * world_size,
        [r % 2 * 3 for r in range(world_size)],  # more ranks than owners
    ]


def _values(rank: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _run_all() -> list[dict[str, Any]]:
    world = Communicator.world()
    seen = []
    for sizes in _layouts(world.world_size):
        for method in get_args(VMethod):
            world.counters.reset()
            flat = _values(world.rank, sum(sizes))
            own = reduce_scatter_v(world, flat, sizes, method=method, tag="reduce").clone()
            # What an owner does between the halves: here it doubles its part.
            whole = all_gather_v(world, own * 2, sizes, method=method, tag="gather")
            seen.append({"own": own, "whole": whole.clone(), "traffic": world.counters.snapshot()})
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_three_implementations_agree_with_the_sum(world_size: int) -> None:
    results = run_ranks(world_size, _run_all)
    cases = [(s, m) for s in _layouts(world_size) for m in get_args(VMethod)]
    for rank, seen in enumerate(results):
        for (sizes, method), one in zip(cases, seen, strict=True):
            total = sum(_values(r, sum(sizes)) for r in range(world_size))
            assert isinstance(total, torch.Tensor)
            start = sum(sizes[:rank])
            own = total[start : start + sizes[rank]]
            torch.testing.assert_close(one["own"], own, rtol=0, atol=1e-12)
            torch.testing.assert_close(one["whole"], 2 * total, rtol=0, atol=1e-12)
            if sum(sizes) == 0:
                assert one["traffic"] == {}
            else:
                for half in ("reduce", "gather"):
                    received = one["traffic"][half].received_bytes
                    assert received <= 8 * received_elements(method, sizes) + 1e-9


def test_both_halves_together_cost_no_more_than_an_all_reduce() -> None:
    results = run_ranks(5, _run_all)
    sizes = _layouts(5)[0]
    all_reduce = 2 * 4 * 8 * sum(sizes) / 5
    for seen in results:
        for index, method in enumerate(get_args(VMethod)):
            traffic = seen[index]["traffic"]
            moved = traffic["reduce"].received_bytes + traffic["gather"].received_bytes
            assert moved == (2 if method == "fused" else 1) * all_reduce


def test_v_collectives_of_one_rank_are_identities() -> None:
    solo = Communicator.solo()
    for method in get_args(VMethod):
        flat = torch.arange(3.0)
        assert reduce_scatter_v(solo, flat, [3], method=method, tag="x").tolist() == [
            0,
            1,
            2,
        ]
        assert all_gather_v(solo, flat, [3], method=method, tag="x").tolist() == [0, 1, 2]
        assert received_elements(method, [3]) == 0


def test_v_collectives_refuse_sizes_that_do_not_fit() -> None:
    solo = Communicator.solo()
    with pytest.raises(UsageError, match="one size per rank"):
        reduce_scatter_v(solo, torch.ones(3), [1, 2], tag="x")
    with pytest.raises(UsageError, match="flat contiguous"):
        reduce_scatter_v(solo, torch.ones(3), [4], tag="x")
    with pytest.raises(UsageError, match="this rank's part"):
        all_gather_v(solo, torch.ones(3), [4], tag="x")
    with pytest.raises(ConfigError, match="per_owner, padded, fused"):
        all_gather_v(solo, torch.ones(3), [3], method="ring", tag="x")  # type: ignore[arg-type]


def test_cheapest_method_follows_latency_and_bytes() -> None:
    def choose(sizes: list[int], latency: float, per_byte: float) -> str:
        return cheapest_method(sizes, element_bytes=4, latency_s=latency, seconds_per_byte=per_byte)

    assert choose([100, 0, 0, 0], 0.0, 1.0) == "per_owner"
    assert choose([100] * 4, 1e9, 1.0) == "padded"
    assert choose([400, 1, 1, 1], 1e9, 1.0) == "fused"
