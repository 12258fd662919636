"""DistNewton on quadratics, where everything has a closed form (float64)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kfac.errors import ConfigError, NumericalError, UsageError
from elastic_kfac.optimizers.dist_newton import DistNewton, merge


def quadratic(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    torch.manual_seed(seed)
    size = len(values)
    turns, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return turns @ torch.diag(values) @ turns.T


def workers(count: int, size: int, *, spread: float = 1.0, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    center = torch.randn(size, dtype=torch.float64)
    return [center + spread * torch.randn(size, dtype=torch.float64) for _ in range(count)]


def gradients_at(hessian: Tensor, thetas: list[Tensor], optimum: Tensor) -> list[Tensor]:
    return [hessian @ (theta - optimum) for theta in thetas]


def dense_merge(thetas: list[Tensor], grads: list[Tensor], tau: float, ratio: float) -> Tensor:
    """Equations 2 to 4, with every vector written out."""
    theta, grad = torch.stack(thetas, 1), torch.stack(grads, 1)
    theta_bar, grad_bar = theta.mean(1), grad.mean(1)
    big_t, big_g = theta - theta_bar[:, None], grad - grad_bar[:, None]
    u, sigma, vt = torch.linalg.svd(big_g, full_matrices=False)
    j = int((sigma[: len(thetas) - 1] >= ratio * sigma[0]).sum())
    alpha = u[:, :j].T @ grad_bar
    outside = grad_bar - u[:, :j] @ alpha
    newton = sum(alpha[k] / sigma[k] * (big_t @ vt[k]) for k in range(j)) + torch.zeros_like(
        grad_bar
    )
    return theta_bar - tau * (outside + newton)


SPECTRUM = torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("block_size", [1, 3, 1 << 20])
@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.9])
def test_merge_is_equations_two_to_four(block_size: int, ratio: float) -> None:
    hessian = quadratic(SPECTRUM)
    thetas = workers(5, 8)
    grads = gradients_at(hessian, thetas, torch.ones(8, dtype=torch.float64))
    options = DistNewton(lr=0.3, ratio=ratio, cap=False)
    found = merge(thetas, grads, options, block_size=block_size)
    expected = dense_merge(thetas, grads, 0.3, ratio)
    torch.testing.assert_close(found.parameters, expected, rtol=0, atol=1e-12)


def test_step_is_exact_on_the_span_of_the_gradients() -> None:
    hessian = quadratic(SPECTRUM)
    thetas = workers(5, 8)
    grads = gradients_at(hessian, thetas, torch.zeros(8, dtype=torch.float64))
    # Move the workers so that the mean gradient lies in the span of the centred ones.
    u, _, _ = torch.linalg.svd(torch.stack(grads, 1) - torch.stack(grads, 1).mean(1)[:, None])
    span = u[:, :4]
    mean = torch.stack(grads, 1).mean(1)
    shift = torch.linalg.solve(hessian, span @ (span.T @ mean) - mean)
    thetas = [theta + shift for theta in thetas]
    grads = gradients_at(hessian, thetas, torch.zeros(8, dtype=torch.float64))
    found = merge(thetas, grads, DistNewton(lr=1.0, ratio=1e-5, cap=False))
    assert found.rank == 4
    assert float(found.parameters.norm()) < 1e-9


@pytest.mark.parametrize("count", [9, 12])
@pytest.mark.parametrize("mode", ["paper", "sym", "abs"])
def test_enough_workers_reach_the_optimum_in_one_step(count: int, mode: Any) -> None:
    hessian = quadratic(SPECTRUM)
    optimum = torch.arange(8, dtype=torch.float64)
    thetas = workers(count, 8)
    found = merge(
        thetas,
        gradients_at(hessian, thetas, optimum),
        DistNewton(lr=1.0, ratio=1e-4, mode=mode, cap=False),
    )
    assert found.rank == 8
    torch.testing.assert_close(found.parameters, optimum, rtol=0, atol=1e-9)


def test_cap_at_one_below_the_workers_keeps_noise_out() -> None:
    """Without it the m-th singular value, about √eps of the first, passes a small λ."""
    hessian = quadratic(SPECTRUM)
    thetas = workers(4, 8)
    grads = gradients_at(hessian, thetas, torch.ones(8, dtype=torch.float64))
    gram = torch.stack(grads) - torch.stack(grads).mean(0)
    sigma = torch.linalg.eigvalsh(gram @ gram.T).clamp(min=0).sqrt().flip(0)
    assert 0 <= float(sigma[3] / sigma[0]) < 1e-6
    found = merge(thetas, grads, DistNewton(lr=1.0, ratio=1e-12, cap=False))
    assert found.rank == 3
    expected = dense_merge(thetas, grads, 1.0, 1e-12)
    torch.testing.assert_close(found.parameters, expected, rtol=0, atol=1e-8)


def test_two_workers_never_use_more_than_one_direction_in_single_precision() -> None:
    thetas = [theta.float() for theta in workers(2, 1000)]
    grads = [2 * theta for theta in thetas]
    assert merge(thetas, grads, DistNewton(lr=0.1, ratio=1e-9)).rank == 1


def test_one_worker_and_equal_workers_take_the_averaged_gradient_step() -> None:
    theta, first, second = workers(3, 6)
    single = merge([theta], [first], DistNewton(lr=0.1))
    assert (single.rank, single.sigma) == (0, 0.0)
    torch.testing.assert_close(single.parameters, theta - 0.1 * first, rtol=0, atol=1e-15)
    equal = merge([theta, theta], [first, second], DistNewton(lr=0.1))
    assert (equal.rank, equal.sigma) == (0, 0.0)
    mean = (first + second) / 2
    torch.testing.assert_close(equal.parameters, theta - 0.1 * mean, rtol=0, atol=1e-15)


def test_equal_gradients_take_the_averaged_gradient_step() -> None:
    thetas = workers(3, 6)
    found = merge(thetas, [torch.ones(6, dtype=torch.float64)] * 3, DistNewton(lr=0.1))
    assert found.rank == 0
    expected = torch.stack(thetas).mean(0) - 0.1
    torch.testing.assert_close(found.parameters, expected, rtol=0, atol=1e-14)


def test_order_of_workers_does_not_matter() -> None:
    hessian = quadratic(SPECTRUM)
    thetas = workers(6, 8)
    grads = gradients_at(hessian, thetas, torch.ones(8, dtype=torch.float64))
    first = merge(thetas, grads, DistNewton(lr=0.5))
    order = [3, 1, 5, 0, 4, 2]
    second = merge([thetas[i] for i in order], [grads[i] for i in order], DistNewton(lr=0.5))
    torch.testing.assert_close(first.parameters, second.parameters, rtol=0, atol=1e-12)
    assert (first.rank, first.sigma) == (second.rank, pytest.approx(second.sigma))


def test_saddle_attracts_the_paper_step_and_repels_the_absolute_one() -> None:
    hessian = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    thetas = workers(3, 2)
    grads = gradients_at(hessian, thetas, torch.zeros(2, dtype=torch.float64))
    center = torch.stack(thetas).mean(0)

    def step(mode: Any) -> Tensor:
        return (
            center
            - merge(thetas, grads, DistNewton(lr=1.0, ratio=1e-6, mode=mode, cap=False)).parameters
        )

    gradient = hessian @ center
    torch.testing.assert_close(step("paper"), hessian @ gradient, rtol=0, atol=1e-9)
    torch.testing.assert_close(step("sym"), hessian @ gradient, rtol=0, atol=1e-9)
    torch.testing.assert_close(step("abs"), gradient, rtol=0, atol=1e-9)


def test_symmetric_mode_differs_where_the_workers_span_a_part_only() -> None:
    hessian = quadratic(torch.linspace(1, 12, 12, dtype=torch.float64))
    thetas = workers(6, 12)
    grads = gradients_at(hessian, thetas, torch.zeros(12, dtype=torch.float64))
    matrix = torch.stack(grads, 1) - torch.stack(grads, 1).mean(1)[:, None]
    u, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    u = u[:, :5]
    exact = u @ (u.T @ torch.linalg.inv(hessian) @ u) @ u.T  # what `sym` knows of the inverse
    mean = torch.stack(grads, 1).mean(1)
    expected = torch.stack(thetas).mean(0) - (mean - u @ (u.T @ mean) + exact @ mean)
    options = DistNewton(lr=1.0, ratio=1e-5, mode="sym", cap=False)
    found = merge(thetas, grads, options).parameters
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    paper = merge(thetas, grads, DistNewton(lr=1.0, ratio=1e-5, cap=False)).parameters
    assert float((paper - found).norm() / found.norm()) > 0.01


def test_sigma_is_a_lower_bound_that_grows_to_the_largest_eigenvalue() -> None:
    values = torch.cat([torch.linspace(1, 10, 11), torch.tensor([100.0])]).double()
    hessian = quadratic(values)
    all_thetas = workers(14, 12)
    seen = []
    for count in (2, 4, 8, 13, 14):
        thetas = all_thetas[:count]
        grads = gradients_at(hessian, thetas, torch.zeros(12, dtype=torch.float64))
        seen.append(merge(thetas, grads, DistNewton(lr=1.0)).sigma)
    assert seen == sorted(seen)
    assert seen[2] < 100
    assert seen[3] == pytest.approx(100, rel=1e-6)
    # The norm of G is no such bound: it grows with the distance of the workers.
    spread = torch.stack(gradients_at(hessian, all_thetas, torch.zeros(12, dtype=torch.float64)))
    assert float(torch.linalg.matrix_norm(spread - spread.mean(0), ord=2)) > 110


def test_cap_limits_one_rate_or_the_gradient_part_only() -> None:
    hessian = quadratic(SPECTRUM)
    thetas = workers(12, 8)
    grads = gradients_at(hessian, thetas, torch.zeros(8, dtype=torch.float64))
    one = merge(thetas, grads, DistNewton(lr=1.0))
    assert (one.lr, one.gradient_lr) == (pytest.approx(0.05), pytest.approx(0.05))
    split = merge(thetas, grads, DistNewton(lr=1.0, gradient_lr=0.5))
    assert (split.lr, split.gradient_lr) == (1.0, pytest.approx(0.05))
    free = merge(thetas, grads, DistNewton(lr=1.0, cap=False))
    assert (free.lr, free.gradient_lr) == (1.0, 1.0)


def test_worker_with_a_number_that_is_not_finite_is_left_out() -> None:
    hessian = quadratic(SPECTRUM)
    thetas = workers(5, 8)
    grads = gradients_at(hessian, thetas, torch.zeros(8, dtype=torch.float64))
    expected = merge(thetas[1:], grads[1:], DistNewton(lr=0.5))
    for broken in (float("nan"), float("inf")):
        torn = [grads[0].clone(), *grads[1:]]
        torn[0][3] = broken
        found = merge(thetas, torn, DistNewton(lr=0.5))
        assert found.workers == 4
        assert torch.equal(found.parameters, expected.parameters)
    with pytest.raises(NumericalError, match="no worker"):
        merge([grads[0] * float("nan")], [grads[0]], DistNewton(lr=0.5))


def published_setting(seed: int) -> tuple[Tensor, Tensor]:
    """n = 200, six eigenvalues from 10 to 100, the rest at most 1; and a start."""
    torch.manual_seed(seed)
    large = torch.linspace(10, 100, 6, dtype=torch.float64)
    small = torch.rand(194, dtype=torch.float64)
    return quadratic(torch.cat([large, small]), seed), torch.randn(200, dtype=torch.float64)


def loss_after_one_merge(seed: int, m: int, options: DistNewton) -> float:
    """Workers take one gradient step from the start, whose noise has H as its covariance."""
    hessian, start = published_setting(seed)
    values, turns = torch.linalg.eigh(hessian)
    root = turns @ torch.diag(values.clamp(min=0).sqrt()) @ turns.T
    generator = torch.Generator().manual_seed(seed)
    thetas = []
    for _ in range(m):
        noise = root @ torch.randn(200, dtype=torch.float64, generator=generator)
        thetas.append(start - 0.0198 * (hessian @ start + 0.3 * noise))
    found = merge(thetas, [hessian @ theta for theta in thetas], options)
    return float(0.5 * found.parameters @ hessian @ found.parameters)


def mean_losses(counts: tuple[int, ...], options: DistNewton) -> list[float]:
    return [sum(loss_after_one_merge(seed, m, options) for seed in range(3)) / 3 for m in counts]


def sgd_loss(steps: int) -> float:
    losses = []
    for seed in range(3):
        hessian, theta = published_setting(seed)
        for _ in range(steps):
            theta = theta - 0.0198 * hessian @ theta
        losses.append(float(0.5 * theta @ hessian @ theta))
    return sum(losses) / 3


def test_trend_too_few_workers_are_worse_than_sgd_and_enough_are_much_better() -> None:
    options = DistNewton(lr=1.0, ratio=0.01, cap=False)
    few, more, enough, most = mean_losses((2, 4, 12, 16), options)
    same_evaluations = sgd_loss(2)  # a round costs two gradients per worker
    assert few > same_evaluations and more > same_evaluations
    assert enough < same_evaluations / 5 and most < same_evaluations / 5


def test_trend_split_step_improves_with_every_worker() -> None:
    losses = mean_losses(
        (2, 4, 6, 8, 12, 16), DistNewton(lr=1.0, gradient_lr=0.019, ratio=0.01, cap=False)
    )
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0] < 0.8 * sgd_loss(2)


def test_trend_repeated_merges_diverge_at_a_large_rate_unless_capped() -> None:
    hessian, start = published_setting(0)

    def after(rounds: int, options: DistNewton) -> float:
        generator = torch.Generator().manual_seed(0)
        theta = start
        for _ in range(rounds):
            thetas = [
                theta
                - 0.0198
                * (hessian @ theta + torch.randn(200, dtype=torch.float64, generator=generator))
                for _ in range(4)
            ]
            theta = merge(thetas, [hessian @ t for t in thetas], options).parameters
        return float(0.5 * theta @ hessian @ theta)

    begin = float(0.5 * start @ hessian @ start)
    assert after(12, DistNewton(lr=1.0, cap=False)) > 1e3 * begin
    assert after(12, DistNewton(lr=1.0)) < begin


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": 1.0, "gradient_lr": -1.0}, "gradient_lr"),
        ({"lr": 1.0, "ratio": 1.0}, "0 < λ < 1"),
        ({"lr": 1.0, "mode": "absolute"}, "paper, sym, abs"),
    ],
)
def test_bad_options_say_what_is_allowed(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistNewton(**arguments)


def test_contributions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="one gradient per worker"):
        merge([torch.ones(3)], [torch.ones(4)], DistNewton(lr=1.0))
    with pytest.raises(UsageError, match="one gradient per worker"):
        merge([], [], DistNewton(lr=1.0))
