"""Separate projections under scaled_dot_product_attention, against rows by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from support.layer_kinds import N, assert_rows
from support.training_loops import assert_same_factors, seeded


class Attention(nn.Module):
    """Separate projections under `scaled_dot_product_attention`, with fewer heads of keys and values."""

    def __init__(self, heads: int = 4, shared_heads: int = 2, size: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        width = heads * size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(6, shared_heads * size)
        self.v_proj = nn.Linear(6, shared_heads * size, bias=False)
        self.out_proj = nn.Linear(width, width)
        self.double()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(-2, -3)
            for part in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.out_proj(mixed.transpose(-2, -3).flatten(-2))
        return out


POSITIONS = {"q_proj": 5, "k_proj": 7, "v_proj": 7, "out_proj": 5}


def test_separate_projections_equal_their_rows() -> None:
    x = torch.randn(N, 5, 8, generator=seeded(3)).double()
    memory = torch.randn(N, 7, 6, generator=seeded(4)).double()
    kfac = assert_rows(Attention(), (x, memory), POSITIONS)
    assert kfac.captured_samples() == 0
    assert {name: f["G"].shape[0] for name, f in kfac.factors().items()} == {
        "q_proj": 8,
        "k_proj": 4,
        "v_proj": 4,
        "out_proj": 8,
    }


class Flattened(Attention):
    """Projects rows `[n·T, d]`, as code with packed positions does."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        n = len(x)
        q = self.q_proj(x.flatten(0, 1)).unflatten(0, (n, -1))
        k, v = (p(memory.flatten(0, 1)).unflatten(0, (n, -1)) for p in (self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(n * x.shape[1], -1))
        return out.unflatten(0, (n, -1))


def test_projections_of_flattened_rows_equal_those_of_batches() -> None:
    x = torch.randn(N, 5, 8, generator=seeded(3)).double()
    memory = torch.randn(N, 7, 6, generator=seeded(4)).double()
    kfacs = [assert_rows(model, (x, memory), POSITIONS) for model in (Attention(), Flattened())]
    assert_same_factors(*kfacs)
