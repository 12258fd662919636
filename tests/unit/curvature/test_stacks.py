"""Small layers worked on as one batch get the numbers that each gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from elastic_kfac import KFAC
from elastic_kfac.curvature import kronecker


def _gradients(**options: Any) -> tuple[list[torch.Tensor], int]:
    """After the second of two steps, and how many layers were worked on together."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(6, 6, 1, bias=False),
        nn.Conv2d(6, 6, 1, bias=False),
        nn.Flatten(1),
        nn.Linear(24, 5),
        *[nn.Linear(5, 5) for _ in range(4)],
    )
    model = model.double()
    kfac = KFAC(model, inverse_update_steps=2, **options)
    x = torch.randn(8, 4, 2, 2).double()
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        kfac.step()
    keys = [layer.stack_key for layer in kfac.layers]  # type: ignore[attr-defined]
    together = sum(keys.count(key) > 1 for key in keys if key is not None)
    return [p.grad for p in model.parameters()], together  # type: ignore[misc]


@pytest.mark.parametrize(
    "options", [{}, {"method": "inverse"}, {"precompute": True}, {"weight_decay": 0.1}]
)
def test_stacked_layers_equal_single_ones(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked, together = _gradients(**options)
    assert together == 8
    monkeypatch.setattr(kronecker, "_SMALL", 0)
    alone, none = _gradients(**options)
    assert none == 0
    for ours, theirs in zip(stacked, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
