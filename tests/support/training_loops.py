"""A small model, its loss, and KFAC after one step on whatever a training loop does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


X = torch.randn(8, 4, generator=seeded(1)).double()
Y = torch.randint(3, (8,), generator=seeded(2))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y[: len(x)])


def stepped(
    prepare: Callable[[nn.Module], Any] = lambda model: loss_of(model).backward(),
    model: Callable[[], nn.Module] = mlp,
    **options: Any,
) -> KFAC:
    """A preconditioner after one step on what `prepare` leaves in `.grad`."""
    net = model()
    kfac = KFAC(net, **{"kl_clip": None, **options})
    told = prepare(net)
    kfac.step(**(told if isinstance(told, dict) else {}))
    return kfac


def assert_same_factors(found: KFAC, right: KFAC) -> None:
    ours, theirs = found.factors(), right.factors()
    assert ours.keys() == theirs.keys() and theirs
    for layer, factors in theirs.items():
        for name, value in factors.items():
            torch.testing.assert_close(ours[layer][name], value, rtol=1e-9, atol=1e-12)


class SharedQueries(nn.Module):
    """A second layer whose input is one row for all samples while `shared`, which no statistics fit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.queries = nn.Linear(4, 3), nn.Linear(4, 3)
        self.shared = False

    def forward(self, x: Tensor) -> Tensor:
        given = x[:1].expand(3, 4) if self.shared else x
        return self.inner(x) + self.queries(given).mean(0)
