"""Would hierarchical low-rank approximation compress the matrices of a trained network?

Three claims say that it would not: off-diagonal blocks of kernel matrices have a numerical rank far
below their size, but the matrices of a convolutional network are tall and skinny with nearly full
rank, and a matrix that changes in every step leaves no time to amortise its compression. The probe
checks all three on one checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac.errors import UsageError
from elastic_kfac.tasks.models import evaluating

KERNEL_POINTS = 512
MAX_ROWS = 4096
"""Of an im2col matrix: more rows cannot raise its rank above its columns, only cost time."""
FULL_SHARE = 0.5
"""A rank of at least this share of the smaller side counts as nearly full."""
_REPEATS = 3


@dataclass(frozen=True)
class MatrixRank:
    """One matrix: its ε-rank and the cost of compressing it."""

    layer: str
    kind: str
    """`kernel`, `weights` or `im2col`."""
    rows: int
    columns: int
    rank: int
    compress_s: float
    """Time of one truncated singular value decomposition, s."""
    product_s: float
    """Time of the dense product that compression would make cheaper, s."""

    @property
    def share(self) -> float:
        """Rank over the smaller side."""
        return self.rank / min(self.rows, self.columns)

    @property
    def saving(self) -> float:
        """Share of the entries that two factors of that rank save; negative if they take more."""
        return 1 - self.rank * (self.rows + self.columns) / (self.rows * self.columns)

    @property
    def products_to_amortise(self) -> float:
        """Dense products after which compression has paid off; inf if it saves nothing."""
        gained = self.product_s * self.saving
        return self.compress_s / gained if gained > 0 else math.inf


def epsilon_rank(matrix: Tensor, epsilon: float) -> int:
    """Number of singular values above ε times the largest; 0 for a zero matrix.

    In double precision: single precision alone would end every spectrum near 1e-7.
    """
    values = torch.linalg.svdvals(matrix.double())
    if not len(values) or float(values[0]) == 0:
        return 0
    return int((values > epsilon * values[0]).sum())


def gaussian_kernel_block(points: int = KERNEL_POINTS, width: float = 0.1) -> Tensor:
    """The off-diagonal block of exp(−(x−y)²/2w²) on an even grid of [0, 1]
    [points/2, points/2]."""
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    half = points // 2
    return torch.exp(-0.5 * ((x[:half, None] - x[None, half:]) / width).square())


def matrices(model: nn.Module, images: Tensor) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(layer, kind, matrix, its factor in the product) for every Linear and ungrouped Conv2d: the
    weights [d_out, d_in], and the inputs, unrolled for a convolution [batch·positions, d_in]."""
    seen: dict[str, Tensor] = {}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = _unrolled(layer, inputs[0])

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        weight = layer.weight.detach().flatten(1)
        if name in seen:
            inputs = seen[name]
            # Evenly spread over samples and positions, not the corner of the first image.
            inputs = inputs[:: -(-len(inputs) // MAX_ROWS)]
            yield name, "weights", weight, inputs.T.contiguous()
            yield name, "im2col" if isinstance(layer, nn.Conv2d) else "inputs", inputs, weight.T


def probe(model: nn.Module, images: Tensor, *, epsilon: float = 1e-6) -> dict[str, Any]:
    """Ranks and times of a Gaussian kernel's block and of a network's matrices, as JSON.

    Args:
        model: Unchanged on return.
        images: Inputs whose unrolled patches are measured [batch, …].
        epsilon: Relative to the largest singular value.

    Raises:
        UsageError: If epsilon is not between 0 and 1.
    """
    if not 0 < epsilon < 1:
        raise UsageError("bad relative threshold of a rank", given=epsilon, allowed="0 < ε < 1")
    block = gaussian_kernel_block()
    kernel = _measured("off-diagonal block", "kernel", block, block.T.contiguous(), epsilon)
    found = [
        _measured(layer, kind, matrix, other, epsilon)
        for layer, kind, matrix, other in matrices(model, images)
    ]
    unrolled = [each for each in found if each.kind == "im2col"] or found
    claims = {
        "kernel_blocks_have_low_rank": kernel.share < 0.1,
        "network_matrices_do_not": all(each.share >= FULL_SHARE for each in unrolled),
        "compression_is_not_earned_back_in_a_step": all(
            each.products_to_amortise > 1 for each in found
        ),
    }
    return {
        "epsilon": epsilon,
        "images": len(images),
        "kernel": _row(kernel),
        "matrices": [_row(each) for each in found],
        "claims": claims,
    }


def _measured(layer: str, kind: str, matrix: Tensor, other: Tensor, epsilon: float) -> MatrixRank:
    rank = epsilon_rank(matrix, epsilon)
    compress_s = min(_times(lambda: torch.linalg.svd(matrix, full_matrices=False), 1))
    product_s = min(_times(lambda: matrix @ other, _REPEATS))
    rows, columns = matrix.shape
    return MatrixRank(layer, kind, rows, columns, rank, compress_s, product_s)


def _times(work: Any, repeats: int) -> Sequence[float]:
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return found


def _row(measured: MatrixRank) -> dict[str, Any]:
    amortised = measured.products_to_amortise
    return {
        **asdict(measured),
        "share": measured.share,
        "saving": measured.saving,
        "products_to_amortise": amortised if math.isfinite(amortised) else None,
    }


def _unrolled(layer: nn.Module, inputs: Tensor) -> Tensor:
    if not isinstance(layer, nn.Conv2d):
        return inputs.detach().flatten(0, -2)
    padding = layer.padding
    if isinstance(padding, str):
        # `same` as torch pads it: one more at the end where the kernel is even.
        total = [
            d * (k - 1) if padding == "same" else 0
            for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        inputs, padding = F.pad(inputs, sides), (0, 0)
    patches = F.unfold(
        inputs, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride
    )
    return patches.detach().transpose(1, 2).flatten(0, 1)
