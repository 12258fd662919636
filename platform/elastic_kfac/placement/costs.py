"""Costs of a layer: seconds to decompose, elements to keep, elements to send.

Symbols of the traffic model (Pauloski et al., KAISA, SC'21), for layers with weight [g, a]:

    s = Σ a² + g²               factors, on every rank
    e = Σ a² + g² + a g         decompositions in use, with the precomputed 1/(d_G d_Aᵀ + damping)
        Σ a² + g² + a + g       ... without (eigenvalues instead); Σ a² + g² for inverses,
                                Σ a² for one side, 2 a g more than eigenvalues for EK-FAC
    w = Σ a g                   weights that K-FAC preconditions

A grouped convolution counts once per group (`copies`). A factor of dimension 0 is diagonal and costs
nothing to decompose; one of which blocks are kept counts once per block (`a_blocks`, `g_blocks`). Of one
with a rank r there are r eigenvectors, r + 1 eigenvalues and a product of r + a coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_kfac.errors import UsageError

Method = Literal["eigen", "inverse", "ekfac", "one_sided"]
EIGEN: tuple[Method, ...] = ("eigen", "ekfac")
"""Those that decompose into eigenvectors."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one K-FAC layer that placement depends on."""

    name: str
    a_dim: int
    """Width of the input factor A, with the homogeneous coordinate; 0 when A is diagonal."""
    g_dim: int
    """Width of the output-gradient factor G; 0 when G is diagonal."""
    weight_elements: int
    """Elements of weight and bias over all copies."""
    copies: int = 1
    """Factor pairs of this shape: the groups of a grouped convolution."""
    diagonal: int | None = None
    """Elements of diagonal and block-diagonal factors, where the widths leave it open."""
    one_factor: bool = False
    """Whether F is the only factor: that of a normalisation."""
    a_blocks: int = 1
    """Blocks of A, each `a_dim` wide."""
    g_blocks: int = 1
    """Blocks of G."""
    a_rank: int = 0
    """Eigenpairs that are kept of A; 0 for all."""
    g_rank: int = 0
    """Eigenpairs that are kept of G."""
    kept: str = ""
    """What is kept of factors wider than `max_factor_dim`, in words."""

    @property
    def diagonal_elements(self) -> int:
        """Elements of diagonal and block-diagonal factors.

        A diagonal A with a dense G (embedding) has one entry per weight row. A G as wide as the weight
        is the only factor (full Fisher of a normalisation). With neither dense the layer is a
        normalisation with one 2x2 block per channel of two weights.
        """
        if self.diagonal is not None:
            return self.diagonal
        if (self.a_dim and self.g_dim) or self.g_dim == self.weight_elements:
            return 0
        if not self.a_dim and not self.g_dim:
            return 2 * self.weight_elements
        return self.weight_elements // max(self.a_dim, self.g_dim)

    @property
    def dense_elements(self) -> int:
        """Elements of dense factors and blocks."""
        return self.copies * (self.a_blocks * self.a_dim**2 + self.g_blocks * self.g_dim**2)

    @property
    def lengths(self) -> tuple[int, int]:
        """Coordinates of A and of G that are in dense factors and blocks, per copy."""
        return self.a_blocks * self.a_dim, self.g_blocks * self.g_dim

    @property
    def vector_elements(self) -> int:
        """Elements of the eigenvectors of dense factors and blocks."""
        a, g = self.a_rank or self.a_dim, self.g_rank or self.g_dim
        return self.copies * (self.a_blocks * self.a_dim * a + self.g_blocks * self.g_dim * g)

    @property
    def value_elements(self) -> int:
        """Elements of their eigenvalues."""
        ranks = (self.a_rank, self.g_rank)
        kept = (r + 1 if r else n for r, n in zip(ranks, self.lengths, strict=True))
        return self.copies * sum(kept)

    @property
    def product_elements(self) -> int:
        """Elements of 1/(d_G d_Aᵀ + damping)."""
        a, g = self.lengths[0] + self.a_rank, self.lengths[1] + self.g_rank
        if a and g:
            return self.copies * a * g
        return (self.diagonal or 0) * (a or g) or self.weight_elements

    @property
    def is_pair(self) -> bool:
        """Whether there is an A and a G, diagonal or not."""
        return bool(self.a_dim and self.g_dim) or (bool(self.diagonal) and not self.one_factor)


def factor_elements(layers: Iterable[LayerShape], *, packed: bool = False) -> int:
    """s, or its lower triangles only when `packed`."""
    if packed:
        return sum(
            (x.dense_elements + x.copies * sum(x.lengths)) // 2 + x.diagonal_elements
            for x in layers
        )
    return sum(x.dense_elements + x.diagonal_elements for x in layers)


