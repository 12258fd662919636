"""The bare kernels of an exact K-FAC step on given statistics: what no implementation can leave out.

Nothing is captured, scheduled, checked or distributed here. The kernels run in the place of a
preconditioner's step, between the passes and the optimizer: alone, one after the other, they would find
their matrices in the processor's caches, and leave the model's there. Layers of one shape are one batch,
widths are padded to multiples of 8 (a bias makes them odd), Gram matrices are computed without their
upper half where that is faster, and a convolution's A comes from `curvature.patches`, which forms no
patches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from elastic_kfac.curvature.patches import conv_input_sum

DECAY = 0.95


class Floor:
    """Kernels for the Linear and Conv2d layers of a model, on the statistics of one pass."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        *,
        method: str,
        skip: Sequence[str],
        factor_update_steps: int,
        inverse_update_steps: int,
    ) -> None:
        self._method = method
        self._intervals = factor_update_steps, inverse_update_steps
        self._steps = 0
        layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and name not in skip
        ]
        self._passes = _capture(layers, model, loss)
        self._factors = [
            [torch.eye(_padded(size)) for size in (g.shape[1], a)] for (_, _, g), a in self._sizes()
        ]
        by_shape = defaultdict(list)
        for (_, _, g), a in self._sizes():
            by_shape[_padded(g.shape[1]), _padded(a)].append(None)
        self._batches = [
            tuple(torch.randn(len(members), *shape) for shape in ((g, g), (a, a), (g, a), (g, a)))
            for (g, a), members in by_shape.items()
        ]

    def step(self) -> None:
        """The kernels that are due."""
        statistics, decompositions = (self._steps % interval == 0 for interval in self._intervals)
        self._steps += 1
        if statistics:
            self._statistics()
        if decompositions:
            self._decompositions()
        self._products()

    def _sizes(self) -> list[tuple[tuple[nn.Module, Tensor, Tensor], int]]:
        return [(one, one[0].weight[0].numel() + (one[0].bias is not None)) for one in self._passes]

    def _statistics(self) -> None:
        for (module, x, g), (left, right) in zip(self._passes, self._factors, strict=True):
            bias = module.bias is not None
            if isinstance(module, nn.Conv2d):
                g = g.flatten(2)
                new = [torch.bmm(g, g.mT).sum(0), conv_input_sum(x, module, bias=bias)]
            else:
                new = [gram(g), _bordered(x) if bias else gram(x)]
            for factor, total in zip((left, right), new, strict=True):
                size = len(total)
                factor[:size, :size].mul_(DECAY).add_(total, alpha=(1 - DECAY) / len(x))

    def _decompositions(self) -> None:
        by_size = defaultdict(list)
        for pair in self._factors:
            for factor in pair:
                by_size[len(factor)].append(factor)
        for factors in by_size.values():
            stacked = torch.stack(factors)
            if self._method == "eigen":
                torch.linalg.eigh(stacked)
            else:
                stacked.diagonal(dim1=1, dim2=2).add_(0.1)
                torch.cholesky_inverse(torch.linalg.cholesky(stacked))

    def _products(self) -> None:
        for left, right, gradient, scale in self._batches:
            if self._method == "eigen":
                inner = left.mT @ gradient @ right
                result = left @ inner.mul_(scale) @ right.mT
            else:
                result = left @ gradient @ right
            torch.dot(result.flatten(), gradient.flatten())
            result.mul_(0.5)


def gram(rows: Tensor) -> Tensor:
    """`rowsᵀ rows`; from 256 columns on without the upper right quarter, which is a copy."""
    width = rows.shape[1]
    if width < 256:
        return rows.T @ rows
    half = width // 2
    left, right = rows[:, :half], rows[:, half:]
    total = rows.new_empty(width, width)
    total[:half, :half] = gram(left)
    total[half:, half:] = gram(right)
    total[half:, :half] = right.T @ left
    total[:half, half:] = total[half:, :half].T
    return total


def _bordered(rows: Tensor) -> Tensor:
    width = rows.shape[1]
    total = rows.new_empty(width + 1, width + 1)
    total[:width, :width] = gram(rows)
    total[width, :width] = total[:width, width] = rows.sum(0)
    total[width, width] = len(rows)
    return total


def _capture(
    layers: Sequence[nn.Module], model: nn.Module, loss: Callable[[nn.Module], Tensor]
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(layer, inputs, output gradients) of one pass; of a Linear as rows."""
    found: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[module] = [inputs[0].detach()]
        output.register_hook(lambda grad: found[module].append(grad.detach()))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    loss(model).backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return [
        (m, x, g) if isinstance(m, nn.Conv2d) else (m, x.flatten(0, -2), g.flatten(0, -2))
        for m, (x, g) in ((m, found[m]) for m in layers)
    ]


def _padded(size: int) -> int:
    return -(-size // 8) * 8
