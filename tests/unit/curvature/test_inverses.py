"""Decompositions and their application against dense linear algebra."""

from __future__ import annotations

import math

import pytest
import torch

from elastic_kfac.config.kfac import LevenbergMarquardt, MilestoneSchedule, WarmupSchedule
from elastic_kfac.curvature import damping, inverses, preconditioning
from elastic_kfac.curvature.sides import Whole
from elastic_kfac.errors import NumericalError


def spd(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(
        size, 2 * size, dtype=torch.double, generator=torch.Generator().manual_seed(seed)
    )
    return root @ root.t() / size


def test_eigen_precondition_equals_dense_kronecker_inverse() -> None:
    a, g, gamma = spd(5, 0), spd(4, 1), 0.03
    d = torch.randn(4, 5, dtype=torch.double)
    form = preconditioning.EigenForm(Whole(5), Whole(4), precompute=False)
    factors = {"A": a, "G": g}
    held = form.decompose(factors, ("A", "G"), gamma, {})
    assert {name: tuple(t.shape) for name, t in held.items()} == form.shapes
    result = form.precondition(held, d, gamma)
    # Row-major flattening of G X A is (G ⊗ A) vec(X).
    dense = torch.kron(g, a) + gamma * torch.eye(20, dtype=torch.double)
    expected = torch.linalg.solve(dense, d.reshape(-1)).reshape(4, 5)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    # Column-major flattening turns the same thing into A ⊗ G.
    dense = torch.kron(a, g) + gamma * torch.eye(20, dtype=torch.double)
    expected = torch.linalg.solve(dense, d.t().reshape(-1)).reshape(5, 4).t()
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["pi", "sqrt", "plain"])
def test_inverse_precondition_equals_dense_factored_tikhonov(mode: str) -> None:
    a, g, gamma = 7 * spd(5, 0), spd(4, 1), 0.03
    d = torch.randn(4, 5, dtype=torch.double)
    means = [damping.mean_eigenvalue(x) for x in (a, g)]
    widths = [len(x) for x in (a, g)]
    gamma_a, gamma_g = damping.split_damping(
        means, widths, lambda: pytest.fail("conditioned well"), gamma, mode
    )
    pi = math.sqrt((a.trace().item() / 5) / (g.trace().item() / 4))
    expected_a, expected_g = {
        "pi": (pi * math.sqrt(gamma), math.sqrt(gamma) / pi),
        "sqrt": (math.sqrt(gamma), math.sqrt(gamma)),
        "plain": (gamma, gamma),
    }[mode]
    assert gamma_a.item() == pytest.approx(expected_a, rel=1e-12)
    assert gamma_g.item() == pytest.approx(expected_g, rel=1e-12)
    form = preconditioning.InverseForm(Whole(5), Whole(4), mode)
    result = form.precondition(form.decompose({"A": a, "G": g}, ("A", "G"), gamma, {}), d, gamma)
    dense = torch.kron(
        g + expected_g * torch.eye(4, dtype=torch.double),
        a + expected_a * torch.eye(5, dtype=torch.double),
    )
    expected = torch.linalg.solve(dense, d.reshape(-1)).reshape(4, 5)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_two_by_two_inverse_equals_dense() -> None:
    blocks = torch.stack([spd(2, seed) for seed in range(6)])
    expected = torch.linalg.inv(blocks + 0.1 * torch.eye(2, dtype=torch.double))
    torch.testing.assert_close(inverses.two_by_two_inverse(blocks, 0.1), expected)


def test_decompositions_read_the_lower_triangle_only() -> None:
    factor = spd(6, 0)
    spoiled = factor.tril() + torch.full_like(factor, 9.0).triu(1)
    torch.testing.assert_close(inverses.eigen(spoiled)[0], inverses.eigen(factor)[0])
    torch.testing.assert_close(
        inverses.damped_inverse(spoiled, 0.1), inverses.damped_inverse(factor, 0.1)
    )


