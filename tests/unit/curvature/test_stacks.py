"""Small layers worked on as one batch get the numbers that each gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.curvature import kronecker
from elastic_kfac.curvature.kronecker import LinearLayer
from elastic_kfac.curvature.layer import Observation
from elastic_kfac.curvature.passes import recorder


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


def test_calls_of_small_layers_are_summed_together_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together: list[int] = []
    observe_all = LinearLayer.observe_all

    def counted(self: LinearLayer, inputs: Sequence[Tensor]) -> list[Observation]:
        together.append(len(inputs))
        return observe_all(self, inputs)

    monkeypatch.setattr(LinearLayer, "observe_all", counted)

    def trained(limit: int) -> dict[str, dict[str, Tensor]]:
        monkeypatch.setattr(recorder, "SMALL", limit)
        torch.manual_seed(0)
        many = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)]
        model = nn.Sequential(*many, many[1], nn.Linear(5, 5, bias=False), nn.Linear(5, 3))
        kfac = KFAC(model, loss_reduction="mean")
        for batch in (torch.randn(6, 5), torch.randn(6, 2, 5)):
            model.zero_grad()
            out = model(batch)
            if batch.dim() > 2:
                out.square().mean().backward(retain_graph=True)
            out.sum().backward()
            kfac.step()
        return kfac.factors()

    ours = trained(recorder.SMALL)
    assert max(together) == 5
    together.clear()
    theirs = trained(0)
    assert not together
    for name, parts in theirs.items():
        for factor, value in parts.items():
            assert ours[name][factor].equal(value)
