"""Warnings of a script's own loop: once, at steps that decompose, with the numbers to change."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from elastic_kfac import KFAC


def warned(steps: int, *, lr: float = 0.1, target: float = 1.0, **options: Any) -> list[str]:
    """The warnings of a small regression."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    y = target * torch.randn(64, 1, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kfac = KFAC(model, lr=optimizer, loss_reduction="mean", **options)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().mean()).backward()
            kfac.step()
            optimizer.step()
    return [str(each.message) for each in caught]


def test_a_clip_that_binds_always_is_named_once() -> None:
    (text,) = warned(260, kl_clip=1e-4)
    assert "100% of" in text
    assert "lr has no effect" in text
    assert "100 times" not in text


def test_a_rate_that_is_out_of_proportion_is_named() -> None:
    (text,) = warned(260, kl_clip=1e-7, lr=100.0)
    assert "most of them more than 100 times" in text


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"kl_clip": 30.0, "lr": 3.0}, "lower lr and kl_clip"),
        ({"kl_clip": None, "damping": 1e-4, "lr": 1.9}, "trust_region='adaptive'"),
    ],
)
def test_a_loss_above_its_start_is_named(options: dict[str, Any], advice: str) -> None:
    texts = [text for text in warned(120, **options) if "above its start" in text]
    assert len(texts) == 1
    assert advice in texts[0]


@pytest.mark.parametrize("target", [1e-3, 1.0, 1e3])
def test_the_default_warns_of_nothing_where_the_loss_falls(target: float) -> None:
    assert warned(120, target=target) == []
