"""DistNewton: merge workers by the curvature that their gradients reveal (Arnold and Wang 2017).

Worker k contributes parameters θ_k and the gradient g_k there. Differences of gradients are H times
differences of parameters, so m workers determine H on a space of m − 1 dimensions: the merge takes a
Newton step on that space and a gradient step outside it. Only m×m matrices are decomposed, and vectors
over the parameters are read in blocks, so the merge allocates nothing of size n×m.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError, NumericalError, UsageError

Mode = Literal["paper", "sym", "abs"]

SMALLEST_RATIO = 1e-6
"""Singular values below this fraction of the largest one are rounding errors, for any λ."""
_NONE_FINITE = "no worker contributed finite parameters and gradients to a merge"
SMALLEST_SPREAD = 1e-12
"""‖Θ‖/‖θ̄‖ up to which the workers count as being at the same point."""


@dataclass(frozen=True)
class DistNewton:
    """Options of a merge.

    `paper` is equations 3 and 4; `sym` uses the symmetrised curvature of the space; `abs` takes the
    absolute values of its eigenvalues, so that a saddle repels.
    """

    lr: float
    """τ of equation 2, or τ_N on the Newton part when `gradient_lr` is set."""
    gradient_lr: float | None = None
    """τ_S of the gradient step outside the space; None takes `lr`."""
    ratio: float = 0.05
    """λ: directions with σ_k < λσ_1 are left to the gradient step."""
    mode: Mode = "paper"
    cap: bool = True
    """Limit τ_S to 1/σ̂ (with one τ: the whole step)."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError("DistNewton lr must be positive", given=self.lr)
        if self.gradient_lr is not None and not self.gradient_lr > 0:
            raise ConfigError("DistNewton gradient_lr must be positive", given=self.gradient_lr)
        if not 0 < self.ratio < 1:
            raise ConfigError(
                "DistNewton ratio out of range", given=self.ratio, allowed="0 < λ < 1"
            )
        if self.mode not in ("paper", "sym", "abs"):
            raise ConfigError("unknown DistNewton mode", given=self.mode, allowed="paper, sym, abs")


@dataclass(frozen=True)
class Merge:
    """Merged parameters with the facts of the merge."""

    parameters: Tensor
    """[n]."""
    rank: int
    """j: dimensions of the Newton part; 0 is averaged gradient descent."""
    sigma: float
    """σ̂: a lower bound of the largest singular value of H; 0 when nothing is known."""
    lr: float
    """τ (τ_N) as used, after the cap."""
    gradient_lr: float
    """τ_S as used, after the cap."""
    workers: int
    """Finite contributions, which took part."""


@dataclass(frozen=True)
class _Grams:
    """Inner products of the centred columns, double precision."""

    gradients: Tensor
    """GᵀG [m, m]."""
    cross: Tensor
    """GᵀΘ [m, m]."""
    parameters: Tensor
    """ΘᵀΘ [m, m]."""
    mean_gradient: Tensor
    """Gᵀḡ [m]."""
    mean_size: Tensor
    """‖θ̄‖², a scalar."""

    def flat(self) -> Tensor:
        """Everything as one vector [3m² + m + 1], which adds up over shards."""
        parts = (self.gradients, self.cross, self.parameters, self.mean_gradient, self.mean_size)
        return torch.cat([part.reshape(-1) for part in parts])

    @classmethod
    def from_flat(cls, flat: Tensor, m: int) -> _Grams:
        """The inverse of `flat`."""
        gradients, cross, parameters, mean_gradient, mean_size = flat.split(
            [m * m, m * m, m * m, m, 1]
        )
        return cls(
            gradients.view(m, m),
            cross.view(m, m),
            parameters.view(m, m),
            mean_gradient,
            mean_size,
        )


@dataclass(frozen=True)
class _Coefficients:
    """The step as combinations of columns: τ_S(ḡ − G·c) + τ_N(Θ·t + G·d)."""

    rank: int
    removed: Tensor
    """c [m]."""
    from_parameters: Tensor
    """t [m]."""
    from_gradients: Tensor
    """d [m]."""
    sigma: float


