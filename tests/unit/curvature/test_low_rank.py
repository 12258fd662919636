"""Sides that keep r eigenpairs and the mean of the rest, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elastic_kfac.curvature.inverses import leading_eigen
from elastic_kfac.curvature.preconditioning import EigenForm
from elastic_kfac.curvature.sides import LowRank, Side, Whole, bounded

GAMMA = 0.02
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def factor(width: int, rank: int, seed: int) -> Tensor:
    """`rank` large eigenvalues, far above the others, which are not equal."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(width, width, dtype=torch.double, generator=generator)
    vectors = torch.linalg.qr(draw).Q
    values = torch.rand(width, dtype=torch.double, generator=generator) * 0.02
    values[:rank] += torch.linspace(1, 5, rank)
    return (vectors * values) @ vectors.T


def flattened(dense: Tensor, rank: int) -> Tensor:
    """The dense matrix whose smallest d − r eigenvalues are their mean."""
    values, vectors = torch.linalg.eigh(dense)
    values[: len(values) - rank] = values[: len(values) - rank].mean()
    return (vectors * values) @ vectors.T


@pytest.mark.parametrize(
    ("a_rank", "g_rank", "precompute"),
    [(5, None, False), (None, 3, False), (5, 3, False), (5, 3, True), (19, 13, False)],
)
def test_precondition_equals_a_dense_solve_with_a_flat_tail(
    a_rank: int | None, g_rank: int | None, precompute: bool
) -> None:
    a, g = factor(20, 5, 0), factor(14, 3, 1)
    sides: list[Side] = [
        Whole(len(x)) if rank is None else LowRank(len(x), rank)
        for x, rank in ((a, a_rank), (g, g_rank))
    ]
    form = EigenForm(*sides, precompute=precompute)
    held = form.decompose({"A": a, "G": g}, ("A", "G"), GAMMA, {})
    assert {name: tuple(t.shape) for name, t in held.items()} == form.shapes
    dense_a = a if a_rank is None else flattened(a, a_rank)
    dense_g = g if g_rank is None else flattened(g, g_rank)
    d = torch.randn(14, 20, dtype=torch.double)
    dense = torch.kron(dense_g, dense_a) + GAMMA * torch.eye(280, dtype=torch.double)
    expected = torch.linalg.solve(dense, d.reshape(-1)).reshape(14, 20)
    torch.testing.assert_close(form.precondition(held, d, GAMMA), expected, **TOLERANCE)


def test_trace_is_kept_where_the_spectrum_has_no_gap() -> None:
    x = factor(30, 30, 2)
    values, vectors = LowRank(30, 4).eigen(x)
    assert vectors is not None
    dense = (vectors * values[:-1]) @ vectors.T + values[-1] * (
        torch.eye(30, dtype=torch.double) - vectors @ vectors.T
    )
    torch.testing.assert_close(dense.trace(), x.trace(), **TOLERANCE)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.double))


def test_iteration_converges_over_calls_that_begin_at_the_last_basis() -> None:
    x = factor(60, 60, 3)
    exact = torch.linalg.eigvalsh(x)[-6:]
    vectors, errors = None, []
    for _ in range(20):
        values, vectors = leading_eigen(x, 6, vectors)
        errors.append(float((values - exact).abs().max() / exact[-1]))
    assert errors[0] < 0.05
    assert errors[-1] < 1e-4
    assert errors == sorted(errors, reverse=True)


def test_rank_deficient_factor_is_exact_from_its_rank_on_and_the_same_bits_again() -> None:
    rows = torch.randn(50, 7)
    x = rows @ rows.T
    values, vectors = LowRank(50, 7).eigen(x)
    assert vectors is not None
    torch.testing.assert_close((vectors * values[:-1]) @ vectors.T, x, rtol=1e-4, atol=1e-4)
    assert values[-1] < 1e-5
    again = LowRank(50, 7).eigen(x)
    assert torch.equal(values, again[0])
    assert torch.equal(vectors, again[1])
    assert all(part.isfinite().all() for part in LowRank(50, 7).eigen(torch.zeros(50, 50)))


def test_only_the_lower_triangle_counts() -> None:
    x = factor(20, 5, 0)
    broken = x + torch.triu(torch.ones_like(x), 1)
    for one, other in zip(leading_eigen(x, 5), leading_eigen(broken, 5), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_side_by_width() -> None:
    assert bounded(17, 16, biases=1, rank=4) == Whole(17)
    assert bounded(18, 16, biases=1, rank=4) == LowRank(18, 4)
    assert bounded(18, 16, biases=1, rank=18) == Whole(18)
    assert bounded(18, 16, groups=2, rank=4).kept.endswith("blocks of 1")
    assert bounded(1000, 16, rank=4).kept == "the diagonal"
