"""Normalisation layers in half precision, and those that are not covered."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.layer_kinds import loss_of
from support.training_loops import seeded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_half_precision_uses_the_epsilon_that_torch_uses(dtype: torch.dtype) -> None:
    inputs = (0.05 * torch.randn(6, 5, 8, generator=seeded(1))).to(dtype)
    found = []
    for kind in (dtype, torch.double):
        module = nn.RMSNorm(8).to(kind)
        kfac = KFAC(module, kl_clip=None, loss_reduction="mean")
        loss_of(module(inputs.to(kind)).double()).backward()
        kfac.step()
        found.append(kfac.factors()[""]["F"].double())
    torch.testing.assert_close(*found, rtol=0.05, atol=1e-3)


class LikeRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_norm_of_the_users_own_is_named() -> None:
    with pytest.warns(UserWarning, match=r"0 \(LikeRMSNorm\)"):
        kfac = KFAC(nn.Sequential(LikeRMSNorm(4), nn.Linear(4, 2)))
    assert kfac.coverage()["0"] == "unsupported type LikeRMSNorm"