def merge(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    options: DistNewton,
    *,
    block_size: int = 1 << 20,
) -> Merge:
    """Merges contributions of this process.

    Args:
        parameters: θ_k [n] of each worker.
        gradients: g_k [n] of each worker, at its own θ_k.
        block_size: Elements processed at a time.

    Raises:
        UsageError: If the contributions differ in length or number.
        NumericalError: If none is finite.
    """
    shapes = {tuple(t.shape) for t in (*parameters, *gradients)}
    if not parameters or len(parameters) != len(gradients) or len(shapes) != 1:
        raise UsageError(
            "a merge needs one gradient per worker, all flat and of one length",
            given=f"{len(parameters)} parameters, {len(gradients)} gradients, shapes {shapes}",
        )
    pairs = list(zip(parameters, gradients, strict=True))
    finite = [pair for pair in pairs if bool(torch.isfinite(pair[0].sum() + pair[1].sum()).item())]
    if not finite:
        raise NumericalError(_NONE_FINITE)
    thetas, grads = [pair[0] for pair in finite], [pair[1] for pair in finite]
    coefficients = _solve(_grams(thetas, grads, block_size), options)
    rates = _rates(options, coefficients.sigma)
    merged = torch.empty_like(thetas[0])
    _apply(merged, thetas, grads, coefficients, rates, block_size)
    return Merge(merged, coefficients.rank, coefficients.sigma, *rates, workers=len(finite))


