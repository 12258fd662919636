"""A loss without symmetries, and the rows of Linear layers by autograd."""

from __future__ import annotations

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
