"""Measured costs of decompositions on this kind of machine, for the planner."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.curvature import inverses
from elastic_kfac.placement.costs import CostModel, Method, fit_costs

DIMENSIONS = (16, 64, 128, 256, 512)


def measure_costs(
    method: Method,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    dimensions: Sequence[int] = DIMENSIONS,
    repeats: int = 3,
) -> CostModel:
    """Times decompositions of random factors (least of `repeats`) and fits c0 + c1·d^p."""
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for size in dimensions:
        root = torch.randn(size, 2 * size, generator=generator, dtype=dtype).to(device)
        factor = root @ root.t() / size
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            _wait(device)
            start = time.perf_counter()
            if method == "eigen":
                inverses.eigen(factor)
            else:
                inverses.damped_inverse(factor, 0.1)
            _wait(device)
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    return fit_costs(dimensions, seconds)


def shared_costs(
    communicator: Communicator,
    method: Method,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> CostModel:
    """Rank 0's measurement on every rank, so that all make the same plan. Collective."""
    own = measure_costs(method, device=device, dtype=dtype) if communicator.rank == 0 else None
    model: CostModel = communicator.broadcast_object(own, 0, tag="kfac/costs")
    return model


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
