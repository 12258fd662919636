"""Eigenvalues of a symmetric operator from its products alone (spec 6.1).

Start vectors are functions of a seed, and every rank does the same arithmetic on the same products, so
that all ranks agree and every world size gives the same numbers.
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
    """Eigenvalues of the largest size first, with their unit vectors."""

    values: tuple[float, ...]
    """With sign: on a saddle the largest |λ| may be negative."""
    vectors: Tensor
    """[k, size]."""
    residuals: tuple[float, ...]
    """‖Hv − λv‖: some eigenvalue lies this close to λ, whatever the stopping rule said."""
    converged: tuple[bool, ...]
    products: int


@dataclass(frozen=True)
class Extremes:
    """Both ends of the spectrum."""

    largest: float
    smallest: float
    largest_vector: Tensor
    smallest_vector: Tensor
    converged: bool
    products: int


@dataclass(frozen=True)
class Tridiagonal:
    """What Lanczos iterations leave: T = basis · H · basisᵀ."""

    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]
    """One shorter than the diagonal."""
    residual: float
    """Size of what H adds to the space that the basis spans; 0 when the space is invariant."""
    basis: Tensor
    """[steps, size], orthonormal rows."""

    @property
    def is_finite(self) -> bool:
        """Whether every product was."""
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
    """The eigenvalues of the largest size by power iteration with deflation.

    Stops at |λ − λ_old| < tolerance·(|λ_old| + 1e-6), the published rule; where two eigenvalues have
    nearly the same size and opposite signs it stops too early, which the residual shows and
    `top_by_lanczos` avoids. When the time budget of the operator is spent it returns what it has, not
    converged. A non-finite product gives NaN.

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
    """The eigenvalues of the largest size by Lanczos iterations (one product each).

    Goes on until every residual is below tolerance·|λ|. Far fewer products than power iteration for
    many eigenvalues, and it tells +λ from −λ; it keeps one vector per step, and of an eigenvalue with
    several eigenvectors it may show one only.

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
    """The eigenvalues of the largest size and both ends, from one and the same Lanczos run.

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
    # A look costs a small eigenproblem, so not after every step.
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
    """Indices of the largest Ritz values by size, and whether each residual is small enough."""
    values, mixes = result.eigen()
    order = values.abs().argsort(descending=True)[:count].tolist()
    residuals = (result.residual * mixes[-1]).abs()
    return order, [bool(residuals[i] <= tolerance * values[i].abs() + 1e-12) for i in order]


def _check_count(operator: Operator, count: int) -> None:
    if not 1 <= count <= operator.size:
        raise UsageError("too many eigenvalues", given=count, allowed=f"1 to {operator.size}")


def _eigenpairs(found: Sequence[tuple[float, Tensor, float, bool]], products: int) -> Eigenpairs:
    # Not a number sorts first: it is what the caller has to see.
    ranked = sorted(found, key=lambda pair: -abs(pair[0]) if pair[0] == pair[0] else -math.inf)
    return Eigenpairs(
        values=tuple(pair[0] for pair in ranked),
        vectors=torch.stack([pair[1] for pair in ranked]),
        residuals=tuple(pair[2] for pair in ranked),
        converged=tuple(pair[3] for pair in ranked),
        products=products,
    )


class Affine:
    """`scale·H + shift·I`: what power iteration needs to find one end of an indefinite spectrum."""

    def __init__(self, operator: Operator, scale: float, shift: float) -> None:
        self._operator, self._scale, self._shift = operator, scale, shift

    @property
    def size(self) -> int:
        return self._operator.size

    @property
    def dtype(self) -> torch.dtype:
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        return self._operator.device

    @property
    def expired(self) -> bool:
        return self._operator.expired

    def product(self, vector: Tensor) -> Tensor:
        """scale·Hv + shift·v."""
        return self._operator.product(vector).mul_(self._scale).add_(vector, alpha=self._shift)


def extremes_by_shift(
    operator: Operator, *, seed: int = 0, max_iterations: int = 100, tolerance: float = 1e-3
) -> Extremes:
    """Both ends by power iteration on H, H + |λ|I and |λ|I − H (spec 6.1)."""
    settings = {"seed": seed, "max_iterations": max_iterations}
    largest_size = top_eigenvalues(operator, tolerance=tolerance, **settings)
    size = abs(largest_size.values[0])
    up = top_eigenvalues(Affine(operator, 1.0, size), tolerance=tolerance, **settings)
    down = top_eigenvalues(Affine(operator, -1.0, size), tolerance=tolerance, **settings)
    return Extremes(
        largest=up.values[0] - size,
        smallest=size - down.values[0],
        largest_vector=up.vectors[0],
        smallest_vector=down.vectors[0],
        converged=up.converged[0] and down.converged[0],
        products=largest_size.products + up.products + down.products,
    )


def extremes(
    operator: Operator, *, seed: int = 0, steps: int = 40, tolerance: float = 1e-3
) -> Extremes:
    """Both ends at once by Lanczos iterations; converged when both residuals are below
    tolerance times the larger end."""
    return _ends(lanczos(operator, steps, random_vector(operator, seed, 0)), tolerance)


def _ends(result: Tridiagonal, tolerance: float) -> Extremes:
    values, mixes = result.eigen()
    ends = [0, -1]
    residual = max(abs(result.residual * float(mixes[-1, end])) for end in ends)
    scale = max(abs(float(values[end])) for end in ends)
    basis_mixes = mixes[:, ends].to(result.basis)
    smallest_vector, largest_vector = (_unit(v) for v in basis_mixes.T @ result.basis)
    return Extremes(
        largest=float(values[-1]),
        smallest=float(values[0]),
        largest_vector=largest_vector,
        smallest_vector=smallest_vector,
        converged=residual <= tolerance * scale,
        products=len(result.diagonal),
    )


def lanczos(
    operator: Operator,
    steps: int,
    start: Tensor,
    *,
    enough: Callable[[Tridiagonal], bool] = lambda result: False,
) -> Tridiagonal:
    """Lanczos iterations with full re-orthogonalisation, twice, from `start` [size].

    Ends after `steps`, when the space is invariant, or when `enough` says so.
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
        # Below rounding there is nothing left but noise: the space is invariant.
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
    """`vector` minus its parts along orthonormal rows; twice, because once leaves rounding."""
    if len(found):
        for _ in range(2):
            vector = vector - found.T @ (found @ vector)
    return vector
