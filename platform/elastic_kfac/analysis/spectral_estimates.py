"""Estimates from Hessian products (trace, density, single samples) and from K-FAC's factors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_kfac.analysis.hessian import SOLO, Batch, Hessian, Operator
from elastic_kfac.analysis.spectrum import lanczos, random_vector, top_by_lanczos
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import UsageError
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.tasks.task import SumLoss


@dataclass(frozen=True)
class TraceEstimate:
    """Hutchinson's estimate of the trace, with its standard error (NaN for one draw)."""

    mean: float
    standard_error: float
    draws: int


@dataclass(frozen=True)
class SpectralDensity:
    """Point masses that approximate the density of eigenvalues (stochastic Lanczos quadrature)."""

    nodes: tuple[tuple[float, ...], ...]
    """Ritz values of each draw."""
    weights: tuple[tuple[float, ...], ...]
    """Masses of the Ritz values; they add up to 1 in each draw."""
    size: int

    def moment(self, order: int) -> float:
        """Estimate of trace(H^order) / size."""
        sums = [
            sum(w * x**order for x, w in zip(nodes, weights, strict=True))
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        return sum(sums) / len(sums)

    @property
    def trace(self) -> float:
        """Estimate of the trace."""
        return self.size * self.moment(1)

    def curve(self, points: int = 200, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Grid and density [points]: the masses as Gaussians of standard deviation `width` (None: a
        hundredth of the range). The integral is 1."""
        nodes = torch.tensor([x for part in self.nodes for x in part], dtype=torch.float64)
        masses = torch.tensor([w for part in self.weights for w in part], dtype=torch.float64)
        masses /= len(self.nodes)
        low, high = float(nodes.min()), float(nodes.max())
        if width is None:
            width = max(high - low, abs(high), 1e-12) / 100
        grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64)
        bells = torch.exp(-0.5 * ((grid[:, None] - nodes[None, :]) / width).square())
        return grid, (bells @ masses) / (width * math.sqrt(2 * math.pi))


def trace(
    operator: Operator,
    *,
    seed: int = 0,
    min_draws: int = 10,
    max_draws: int = 100,
    tolerance: float = 1e-3,
) -> TraceEstimate:
    """Hutchinson's estimate with Rademacher vectors; stops when the relative change of the mean is
    below `tolerance`."""
    samples: list[float] = []
    mean = math.nan
    while len(samples) < max_draws:
        vector = random_vector(operator, seed, len(samples), rademacher=True)
        samples.append(float(torch.dot(vector, operator.product(vector))))
        old, mean = mean, math.fsum(samples) / len(samples)
        settled = abs(mean - old) < tolerance * (abs(old) + 1e-6)
        if operator.expired or (settled and len(samples) >= min_draws):
            break
    error = math.nan
    if len(samples) > 1:
        error = statistics.stdev(samples) / math.sqrt(len(samples))
    return TraceEstimate(mean, error, len(samples))


def density(
    operator: Operator, *, seed: int = 0, draws: int = 5, steps: int = 30
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: one Rademacher vector and one Lanczos run per draw."""
    nodes: list[tuple[float, ...]] = []
    weights: list[tuple[float, ...]] = []
    for index in range(draws):
        start = random_vector(operator, seed, index, rademacher=True)
        values, mixes = lanczos(operator, steps, start).eigen()
        nodes.append(tuple(values.tolist()))
        weights.append(tuple(mixes[0].square().tolist()))
        if operator.expired:
            break
    return SpectralDensity(tuple(nodes), tuple(weights), operator.size)


def one_sample_eigenvalues(
    model: nn.Module,
    loss_sum: SumLoss,
    sample: Callable[[int], Batch],
    samples: int,
    *,
    top: int = 20,
    communicator: Communicator = SOLO,
    max_steps: int = 100,
    tolerance: float = 1e-3,
    time_budget_s: float | None = None,
) -> Tensor:
    """Top eigenvalues of the Hessian of each of `samples` single samples [samples, top].

    By Lanczos, because such a Hessian has pairs of nearly ±λ that stop power iteration early. Ranks
    share the samples; every rank gets the whole table. `sample(i)` is a batch of one, or empty to skip
    it. Samples beyond a rank's time budget are left out.
    """
    if samples < 1:
        raise UsageError("one-sample spectra need at least one sample")
    began = time.monotonic()
    device = next(model.parameters()).device
    # The last column marks the rows that count.
    table = torch.zeros(samples, top + 1, dtype=torch.float64, device=device)
    for index in range(communicator.rank, samples, communicator.world_size):
        if time_budget_s is not None and time.monotonic() - began > time_budget_s:
            break
        batch = sample(index)
        if not len(batch[1]):
            continue
        hessian = Hessian(model, loss_sum, [batch])
        found = top_by_lanczos(hessian, top, seed=index, max_steps=max_steps, tolerance=tolerance)
        # A Hessian of low rank may have fewer nonzero eigenvalues than requested.
        values = torch.tensor(found.values, dtype=torch.float64)
        table[index, : len(values)] = values
        table[index, -1] = 1
    communicator.all_reduce(table, tag="hessian")
    return table[table[:, -1] > 0, :-1].cpu()


@torch.no_grad()
def kfac_eigenvalue(
    kfac: KFAC,
    *,
    communicator: Communicator = SOLO,
    tag: str = "hessian",
) -> float:
    """λ̂ = max_i max(d_A)·max(d_G), the top eigenvalue of K-FAC's curvature. Collective.

    The `inverse` method keeps no eigenvalues, so its factors are decomposed here, distributed over the
    ranks. NaN before the first factor update.
    """
    rank, world_size = communicator.rank, communicator.world_size
    states = [
        state
        for layer, state in zip(kfac.layers, kfac.states, strict=True)
        if layer.factor_names == ("A", "G")
    ]
    device = kfac.layers[0].device
    # The last column says whether a rank has any factors.
    table = torch.zeros(world_size, len(states) + 1, dtype=torch.float64, device=device)
    table[rank, -1] = any(state.factor_updates for state in states)
    for index, state in enumerate(states):
        if kfac.options.method in ("eigen", "ekfac"):
            spectra = [state.decomposition.get(f"{name}_values") for name in ("A", "G")]
            if spectra[1] is not None:  # without the floor that was decomposed with G
                spectra[1] = spectra[1] - state.floor
        elif state.factor_updates and index % world_size == rank:
            spectra = [_spectrum(state.factors[name]) for name in ("A", "G")]
        else:
            continue
        if spectra[0] is not None and spectra[1] is not None:
            tops = spectra[0].amax(-1).double() * spectra[1].amax(-1).double()
            table[rank, index] = tops.amax()
    communicator.all_reduce(table, tag=tag)
    return float(table[:, :-1].amax()) if states and table[:, -1].any() else math.nan


def _spectrum(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 1 else torch.linalg.eigvalsh(factor)