def second_order_elements(
    layers: Iterable[LayerShape], *, method: Method = "eigen", precompute: bool = True
) -> int:
    """e: elements that a gradient worker keeps of the decompositions of these layers."""
    total = 0
    for x in layers:
        total += x.vector_elements + x.diagonal_elements
        if method in ("inverse", "one_sided") or not x.is_pair:
            continue
        if precompute and method == "eigen":
            # The product holds what the diagonal would.
            total += x.product_elements - x.diagonal_elements
        else:
            total += x.value_elements
        if method == "ekfac":
            total += 2 * x.product_elements
    return total


def weight_elements(layers: Iterable[LayerShape]) -> int:
    """w: the preconditioned gradients of these layers."""
    return sum(x.weight_elements for x in layers)


def precondition_flops(layer: LayerShape, *, method: Method = "eigen") -> float:
    """Floating-point operations to precondition one gradient.

    2 a g (a + g) for two products with inverses, twice that for the four of the eigen form; with blocks
    the widths in parentheses are theirs. With r eigenvectors there are three products instead of two.
    """
    a, g = 1.5 * layer.a_rank or layer.a_dim, 1.5 * layer.g_rank or layer.g_dim
    products = 2.0 * layer.weight_elements * (a + g)
    return 2.0 * products if method in EIGEN else products


@dataclass(frozen=True)
class CostModel:
    """Seconds to decompose one factor of width d: c0 + c1 d^p.

    The constant matters: with a pure cube the three widest factors of ResNet-50 bound the speed-up at
    4.6x, while measured decompositions of small factors are bound by latency.
    """

    c0: float = 0.0
    c1: float = 1.0
    p: float = 3.0

    def seconds(self, dim: int, rank: int = 0) -> float:
        """Cost of one dense factor, of r columns of it in proportion; a diagonal one (width 0) is
        free."""
        share = rank / dim if rank else 1.0
        return self.c0 + self.c1 * share * float(dim) ** self.p if dim else 0.0

    def a_seconds(self, layer: LayerShape) -> float:
        """Cost of the layer's input factors."""
        return layer.copies * layer.a_blocks * self.seconds(layer.a_dim, layer.a_rank)

    def g_seconds(self, layer: LayerShape) -> float:
        """Cost of the layer's output-gradient factors."""
        return layer.copies * layer.g_blocks * self.seconds(layer.g_dim, layer.g_rank)


COMPUTE = CostModel(c0=0.0, c1=1.0, p=3.0)
"""Cubic cost: balances arithmetic."""
MEMORY = CostModel(c0=0.0, c1=1.0, p=2.0)
"""Quadratic cost: balances the memory of inverse workers."""
EIGH_ONE_CORE = CostModel(c0=3.0e-4, c1=5.3e-10, p=2.85)
"""`eigh` on one AVX2 core (widths 65 to 2304: 0.4 ms to 2.1 s); the default without calibration."""
CHOLESKY_ONE_CORE = CostModel(c0=6.1e-5, c1=4.6e-10, p=2.65)
"""Cholesky inverse on one AVX2 core (widths 65 to 2304: 0.1 ms to 0.39 s)."""


def default_costs(method: Method) -> CostModel:
    """The stored measurement of a method, used before a calibration."""
    return EIGH_ONE_CORE if method in EIGEN else CHOLESKY_ONE_CORE


def fit_costs(dims: Sequence[int], seconds: Sequence[float]) -> CostModel:
    """Fit c0 + c1 d^p to measured times, in relative error.

    Absolute error would let the widest factor decide alone. For every p of a grid c0 and c1 are the
    non-negative least-squares solution; the p with the least error wins.

    Raises:
        UsageError: If there are fewer than two different widths, or a time is not positive.
    """
    import numpy as np
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    d = np.asarray(dims, dtype=np.float64)
    t = np.asarray(seconds, dtype=np.float64)
    if len(set(dims)) < 2 or len(d) != len(t) or not np.all(t > 0) or not np.all(d > 0):
        raise UsageError(
            "a cost model needs positive times of at least two factor widths",
            given=f"widths {list(dims)}, seconds {list(seconds)}",
        )
    fits = []
    for p in np.linspace(1.0, 3.5, 101):
        largest = (d**p).max()
        columns = np.stack([np.ones_like(d), d**p / largest], axis=1)
        (c0, c1), error = nnls(columns / t[:, None], np.ones_like(t))
        fits.append((float(error), CostModel(float(c0), float(c1 / largest), float(p))))
    return min(fits, key=lambda fit: fit[0])[1]
