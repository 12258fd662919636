"""Dense K-FAC by definition: per-sample gradients, unfolded patches, Kronecker products and solves."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dense_layers(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """A and G of every Linear and Conv2d: `A = (1/n) ΣΣ ā āᵀ`, `G = (1/nT) ΣΣ g gᵀ`."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def keep(module, args, output, name=name):
                inputs[name] = args[0].detach().clone()
                output.retain_grad()
                outputs[name] = output
                return output * 1  # what follows may write in place

            handles.append(module.register_forward_hook(keep))
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    result = {}
    n = len(x)
    for name, module in model.named_modules():
        if name not in inputs:
            continue
        g = outputs[name].grad
        assert g is not None
        if isinstance(module, nn.Conv2d):
            patches = F.unfold(
                inputs[name], module.kernel_size, module.dilation, module.padding, module.stride
            )
            rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
            g_rows = g.permute(0, 2, 3, 1).reshape(-1, g.shape[1])
        else:
            rows = inputs[name].reshape(-1, inputs[name].shape[-1])
            g_rows = g.reshape(-1, g.shape[-1])
        if module.bias is not None:
            rows = torch.cat((rows, torch.ones(len(rows), 1, dtype=rows.dtype)), 1)
        result[name] = {"A": rows.t() @ rows / n, "G": g_rows.t() @ g_rows / len(rows)}
    return result


def dense_kfac_step(
    model: nn.Module, x: Tensor, y: Tensor, *, damping: float, method: str
) -> dict[str, Tensor]:
    """Preconditioned gradients of the mean cross-entropy by one dense solve per layer."""
    layers = dense_layers(model, x, y)
    F.cross_entropy(model(x), y).backward()
    result = {}
    for name, module in model.named_modules():
        if name not in layers:
            continue
        a, g = layers[name]["A"], layers[name]["G"]
        d = module.weight.grad.reshape(len(g), -1)
        if module.bias is not None:
            d = torch.cat((d, module.bias.grad[:, None]), 1)
        eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
        if method == "eigen":
            dense = torch.kron(g, a) + damping * torch.kron(eye_g, eye_a)
        else:
            pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
            root = math.sqrt(damping)
            dense = torch.kron(g + root / pi * eye_g, a + pi * root * eye_a)
        p = torch.linalg.solve(dense, d.reshape(-1)).reshape(d.shape)
        if module.bias is not None:
            result[f"{name}.bias"] = p[:, -1]
            p = p[:, :-1]
        result[f"{name}.weight"] = p.reshape(module.weight.shape)
    model.zero_grad()
    return result
