"""Asynchronous DistNewton on Ray actors: workers that do not wait for each other find the minimum."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from elastic_kfac.cluster.async_table import AsyncMerge, MergeServer
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.errors import UsageError
from elastic_kfac.optimizers.dist_newton import DistNewton

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


def test_server_merges_what_is_fresh_and_refuses_the_future() -> None:
    server = MergeServer(torch.zeros(2), DistNewton(lr=0.1), max_staleness=0, merge_every=2)
    gradient = torch.ones(2)
    assert server.hand_in("a", 0, torch.zeros(2), gradient).version == 0
    merged = server.hand_in("b", 0, torch.ones(2), gradient)
    assert (merged.version, merged.workers) == (1, 2)
    # "b" is two merges behind by then and no longer takes part.
    server.hand_in("a", 1, torch.zeros(2), gradient)
    assert server.hand_in("a", 1, torch.zeros(2), gradient).workers == 1
    with pytest.raises(UsageError, match="future"):
        server.hand_in("a", 9, torch.zeros(2), gradient)
