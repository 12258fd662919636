"""Ranks leave layers out together, whichever of them saw the reason."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import ShardedConfig
from support.gloo import run_ranks


class Standardised(nn.Linear):
    """Computes W x + b on rank 0 only."""

    def forward(self, x: Tensor) -> Tensor:
        if Communicator.world().rank == 0:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def _two_steps(sharded: bool) -> tuple[dict[str, str], list[str], bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Standardised(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharding = ShardedConfig(gather="gradients") if sharded else None
    kfac = KFAC(model, lr=optimizer, kl_clip=None, sharding=sharding)
    communicator = Communicator.world()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(communicator.rank)).double()
    said: list[str] = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        if not sharded:
            for p in model.parameters():
                assert p.grad is not None
                communicator.all_reduce(p.grad, tag="gradients").wait()
        plain = model[2].weight.grad
        before = None if plain is None else plain.clone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kfac.step(num_samples=6)
        said += [str(w.message) for w in caught]
    unchanged = sharded or torch.equal(before, model[2].weight.grad)  # type: ignore[arg-type]
    return kfac.coverage(), said, unchanged


@pytest.mark.parametrize("sharded", [False, True])
def test_a_fault_that_one_rank_sees_leaves_the_layer_out_on_all(sharded: bool) -> None:
    for coverage, said, unchanged in run_ranks(3, _two_steps, sharded):
        assert coverage["0"] == "covered" and coverage["2"] != "covered"
        assert unchanged
        assert len(said) == 1 and "does not precondition: 2 " in said[0]
