"""A loss without symmetries, and the rows of Linear layers by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
DAMPING = 0.03
N = 3


def loss_of(output: Tensor) -> Tensor:
    """A mean over samples, without any symmetry between positions or channels."""
    weights = torch.linspace(0.5, 2, output[0].numel(), dtype=torch.double).view_as(output[0])
    return (weights * torch.sin(output)).square().sum() / len(output)


def rows_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of the trainable Linear and Conv1d of width 1, as rows by name."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                output.retain_grad()
                seen.setdefault(name, []).append((args[0].detach(), output))

            handles.append(module.register_forward_hook(keep))
    (N * loss_of(model(*inputs))).backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    result = {}
    for name, calls in seen.items():
        x = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in calls])
        g = torch.cat([out.grad.reshape(-1, out.shape[-1]) for _, out in calls])  # type: ignore[union-attr]
        module: Any = model.get_submodule(name)
        bias = [] if module.bias is None else [torch.ones(len(x), 1).double()]
        result[name] = torch.cat((x, *bias), 1), g
    return result


def assert_rows(model: nn.Module, inputs: tuple[Tensor, ...], positions: dict[str, int]) -> KFAC:
    """K-FAC of the Linears named by `positions` (per sample) equals their rows; returns it."""
    rows = rows_of(model, inputs)
    assert {name: len(x) / N for name, (x, _) in rows.items()} == positions
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    loss_of(model(*inputs)).backward()
    plain = {name: model.get_submodule(name).weight.grad.clone() for name in rows}  # type: ignore[union-attr, operator]
    kfac.step()
    factors = kfac.factors()
    assert factors.keys() >= rows.keys()
    for name, (x, g) in rows.items():
        torch.testing.assert_close(factors[name]["A"], x.t() @ x / N, **TOLERANCE)
        torch.testing.assert_close(factors[name]["G"], g.t() @ g / len(g), **TOLERANCE)
        width = plain[name].shape[1]
        torch.testing.assert_close((g.t() @ x)[:, :width] / N, plain[name], **TOLERANCE)
    return kfac


def kronecker_rows(
    first: Any,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, int]:
    """Σ a aᵀ `[groups, a, a]` and Σ g gᵀ `[groups, g, g]` over all output rows of uses of one weight, and
    the number of rows, by autograd.

    The derivative of an output with respect to the weight is a row of inputs, one of them its bias's.

    Args:
        first: A module with the weight.
        outputs: Of every use.
        gradients: With respect to them.
        biases: Of all uses.
    """
    a: Any = 0
    g: Any = 0
    groups, count = getattr(first, "groups", 1), 0
    for output, gradient in zip(outputs, gradients, strict=True):
        if hasattr(first, "groups"):
            output, gradient = (
                v.flatten(2).transpose(1, 2).flatten(0, 1) for v in (output, gradient)
            )
        else:
            output, gradient = (v.reshape(-1, v.shape[-1]) for v in (output, gradient))
        size = output.shape[1] // groups
        for value, one in zip(output, gradient, strict=True):
            x = []
            for group in range(groups):
                weight, *columns = torch.autograd.grad(
                    value[group * size],
                    [first.weight, *biases],
                    retain_graph=True,
                    allow_unused=True,
                )
                x.append(as_matrix(first, weight, columns, biases)[group, 0])
            patch, parts = torch.stack(x), one.view(groups, size)
            a = a + patch[:, :, None] * patch[:, None]
            g = g + parts[:, :, None] * parts[:, None]
            count += 1
    return a, g, count


def as_matrix(
    first: Any, weight: Tensor, columns: Sequence[Tensor | None], biases: Sequence[Tensor]
) -> Tensor:
    """A gradient as `[groups, g, a]`, zeros for biases without one."""
    groups = getattr(first, "groups", 1)
    if getattr(first, "transposed", False):
        weight = weight.transpose(0, 1)
    if isinstance(first, nn.Embedding):
        weight = weight.t()
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    found = [torch.zeros_like(b) if c is None else c for b, c in zip(biases, columns, strict=True)]
    return torch.cat((rows, *(z.view(*rows.shape[:2], 1) for z in found)), -1)