@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (512,), (785,), (3, 33), (2, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_inverse_is_row_major_and_what_its_triangle_unpacks_to(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    d = shape[-1]
    root = torch.randn(*shape, 2 * d, dtype=dtype)
    factor = root @ root.mT / d
    inverse = inverses.damped_inverse(factor, 0.1)
    assert inverse.is_contiguous()
    assert torch.equal(inverse, inverse.mT)
    dense = torch.linalg.inv(factor.double() + 0.1 * torch.eye(d, dtype=torch.float64))
    assert torch.allclose(inverse.double(), dense, atol=1e-4, rtol=1e-3)


def test_eigen_failure_in_own_precision_falls_back_to_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factor = spd(6, 0).float()
    real = torch.linalg.eigh
    precisions = []

    def failing(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        precisions.append(x.dtype)
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(x)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = inverses.eigen(factor)
    assert precisions == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ values.diag() @ vectors.t(), factor, rtol=1e-5, atol=1e-5)


def test_damped_inverse_indefinite_by_rounding_is_mended_by_jitter() -> None:
    # A rank-one factor whose smallest eigenvalue is slightly negative after rounding.
    factor = torch.ones(4, 4, dtype=torch.double)
    factor[3, 3] -= 1e-9
    inverse = inverses.damped_inverse(factor, 0.0)
    assert torch.isfinite(inverse).all()


@pytest.mark.parametrize("operation", [inverses.eigen, lambda x: inverses.damped_inverse(x, 0.1)])
def test_decomposition_of_non_finite_factor_raises(operation) -> None:
    factor = spd(3, 0)
    factor[1, 0] = float("nan")
    with pytest.raises(NumericalError, match="non-finite"):
        operation(factor)


def test_kl_clip_scale_bounds_the_step_with_equality() -> None:
    p = [torch.randn(3, 4, dtype=torch.double), torch.randn(5, dtype=torch.double)]
    d = [3 * p[0], 2 * p[1]]
    products = preconditioning.inner_products(p, d)
    rates = torch.tensor([0.5, 0.25], dtype=torch.double)
    scale = preconditioning.kl_clip_scale((products.abs() * rates.square()).sum(), 1e-3)
    total = 0.25 * (p[0] * d[0]).sum() + 0.0625 * (p[1] * d[1]).sum()
    assert (scale**2 * total).item() == pytest.approx(1e-3, rel=1e-12)
    assert preconditioning.kl_clip_scale(1e-12 * products.sum(), 1e-3).item() == 1.0
    nothing = preconditioning.inner_products([torch.zeros(2)], [torch.zeros(2)]).sum()
    assert preconditioning.kl_clip_scale(nothing, 1e-3).item() == 1.0


def test_levenberg_marquardt_follows_the_reduction_ratio() -> None:
    rule = damping.AdaptiveDamping(LevenbergMarquardt(initial=1.0, omega=0.9, interval=2))
    assert rule.update(-1.0, -1.0) == 1.0
    assert rule.value == pytest.approx(0.81)
    assert rule.update(-0.1, -1.0) == pytest.approx(0.1)
    assert rule.value == pytest.approx(1.0)
    rule.update(-0.5, -1.0)  # between the thresholds: unchanged
    assert rule.value == pytest.approx(1.0)
    rule.update(float("nan"), -1.0)  # a step into nowhere: more damping
    assert rule.value == pytest.approx(1 / 0.81)
    assert math.isnan(rule.update(1.0, 0.0))  # nothing predicted, nothing learnt
    assert rule.value == pytest.approx(1 / 0.81)


def test_damping_schedules_hit_their_published_points() -> None:
    warmup = WarmupSchedule(start=1.0, target=1e-4, steps=100)
    assert warmup(0) == 1.0
    rate = 2 * 4 / 100
    assert warmup(1) == pytest.approx(1e-4 * rate + (1 - rate))
    assert warmup(10**5) == pytest.approx(1e-4)
    steps = MilestoneSchedule(start=0.004, factor=0.5, milestones=(10, 20))
    assert [steps(s) for s in (0, 9, 10, 20)] == [0.004, 0.004, 0.002, 0.001]


def test_two_by_two_inverse_of_rank_one_blocks_is_finite_and_positive_in_float32() -> None:
    v = 1000 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(5))
    inverse = inverses.two_by_two_inverse(v[:, :, None] * v[:, None, :], 1e-3)
    assert bool(torch.isfinite(inverse).all())
    assert bool((inverse.diagonal(dim1=-2, dim2=-1) > 0).all())
    exact = torch.linalg.inv(
        (v[:, :, None] * v[:, None, :]).double() + 1e-3 * torch.eye(2).double()
    )
    # Relative to the largest entry, as far as float32 can tell.
    errors = (inverse - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
    assert float(errors.median()) < 1e-6
