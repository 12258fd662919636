"""Asynchronous DistNewton: Ray actors of unequal speed train one model and never wait for each other.

python docs/examples/async_distnewton.py [workers]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from elastic_kfac.cluster.async_newton import AsyncMerge, DistNewton


class Problem:
    """Three Gaussian clusters and a small network whose parameters are one flat vector."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(3).repeat(100)
        centres = 2 * torch.randn(3, 10, generator=generator)
        self.inputs = centres[self.labels] + torch.randn(300, 10, generator=generator)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
        self.start = parameters_to_vector(self.model.parameters()).detach()

    def loss(self, theta: Tensor, samples: Tensor | slice = slice(None)) -> Tensor:
        vector_to_parameters(theta, self.model.parameters())
        return nn.functional.cross_entropy(self.model(self.inputs[samples]), self.labels[samples])

    def gradient(self, theta: Tensor, samples: Tensor) -> Tensor:
        gradients = torch.autograd.grad(self.loss(theta, samples), [*self.model.parameters()])
        return parameters_to_vector(gradients)


@ray.remote(num_cpus=0)
class Worker:
    def train(self, server: Any, index: int, rounds: int) -> None:
        problem, merger = Problem(), AsyncMerge(server, f"worker-{index}")
        generator = torch.Generator().manual_seed(index)
        theta = merger.join()
        for _ in range(rounds):
            samples = torch.randint(0, 300, (64,), generator=generator)
            theta = theta - 0.1 * problem.gradient(theta, samples)  # a local step
            theta = merger.merge(theta, problem.gradient(theta, samples))
            time.sleep(0.002 * index)


def main(workers: int = 3, rounds: int = 30) -> tuple[float, float]:
    """Loss before and after."""
    problem = Problem()
    server = AsyncMerge.start(problem.start, DistNewton(lr=0.1), num_cpus=0)
    ray.get([Worker.remote().train.remote(server, index, rounds) for index in range(workers)])
    merged = ray.get(server.newest.remote())
    before, after = problem.loss(problem.start).item(), problem.loss(merged.parameters).item()
    print(f"{merged.version} merges by {workers} workers: loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    ray.init()
    main(*map(int, sys.argv[1:]))
