"""Positions that share a weight: padding that a mask names, and KFAC-reduce, against dense oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.training_loops import assert_same_factors, seeded

LENGTHS = (3, 6, 4)
"""Of padded sequences, and sides of padded images."""


def conv_net(dims: int, groups: int = 1) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
    torch.manual_seed(0)
    first = conv(2, 4, 3, padding=1, groups=groups)
    return nn.Sequential(first, nn.Tanh(), conv(4, 3, 1)).double()


def padded(dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `[3, 2, 6, ...]` that are 0 where the mask `[3, 6, ...]` is false, labels, the mask."""
    size = (6,) * dims
    real = torch.zeros(3, *size, dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        real[(i, *[slice(length)] * dims)] = True
    x = torch.randn(3, 2, *size, generator=seeded(3)).double() * real.unsqueeze(1)
    return x, torch.randint(3, (3, *size), generator=seeded(4)), real


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.filterwarnings("ignore:factors wider")
def test_padded_convolutions_equal_sequences_by_themselves(
    dims: int, groups: int, limit: int | None
) -> None:
    x, y, real = padded(dims)
    masked, alone = conv_net(dims, groups), conv_net(dims, groups)
    options: dict[str, Any] = {"loss_reduction": "positions", "max_factor_dim": limit}
    kfac = KFAC(masked, kl_clip=None, **options)
    with kfac.micro_batch(mask=real):
        loss = F.cross_entropy(masked(x), y.masked_fill(~real, -100))
    loss.backward()
    kfac.step()
    oracle = KFAC(alone, kl_clip=None, **options)
    total = int(real.sum())
    for i, length in enumerate(LENGTHS):
        at = (slice(i, i + 1), slice(None), *[slice(length)] * dims)
        with oracle.micro_batch(n=length**dims, scale=1 / total):
            out = alone(x[at])
            (
                F.cross_entropy(out, y[i : i + 1][(slice(None), *at[2:])], reduction="sum") / total
            ).backward()
    oracle.step()
    assert_same_factors(kfac, oracle)
    assert set(kfac.coverage().values()) == {"covered"}


def test_masked_images_equal_the_others_alone() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
        ).double()

    x, y = torch.randn(5, 2, 6, 6, generator=seeded(1)).double(), torch.arange(5) % 3
    real = torch.tensor([True, False, True, True, False])
    few, all_ = KFAC(a := net(), kl_clip=None), KFAC(b := net(), kl_clip=None)
    F.cross_entropy(a(x[real]), y[real]).backward()
    few.step()
    with all_.micro_batch(mask=real):
        F.cross_entropy(b(x), y.masked_fill(~real, -100)).backward()
    all_.step()
    assert_same_factors(all_, few)


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(2, 3, 3, stride=2), nn.ConvTranspose1d(2, 3, 3, padding=1)]
)
def test_a_convolution_that_the_mask_does_not_fit_is_left_out_by_name(conv: nn.Module) -> None:
    x, _, real = padded(1)
    model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), conv).double()
    kfac = KFAC(model, loss_reduction="positions")
    with kfac.micro_batch(mask=real):
        model(x).square().mean().backward()
    with pytest.warns(UserWarning, match=r"1 \(which of its .* output positions are real"):
        kfac.step()
    assert "mask of 6" in kfac.coverage()["1"]


def reduced(
    model: nn.Module, x: Tensor, mean: Callable[[Tensor], Tensor], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A ⊗ G by group, and the dense Gauss-Newton matrix of a loss of means over positions."""
    kfac = KFAC(model, fisher="exact", weight_sharing="reduce", loss_reduction="mean")
    with kfac.micro_batch(mask=mask):
        output = mean(model(x))
    kfac.sample_fisher(output, likelihood="gaussian")
    (0.5 * output.square().sum() / len(x)).backward()
    kfac.step()
    (layer,), (state,) = kfac.layers, kfac.states
    a, g = ((f if f.dim() > 2 else f[None]) for f in (state.factors["A"], state.factors["G"]))
    curvature = torch.stack([torch.kron(*pair) for pair in zip(g, a, strict=True)])
    dense = torch.zeros_like(curvature)
    for value in mean(model(x)).reshape(-1):
        model.zero_grad()
        value.backward(retain_graph=True)
        row = layer.gradient().reshape(len(a), -1)
        dense += torch.einsum("gi,gj->gij", row, row) / len(x)
    return curvature, dense


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 2, 3, dilation=2, padding=2, bias=False),
        nn.Conv2d(4, 4, 2, padding="same", padding_mode="circular", groups=4),
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
    ],
)
def test_reduce_is_exact_where_the_loss_sees_the_mean_over_positions(module: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(module).double()
    dims = module.weight.dim() - 2  # type: ignore[union-attr, operator]
    x = torch.randn(5, 4, *(5, 6)[:dims], dtype=torch.double)
    torch.testing.assert_close(
        *reduced(model, x, lambda y: y.flatten(2).mean(-1)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_reduce_takes_the_mean_over_real_positions(kind: str) -> None:
    x, _, real = padded(1)
    torch.manual_seed(0)
    module = nn.Conv1d(2, 3, 3, padding=1) if kind == "conv" else nn.Linear(2, 3)
    model = nn.Sequential(module).double()
    x = x if kind == "conv" else x.mT
    weights = real.double() / real.sum(1, keepdim=True)

    def mean(y: Tensor) -> Tensor:
        return ((y if kind == "conv" else y.mT) * weights.unsqueeze(1)).sum(-1)

    torch.testing.assert_close(*reduced(model, x, mean, real), rtol=1e-9, atol=1e-12)


def test_reduce_names_the_tables_it_does_not_apply_to() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="does not apply to Embedding layers: 0 use expand"):
        KFAC(model, weight_sharing="reduce")
