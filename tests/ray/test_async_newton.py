"""Asynchronous DistNewton on Ray actors: workers that do not wait for each other find the minimum."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from elastic_kfac.cluster.async_newton import AsyncMerge, DistNewton, MergeServer
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.optimizers.dist_newton import merge

SPECTRUM = torch.tensor([8.0, 4.0, 1.0, 0.5], dtype=torch.float64)
TARGET = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)


class Worker:
    """Takes gradient steps of its own on ½(θ − θ*)ᵀH(θ − θ*) between merges."""

    def __init__(self, actor: Any, name: str, rate: float) -> None:
        self._merge = AsyncMerge(actor, name)
        self._rate = rate

    def go(self, rounds: int, seed: int) -> float:
        """Distance from the minimum after some rounds."""
        generator = torch.Generator().manual_seed(seed)
        theta = self._merge.join()
        for _ in range(rounds):
            theta = theta - self._rate * _gradient(theta)
            theta = theta + 0.1 * torch.randn(4, dtype=torch.float64, generator=generator)
            theta = self._merge.merge(theta, _gradient(theta))
        return float((theta - TARGET).norm())


def _gradient(theta: Tensor) -> Tensor:
    return SPECTRUM * (theta - TARGET)


def test_workers_of_unlike_speed_find_the_minimum_and_a_newcomer_begins_there(
    cluster: LocalCluster,
) -> None:
    start = torch.zeros(4, dtype=torch.float64)
    actor = AsyncMerge.start(start, DistNewton(lr=1.0, gradient_lr=0.1), num_cpus=0)
    workers = [
        ray.remote(Worker).options(num_cpus=0).remote(actor, f"worker-{i}", 0.02 * (i + 1))
        for i in range(5)
    ]
    # Unequal numbers of rounds: nobody waits for anybody.
    ray.get([worker.go.remote(8 + 4 * i, i) for i, worker in enumerate(workers)])
    newest = ray.get(actor.newest.remote())
    assert newest.version == sum(8 + 4 * i for i in range(5))
    assert newest.workers >= 1
    newcomer = AsyncMerge(actor, "newcomer").join()
    assert float((newcomer - TARGET).norm()) < 0.2 * float(TARGET.norm())
    for handle in (*workers, actor):
        ray.kill(handle)


def test_example_lowers_the_loss(cluster: LocalCluster) -> None:
    path = Path(__file__).parents[2] / "docs/examples/async_distnewton.py"
    example = runpy.run_path(str(path), run_name="async_distnewton")
    before, after = example["main"](workers=2, rounds=20)
    assert after < 0.5 * before


def test_server_merges_what_is_fresh_and_drops_what_is_too_old() -> None:
    server = MergeServer(torch.zeros(3), DistNewton(lr=0.5), max_staleness=1, merge_every=2)
    gradient = torch.ones(3)
    assert server.hand_in("b", 0, torch.full((3,), 1.0), gradient).version == 0
    merged = server.hand_in("a", 0, torch.full((3,), 3.0), gradient)
    assert merged.parameters.tolist() == [1.5] * 3  # equal gradients: mean 2 minus 0.5
    assert (merged.version, merged.workers) == (1, 2)
    server.hand_in("a", 1, torch.full((3,), 5.0), gradient)
    # An older contribution than the newest of the same worker changes nothing: (1 + 5) / 2 - 0.5.
    merged = server.hand_in("a", 0, torch.full((3,), 99.0), gradient)
    assert (merged.version, merged.parameters.tolist()) == (2, [2.5] * 3)
    server.hand_in("c", 2, torch.full((3,), 7.0), gradient)
    merged = server.hand_in("c", 2, torch.full((3,), 7.0), gradient)
    assert (merged.version, merged.workers) == (3, 2)  # the contribution of "b" is two versions old
    assert merged.parameters.tolist() == [5.5] * 3


def test_server_without_a_fresh_contribution_returns_the_newest_parameters() -> None:
    server = MergeServer(torch.zeros(2), DistNewton(lr=0.5), max_staleness=0)
    newest = server.hand_in("fast", 0, torch.ones(2), torch.ones(2))
    assert newest.version == 1
    assert server.hand_in("slow", 0, torch.ones(2), torch.ones(2)) == newest


def test_merge_of_current_contributions_is_the_synchronous_one_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(5)]
    gradients = [torch.linspace(1, 9, 8, dtype=torch.float64) * theta for theta in thetas]
    options = DistNewton(lr=0.5)
    server = MergeServer(torch.zeros(8), options, max_staleness=0, merge_every=5)
    for index in (4, 2, 0, 1, 3):
        merged = server.hand_in(f"w{index}", 0, thetas[index], gradients[index])
    assert torch.equal(merged.parameters, merge(thetas, gradients, options).parameters)


def test_server_refuses_the_future_and_options_out_of_range() -> None:
    server = MergeServer(torch.zeros(2), DistNewton(lr=0.1))
    with pytest.raises(UsageError, match="does not exist yet"):
        server.hand_in("a", 9, torch.zeros(2), torch.ones(2))
    with pytest.raises(ConfigError, match="max_staleness >= 0"):
        MergeServer(torch.zeros(2), DistNewton(lr=0.1), max_staleness=-1)
