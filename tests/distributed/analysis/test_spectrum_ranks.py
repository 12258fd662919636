"""Hessian analysis gives the same numbers on one, two and three ranks (float64)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.analysis.hessian import Batch, Hessian
from elastic_kfac.analysis.landscape import bias_variance, loss_along
from elastic_kfac.analysis.spectral_estimates import (
    density,
    kfac_eigenvalue,
    one_sample_eigenvalues,
    trace,
)
from elastic_kfac.analysis.spectrum import spectrum, top_eigenvalues
from elastic_kfac.communication.collectives import Communicator
from support.gloo import run_ranks

COUNT = 23


def loss_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(COUNT, 5, dtype=torch.float64)
    y = torch.randint(0, 3, (COUNT,))
    model(x)
    return model, x, y


def analyse(world: Communicator, ranks: int) -> dict[str, Any] | None:
    """Everything on the first `ranks` ranks; unequal shares, the last rank may have nothing."""
    part = world.subgroup(range(ranks))
    if part is None:
        return None
    model, x, y = problem()

    edges = {1: [0, COUNT], 2: [0, 7, COUNT], 3: [0, 16, COUNT, COUNT]}[ranks]
    mine = slice(edges[part.rank], edges[part.rank + 1])
    own: list[Batch] = list(zip(x[mine].split(5), y[mine].split(5), strict=True))
    hessian = Hessian(model, loss_sum, own, communicator=part)
    top = top_eigenvalues(hessian, 3, max_iterations=40, tolerance=1e-9)
    _, ends = spectrum(hessian, max_steps=20, tolerance=0.0)
    spread = bias_variance(model, loss_sum, own, communicator=part)

    kfac = KFAC(model, process_group=part, grad_worker_frac=1 / ranks, damping=0.1)
    (loss_sum(model.train()(x), y) / COUNT).backward()  # the same batch on every rank
    kfac.step(num_samples=COUNT, loss_scale_per_sample=1 / COUNT)
    surrogate = kfac_eigenvalue(kfac, communicator=part)
    kfac.close()
    model, _, _ = problem()
    return {
        "top": torch.tensor(top.values, dtype=torch.float64),
        "vector": top.vectors[0],
        "ends": torch.tensor([ends.smallest, ends.largest], dtype=torch.float64),
        "trace": torch.tensor(trace(hessian, max_draws=12, tolerance=0.0).mean),
        "density": torch.tensor(density(hessian, draws=2, steps=10).moment(2)),
        "gradient": hessian.gradient().gradient,
        "along": torch.tensor(
            loss_along(model, loss_sum, own, top.vectors[0], [-0.1, 0.1], communicator=part)
        ),
        "one_sample": one_sample_eigenvalues(
            model, loss_sum, lambda i: (x[i : i + 1], y[i : i + 1]), 5, top=2, communicator=part
        ),
        "spread": torch.tensor([spread.mean, spread.variance], dtype=torch.float64),
        "surrogate": torch.tensor(surrogate),
    }


def expired_by_one_rank(world: Communicator) -> int:
    model, x, y = problem()
    budget = 0.0 if world.rank == 1 else None
    hessian = Hessian(
        model,
        loss_sum,
        [(x, y)],
        communicator=world,
        time_budget_s=budget,
    )
    return top_eigenvalues(hessian, 2, tolerance=0.0).products


def run_all() -> tuple[list[dict[str, Any] | None], int]:
    world = Communicator.world()
    return [analyse(world, ranks) for ranks in (1, 2, 3)], expired_by_one_rank(world)


def test_numbers_are_the_same_for_one_two_and_three_ranks() -> None:
    results = run_ranks(3, run_all)
    reference = results[0][0][0]
    assert reference is not None
    for rank, (seen, products) in enumerate(results):
        assert products == 1  # one rank's clock stops all of them after the same product
        for ranks, found in zip((1, 2, 3), seen, strict=True):
            if rank >= ranks:
                assert found is None
                continue
            for name, expected in reference.items():
                torch.testing.assert_close(
                    found[name], expected, rtol=1e-8, atol=1e-10, msg=f"{name} on {ranks} ranks"
                )
            # Every rank of a group holds the same bits.
            assert torch.equal(found["vector"], results[0][0][ranks - 1]["vector"])