def merge_ranks(
    parameters: Tensor,
    gradient: Tensor,
    options: DistNewton,
    communicator: Communicator,
    *,
    block_size: int = 1 << 20,
) -> Merge:
    """Merges the contributions of all ranks; every rank gets the same parameters. Collective.

    Each rank processes one shard of n for all workers: an all-to-all of 2n elements per rank, ONE
    all-reduce of 3m² + m + 1 numbers, an all-gather of the result. A rank with non-finite numbers takes
    part in the collectives but not in the merge.

    Args:
        parameters: This rank's θ [n].
        gradient: This rank's g [n], at its own θ.
    """
    m, size = communicator.world_size, parameters.numel()
    if gradient.shape != parameters.shape or parameters.dim() != 1:
        raise UsageError(
            "a merge needs flat parameters and a gradient of the same length",
            given=f"{tuple(parameters.shape)} and {tuple(gradient.shape)}",
        )
    shard = -(-size // m)
    payload = parameters.new_zeros(m, 2 * shard + 1)
    for row, vector in enumerate((parameters, gradient)):
        padded = torch.nn.functional.pad(vector, (0, m * shard - size)).view(m, shard)
        payload[:, row * shard : (row + 1) * shard] = padded
    # The flag travels with every shard, so that all ranks leave out the same workers.
    payload[:, -1] = torch.isfinite(parameters.sum() + gradient.sum()).to(payload.dtype)
    received = communicator.all_to_all(payload, tag="distnewton")
    kept = [row for row in received if float(row[-1]) == 1.0]
    if not kept:
        raise NumericalError(_NONE_FINITE)
    thetas = [row[:shard] for row in kept]
    grads = [row[shard : 2 * shard] for row in kept]
    flat = _grams(thetas, grads, block_size).flat()
    communicator.all_reduce(flat, tag="distnewton").wait()
    coefficients = _solve(_Grams.from_flat(flat, len(kept)), options)
    rates = _rates(options, coefficients.sigma)
    own = torch.empty_like(thetas[0])
    _apply(own, thetas, grads, coefficients, rates, block_size)
    merged = torch.cat(communicator.all_gather(own, tag="distnewton"))[:size]
    return Merge(merged, coefficients.rank, coefficients.sigma, *rates, workers=len(kept))


def _blocks(
    thetas: Sequence[Tensor], grads: Sequence[Tensor], block_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(place, Θ block, G block) [m, block] in double precision, not centred."""
    for start in range(0, thetas[0].numel(), block_size):
        part = slice(start, start + block_size)
        yield (
            part,
            torch.stack([theta[part] for theta in thetas]).double(),
            torch.stack([grad[part] for grad in grads]).double(),
        )


def _grams(thetas: Sequence[Tensor], grads: Sequence[Tensor], block_size: int) -> _Grams:
    m = len(thetas)
    sums = torch.zeros(3 * m * m + m + 1, dtype=torch.float64, device=thetas[0].device)
    for _, theta, grad in _blocks(thetas, grads, block_size):
        theta_mean, grad_mean = theta.mean(0), grad.mean(0)
        theta, grad = theta - theta_mean, grad - grad_mean
        sums += _Grams(
            grad @ grad.T,
            grad @ theta.T,
            theta @ theta.T,
            grad @ grad_mean,
            theta_mean.square().sum(),
        ).flat()
    return _Grams.from_flat(sums, m)


def _solve(grams: _Grams, options: DistNewton) -> _Coefficients:
    """The m×m algebra of m workers, on the CPU; every rank computes the same."""
    device = grams.gradients.device
    cpu = _Grams.from_flat(grams.flat().cpu(), len(grams.mean_gradient))
    m = len(cpu.mean_gradient)
    squares, vectors = torch.linalg.eigh(cpu.gradients)
    sigma = squares.clamp(min=0).sqrt().flip(0)
    vectors = vectors.flip(1)
    spread = cpu.parameters.trace().clamp(min=0).sqrt()
    threshold = max(options.ratio, SMALLEST_RATIO) * float(sigma[0])
    together = float(spread) <= SMALLEST_SPREAD * float(cpu.mean_size.sqrt())
    rank = 0
    if float(sigma[0]) > 0 and not together:
        # Centring leaves at most m − 1 directions; the last singular value is rounding noise.
        rank = int((sigma[: m - 1] >= threshold).sum())
    zeros = torch.zeros(m, dtype=torch.float64, device=device)
    if rank == 0:
        return _Coefficients(0, zeros, zeros, zeros, 0.0 if together else _sigma_hat(cpu))
    basis, scale = vectors[:, :rank], sigma[:rank]
    alpha = basis.T @ cpu.mean_gradient / scale
    removed = basis @ (alpha / scale)
    result = _Coefficients(rank, removed.to(device), zeros, zeros, _sigma_hat(cpu))
    if options.mode == "paper":
        return replace(result, from_parameters=removed.to(device))
    inverse = (basis.T @ cpu.cross @ basis) / torch.outer(scale, scale)
    values, turns = torch.linalg.eigh((inverse + inverse.T) / 2)
    if options.mode == "abs":
        values = values.abs()
    newton = turns @ (values * (turns.T @ alpha))
    return replace(result, from_gradients=(basis @ (newton / scale)).to(device))


def _sigma_hat(grams: _Grams) -> float:
    """σ̂ = max_c ‖Gc‖/‖Θc‖ on the space of the workers: at most the largest singular value of H."""
    squares, vectors = torch.linalg.eigh(grams.parameters)
    largest = float(squares[-1])
    # Square roots of rounding are far from zero, hence the square of the smallest ratio.
    kept = squares > max(SMALLEST_RATIO**2, 1e-14) * largest
    kept[0] = False  # centring: one direction is always rounding noise
    if largest <= 0 or not bool(kept.any()):
        return 0.0
    whitening = vectors[:, kept] / squares[kept].sqrt()
    quotient = whitening.T @ grams.gradients @ whitening
    return float(torch.linalg.eigvalsh(quotient)[-1].clamp(min=0).sqrt())


def _rates(options: DistNewton, sigma: float) -> tuple[float, float]:
    newton = options.lr
    gradient = options.lr if options.gradient_lr is None else options.gradient_lr
    if options.cap and sigma > 0:
        gradient = min(gradient, 1 / sigma)
        if options.gradient_lr is None:
            newton = gradient
    return newton, gradient


def _apply(
    out: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    coefficients: _Coefficients,
    rates: tuple[float, float],
    block_size: int,
) -> None:
    newton, gradient = rates
    from_gradients = newton * coefficients.from_gradients - gradient * coefficients.removed
    for part, theta, grad in _blocks(thetas, grads, block_size):
        theta_mean, grad_mean = theta.mean(0), grad.mean(0)
        step = gradient * grad_mean + from_gradients @ (grad - grad_mean)
        step += newton * (coefficients.from_parameters @ (theta - theta_mean))
        out[part] = (theta_mean - step).to(out.dtype)
