"""Convolutions against dense algebra: rows by autograd, one output at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.layer_kinds import DAMPING, TOLERANCE, N, loss_of
from support.training_loops import seeded

CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "1d strided, dilated": (nn.Conv1d, {"kernel_size": 2, "stride": 2, "dilation": 2}),
    "1d circular, no bias": (
        nn.Conv1d,
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "bias": False},
    ),
    "1d grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": "same"}),
    "2d grouped": (nn.Conv2d, {"kernel_size": (1, 2), "groups": 4}),
    "3d": (nn.Conv3d, {"kernel_size": 2}),
    "3d grouped, strided": (nn.Conv3d, {"kernel_size": (1, 2, 1), "groups": 2, "stride": 2}),
    "transposed 1d": (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "transposed 1d, output padding": (
        nn.ConvTranspose1d,
        {"kernel_size": 2, "stride": 3, "padding": 1, "output_padding": 2, "bias": False},
    ),
    "transposed 2d": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2}),
    "transposed 2d grouped, dilated": (
        nn.ConvTranspose2d,
        {"kernel_size": (2, 1), "groups": 2, "dilation": 2, "padding": (1, 0)},
    ),
    "transposed 3d depthwise": (nn.ConvTranspose3d, {"kernel_size": (1, 1, 2), "groups": 4}),
}


def convolution(name: str) -> tuple[Any, Tensor]:
    """A module and its input."""
    torch.manual_seed(0)
    kind, options = CONVOLUTIONS[name]
    module = kind(4, 4, **options).double()
    sides = (5, 3, 2)[: len(module.kernel_size)]  # type: ignore[arg-type]
    return module, torch.randn(N, 4, *sides, generator=seeded(1)).double()


def matrix(module: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A gradient as `[groups, out, in·k (+ 1)]`."""
    if module.transposed:  # [in, out, ...]
        inputs = module.in_channels // module.groups
        weight = weight.unflatten(0, (module.groups, inputs)).transpose(1, 2)
    rows = weight.reshape(module.groups, module.out_channels // module.groups, -1)
    if bias is None:
        return rows
    return torch.cat((rows, bias.reshape(*rows.shape[:2], 1)), -1)


def dense(module: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A `[groups, a, a]`, G `[groups, g, g]` and the gradient `[groups, g, a]`, by their definitions."""
    output = module(inputs)
    (gradients,) = torch.autograd.grad(len(inputs) * loss_of(output), output, retain_graph=True)
    parameters = list(module.parameters())
    size = module.out_channels // module.groups
    patches = []
    for group in range(module.groups):
        values = output[:, group * size].reshape(-1)
        found = [torch.autograd.grad(v, parameters, retain_graph=True) for v in values]
        rows = [matrix(module, *(f if len(f) == 2 else (*f, None)))[group, 0] for f in found]
        patches.append(torch.stack(rows))
    x = torch.stack(patches)
    g = gradients.unflatten(1, (module.groups, size)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    gradient = g.mT @ x / len(inputs)
    return x.mT @ x / len(inputs), g.mT @ g / g.shape[1], gradient


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_dense_algebra(name: str) -> None:
    module, inputs = convolution(name)
    a, g, gradient = dense(module, inputs)
    kfac = KFAC(module, damping=DAMPING, kl_clip=None, loss_reduction="mean")
    loss_of(module(inputs)).backward()
    bias = None if module.bias is None else module.bias.grad
    torch.testing.assert_close(matrix(module, module.weight.grad, bias), gradient, **TOLERANCE)
    kfac.step()
    (found,) = kfac.factors().values()
    torch.testing.assert_close(found["A"].view_as(a), a, **TOLERANCE)
    torch.testing.assert_close(found["G"].view_as(g), g, **TOLERANCE)
    expected = torch.stack(
        [
            torch.linalg.solve(
                torch.kron(one_g, one_a) + DAMPING * torch.eye(d.numel(), dtype=torch.double),
                d.flatten(),
            ).view_as(d)
            for one_a, one_g, d in zip(a, g, gradient, strict=True)
        ]
    )
    bias = None if module.bias is None else module.bias.grad
    torch.testing.assert_close(matrix(module, module.weight.grad, bias), expected, **TOLERANCE)


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)
        self.head = nn.Conv2d(2, 2, 1)
        self.size: list[int] | None = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.up(x, output_size=self.size)))
        return out


@pytest.mark.parametrize("first", [[5, 5], [6, 5]])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_call_with_another_output_size_leaves_the_layer_out_by_name(
    first: list[int], checkpoint: bool
) -> None:
    """At its first statistics or later, whatever was kept of its input."""
    model = Upsampled()
    kfac = KFAC(model, factor_update_steps=1, kl_clip=None, loss_reduction="mean")
    x = torch.randn(N, 2, 3, 3, generator=seeded(1)).double()
    with pytest.warns(UserWarning, match=r"up \((its output has|its gradient)") as said:
        for size in (first, [6, 6]):
            model.zero_grad()
            model.size = size
            out = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
                if checkpoint
                else model(x)
            )
            loss_of(out).backward()
            plain = model.up.weight.grad.clone()  # type: ignore[union-attr]
            kfac.step()
            assert torch.equal(plain, model.up.weight.grad) == (size != [5, 5])  # type: ignore[arg-type]
    assert len(said) == 1 and kfac.coverage()["head"] == "covered"
