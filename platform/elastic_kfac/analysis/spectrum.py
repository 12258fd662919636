"""Eigenvalues of a symmetric operator from its products alone: power iteration and Lanczos.

Start vectors are functions of a seed, and every rank does the same arithmetic on the same products:
all ranks agree, and every world size gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kfac.analysis.hessian import Operator
from elastic_kfac.errors import NumericalError, UsageError


@dataclass(frozen=True)
class Eigenpairs:
    """The top eigenvalues by magnitude, largest first, with their unit vectors."""

    values: tuple[float, ...]
    """Signed: at a saddle point the largest |λ| may be negative."""
    vectors: Tensor
    """[k, size]."""
    residuals: tuple[float, ...]
    """‖Hv − λv‖: some eigenvalue lies this close to λ, converged or not."""
    converged: tuple[bool, ...]
    products: int


@dataclass(frozen=True)
class Extremes:
    """The largest and the smallest eigenvalue, signed."""

    largest: float
    smallest: float
    converged: bool
    """Whether both residuals are below tolerance times the larger magnitude."""


@dataclass(frozen=True)
class Tridiagonal:
    """The result of Lanczos iterations: T = basis · H · basisᵀ."""

    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]
    """One shorter than the diagonal."""
    residual: float
    """Norm of the next, unnormalised Lanczos vector; 0 when the basis spans an invariant space."""
    basis: Tensor
    """[steps, size], orthonormal rows."""

    @property
    def is_finite(self) -> bool:
        """Whether every product was finite."""
        return all(map(math.isfinite, (*self.diagonal, self.residual)))

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Ritz values [steps], ascending, and eigenvectors of T [steps, steps], on the CPU.

        Raises:
            NumericalError: If a product was not finite.
        """
        if not self.is_finite:
            raise NumericalError("a Hessian product is not finite", change="lower optimizer.lr")
        matrix = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        off = torch.tensor(self.off_diagonal, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
        return torch.linalg.eigh(matrix)


def random_vector(operator: Operator, seed: int, index: int, *, rademacher: bool = False) -> Tensor:
    """Start vector `index` of a seed, the same on every rank and device [size]."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    if rademacher:
        signs = torch.randint(0, 2, (operator.size,), generator=generator)
        vector = (2 * signs - 1).double()
    else:
        vector = torch.randn(operator.size, dtype=torch.float64, generator=generator)
    return vector.to(operator.device, operator.dtype)


def top_eigenvalues(
    operator: Operator,
    count: int = 1,
    *,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> Eigenpairs:
    """Top `count` eigenvalues by magnitude, by power iteration with deflation.

    Stops at |λ − λ_old| < tolerance·(|λ_old| + 1e-6), the rule of Yao et al. (2018). For two
    eigenvalues of nearly equal magnitude and opposite sign that is too early: the residual shows it, and
    `top_by_lanczos` avoids it. Returns unconverged values when the operator's time budget is spent,
    and NaN after a non-finite product.

    Raises:
        UsageError: If more eigenvalues are asked for than there are.
    """
    _check_count(operator, count)
    found: list[tuple[float, Tensor, float, bool]] = []
    products = 0
    for index in range(count):
        others = (
            torch.stack([vector for _, vector, _, _ in found])
            if found
            else torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        )
        vector = _unit(_without(random_vector(operator, seed, index), others))
        value, residual, done = math.nan, math.nan, False
        for _ in range(max_iterations):
            image = operator.product(vector)
            products += 1
            old, value = value, _dot(vector, image)
            # In every iteration: rounding lets found directions grow back.
            image = _without(image, others)
            norm = float(torch.linalg.vector_norm(image))
            residual = float(torch.linalg.vector_norm(image - value * vector))
            done = norm == 0 or abs(value - old) < tolerance * (abs(old) + 1e-6)
            if done or operator.expired or not math.isfinite(norm):
                break
            vector = image / norm
        found.append((value, vector, residual, done))
        if operator.expired or not math.isfinite(value):
            break
    return _eigenpairs(found, products)


def top_by_lanczos(
    operator: Operator,
    count: int = 1,
    *,
    seed: int = 0,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> Eigenpairs:
    """Top `count` eigenvalues by magnitude, by Lanczos iterations (one product each).

    Stops when every residual is below tolerance·|λ|. Takes far fewer products than power iteration
    for many eigenvalues and separates +λ from −λ, but keeps one vector per step and may return only one
    copy of a multiple eigenvalue.

    Raises:
        UsageError: If more eigenvalues are asked for than there are.
    """
    _check_count(operator, count)
    result = lanczos(
        operator,
        max_steps,
        random_vector(operator, seed, 0),
        enough=lambda so_far: _is_enough(so_far, count, tolerance),
    )
    return _largest(result, count, tolerance)


def spectrum(
    operator: Operator,
    count: int = 1,
    *,
    seed: int = 0,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> tuple[Eigenpairs, Extremes]:
    """Top `count` eigenvalues by magnitude and both ends of the spectrum, from one Lanczos run.

    Raises:
        UsageError: If more eigenvalues are asked for than there are.
        NumericalError: If a product was not finite.
    """
    _check_count(operator, count)

    def enough(so_far: Tridiagonal) -> bool:
        return _is_enough(so_far, count, tolerance) and _ends(so_far, tolerance).converged

    result = lanczos(operator, max_steps, random_vector(operator, seed, 0), enough=enough)
    return _largest(result, count, tolerance), _ends(result, tolerance)


def _is_enough(so_far: Tridiagonal, count: int, tolerance: float) -> bool:
    # Checking costs a small eigenproblem, so not after every step.
    steps = len(so_far.diagonal)
    return steps >= count and steps % 5 == 0 and all(_settled(so_far, count, tolerance)[1])


def _largest(result: Tridiagonal, count: int, tolerance: float) -> Eigenpairs:
    found: list[tuple[float, Tensor, float, bool]] = []
    if not result.is_finite:
        return _eigenpairs([(math.nan, result.basis[0], math.nan, False)], len(result.diagonal))
    order, settled = _settled(result, count, tolerance)
    values, mixes = result.eigen()
    for index, done in zip(order, settled, strict=True):
        vector = _unit(mixes[:, index].to(result.basis) @ result.basis)
        residual = abs(result.residual * float(mixes[-1, index]))
        found.append((float(values[index]), vector, residual, done))
    return _eigenpairs(found, len(result.diagonal))


def _settled(result: Tridiagonal, count: int, tolerance: float) -> tuple[list[int], list[bool]]:
    """Indices of the top Ritz values by magnitude, and whether each has converged."""
    values, mixes = result.eigen()
    order = values.abs().argsort(descending=True)[:count].tolist()
    residuals = (result.residual * mixes[-1]).abs()
    return order, [bool(residuals[i] <= tolerance * values[i].abs() + 1e-12) for i in order]


def _check_count(operator: Operator, count: int) -> None:
    if not 1 <= count <= operator.size:
        raise UsageError("too many eigenvalues", given=count, allowed=f"1 to {operator.size}")


def _eigenpairs(found: Sequence[tuple[float, Tensor, float, bool]], products: int) -> Eigenpairs:
    # NaN sorts first, so that the caller sees it.
    ranked = sorted(found, key=lambda pair: -abs(pair[0]) if pair[0] == pair[0] else -math.inf)
    return Eigenpairs(
        values=tuple(pair[0] for pair in ranked),
        vectors=torch.stack([pair[1] for pair in ranked]),
        residuals=tuple(pair[2] for pair in ranked),
        converged=tuple(pair[3] for pair in ranked),
        products=products,
    )


def _ends(result: Tridiagonal, tolerance: float) -> Extremes:
    values, mixes = result.eigen()
    smallest, largest = float(values[0]), float(values[-1])
    residual = result.residual * max(abs(float(mixes[-1, end])) for end in (0, -1))
    scale = max(abs(smallest), abs(largest))
    return Extremes(largest, smallest, converged=residual <= tolerance * scale)


def lanczos(
    operator: Operator,
    steps: int,
    start: Tensor,
    *,
    enough: Callable[[Tridiagonal], bool] = lambda result: False,
) -> Tridiagonal:
    """Lanczos iterations with full re-orthogonalisation, twice, from `start` [size].

    Stops after `steps`, when the space is invariant, or when `enough` returns True.
    """
    if steps < 1:
        raise UsageError("Lanczos needs at least one step", given=steps)
    steps = min(steps, operator.size)
    # One block: a list that is stacked at the end would take the memory twice.
    basis = start.new_empty(steps, operator.size)
    basis[0] = _unit(start)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    scale = 0.0
    while True:
        newest = basis[len(diagonal)]
        image = operator.product(newest)
        diagonal.append(_dot(newest, image))
        done_rows = basis[: len(diagonal)]
        image = _without(image, done_rows)
        norm = float(torch.linalg.vector_norm(image))
        scale = max(scale, abs(diagonal[-1]), norm)
        # Below rounding only noise is left: the space is invariant.
        if norm <= torch.finfo(operator.dtype).eps * operator.size**0.5 * scale:
            norm = 0.0
        result = Tridiagonal(tuple(diagonal), tuple(off_diagonal), norm, done_rows)
        done = len(diagonal) >= steps or norm == 0 or not math.isfinite(norm)
        if done or operator.expired or enough(result):
            return result
        off_diagonal.append(norm)
        basis[len(diagonal)] = image / norm


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)


def _without(vector: Tensor, found: Tensor) -> Tensor:
    """`vector` minus its projections on orthonormal rows; twice, because once leaves rounding."""
    if len(found):
        for _ in range(2):
            vector = vector - found.T @ (found @ vector)
    return vector
