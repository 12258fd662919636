"""Spectra from Hessian-vector products against the dense Hessian of a 153-parameter network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.analysis.hessian import (
    Batch,
    Hessian,
    check_request,
    last_layer_parameters,
)
from elastic_kfac.analysis.landscape import bias_variance, loss_along
from elastic_kfac.analysis.spectral_estimates import (
    density,
    kfac_eigenvalue,
    one_sample_eigenvalues,
    trace,
)
from elastic_kfac.analysis.spectrum import (
    random_vector,
    spectrum,
    top_by_lanczos,
    top_eigenvalues,
)
from elastic_kfac.errors import ConfigError, NumericalError, UsageError


def cross_entropy_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9)).double()


def samples(count: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = 2 * torch.randn(count, 6, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(0, 9, (count,), generator=generator)


def chunks(batch: Batch, *sizes: int) -> list[Batch]:
    return list(zip(batch[0].split(list(sizes)), batch[1].split(list(sizes)), strict=True))


def dense_hessian(
    model: nn.Module, batch: Batch, parameters: list[nn.Parameter] | None = None
) -> Tensor:
    chosen = list(model.parameters()) if parameters is None else parameters
    loss = cross_entropy_sum(model(batch[0]), batch[1]) / len(batch[1])
    first = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, chosen, create_graph=True)])
    rows = [
        torch.cat([r.reshape(-1) for r in torch.autograd.grad(g, chosen, retain_graph=True)])
        for g in first
    ]
    return torch.stack(rows)


class Matrix:
    """A given matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.expired, self.products = matrix, False, 0

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def product(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def diagonal(*values: float) -> Matrix:
    return Matrix(torch.diag(torch.tensor(values, dtype=torch.float64)))


def test_the_network_has_153_parameters() -> None:
    assert sum(p.numel() for p in network().parameters()) == 153


def test_product_is_the_dense_hessian_in_one_chunk_or_ragged_ones() -> None:
    model, batch = network(), samples()
    dense = dense_hessian(model, batch)
    for parts in ([batch], chunks(batch, 17, 0, 17, 6)):
        hessian = Hessian(model, cross_entropy_sum, parts)
        ours = torch.stack([hessian.product(e) for e in torch.eye(153, dtype=torch.float64)])
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-13)
        assert hessian.products == 153
    assert all(p.grad is None for p in model.parameters())


def test_product_follows_the_parameters_and_counts_the_model_once_per_point() -> None:
    model, batch = network(), samples()
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    operator = Hessian(model, cross_entropy_sum, [batch])
    vector = random_vector(operator, 0, 0)
    for shift in (0.0, 0.3):
        with torch.no_grad():
            model[0].weight += shift
        expected = dense_hessian(model, batch) @ vector
        passes.clear()
        for _ in range(3):
            # A gradient in between takes nothing from the products.
            operator.gradient()
            torch.testing.assert_close(operator.product(vector), expected, rtol=1e-10, atol=1e-12)
        assert len(passes) == 3 + 1


def test_top_three_eigenvalues_are_the_dense_ones() -> None:
    model, batch = network(), samples()
    values, vectors = torch.linalg.eigh(dense_hessian(model, batch))
    order = values.abs().argsort(descending=True)[:3]
    found = top_eigenvalues(
        Hessian(model, cross_entropy_sum, chunks(batch, 30, 10)),
        3,
        max_iterations=3000,
        tolerance=1e-9,
    )
    assert found.converged == (True, True, True)
    torch.testing.assert_close(
        torch.tensor(found.values, dtype=torch.float64), values[order], rtol=1e-5, atol=0
    )
    assert max(found.residuals) < 1e-3
    overlap = (found.vectors @ vectors[:, order]).diagonal().abs()
    assert float(overlap.min()) > 1 - 1e-4
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_top_twenty_by_lanczos_are_the_dense_ones() -> None:
    model, batch = network(), samples()
    values, vectors = torch.linalg.eigh(dense_hessian(model, batch))
    order = values.abs().argsort(descending=True)[:20]
    hessian = Hessian(model, cross_entropy_sum, [batch])
    found = top_by_lanczos(hessian, 20, max_steps=153, tolerance=1e-6)
    assert all(found.converged) and found.products < 100
    ours = torch.tensor(found.values, dtype=torch.float64)
    torch.testing.assert_close(ours, values[order], rtol=1e-9, atol=0)
    overlap = (found.vectors @ vectors[:, order]).diagonal().abs()
    assert float(overlap.min()) > 1 - 1e-6


def test_pairs_of_opposite_sign_are_told_apart_by_lanczos_and_seen_in_the_residual() -> None:
    matrix = diagonal(2.0, -1.999, 0.5, 0.1)
    early = top_eigenvalues(matrix, tolerance=1e-2)
    assert early.converged == (True,) and early.residuals[0] > 0.1
    found = top_by_lanczos(matrix, 2)
    assert found.values == pytest.approx((2, -1.999), rel=1e-12)


def test_lanczos_of_a_matrix_of_low_rank_stops_at_its_rank() -> None:
    found = top_by_lanczos(diagonal(*[0.0] * 20, 3.0, 1.0), 5, max_steps=20)
    assert found.products == 3
    assert found.values == pytest.approx((3, 1, 0), abs=1e-12)


def test_power_iteration_on_an_indefinite_matrix_finds_the_largest_magnitude() -> None:
    matrix = diagonal(1.0, 0.5, -3.0)
    found = top_eigenvalues(matrix, 3, max_iterations=500, tolerance=1e-12)
    assert found.values == pytest.approx((-3, 1, 0.5), rel=1e-9)
    top, ends = spectrum(matrix, 1)
    assert (ends.largest, ends.smallest) == pytest.approx((1, -3), rel=1e-12)
    assert ends.converged and top.values == pytest.approx((-3,), rel=1e-12)
    # Power iteration finds the largest algebraic eigenvalue of H + |λ|I.
    shifted = top_eigenvalues(diagonal(4.0, 3.5, 0.0), max_iterations=500, tolerance=1e-12)
    assert shifted.values[0] - 3 == pytest.approx(ends.largest, rel=1e-6)


def test_both_ends_of_the_network_are_the_dense_ones() -> None:
    model, batch = network(), samples()
    values = torch.linalg.eigvalsh(dense_hessian(model, batch))
    hessian = Hessian(model, cross_entropy_sum, [batch])
    _, ends = spectrum(hessian, max_steps=100, tolerance=1e-4)
    assert ends.converged and hessian.products < 100
    assert (ends.smallest, ends.largest) == pytest.approx(
        (float(values[0]), float(values[-1])), rel=1e-6
    )


def test_lanczos_with_few_steps_says_that_it_has_not_converged() -> None:
    hessian = Hessian(network(), cross_entropy_sum, [samples()])
    top, ends = spectrum(hessian, max_steps=3, tolerance=1e-6)
    assert not ends.converged and top.converged == (False,)


def test_last_layer_block_is_exact_and_not_above_the_whole() -> None:
    model, batch = network(), samples()
    block = last_layer_parameters(model)
    assert [p.shape for p in block] == [(9, 9), (9,)]
    values = torch.linalg.eigvalsh(dense_hessian(model, batch, block))
    hessian = Hessian(model, cross_entropy_sum, [batch], parameters=block)
    found = top_eigenvalues(hessian, max_iterations=1500, tolerance=1e-12)
    assert found.values[0] == pytest.approx(float(values[-1]), rel=1e-6)
    whole = torch.linalg.eigvalsh(dense_hessian(model, batch))
    assert found.values[0] <= float(whole[-1])


def test_trace_is_within_three_standard_errors() -> None:
    model, batch = network(), samples()
    exact = float(dense_hessian(model, batch).trace())
    hessian = Hessian(model, cross_entropy_sum, [batch])
    estimate = trace(hessian, max_draws=200, tolerance=0.0)
    assert estimate.draws == 200
    assert abs(estimate.mean - exact) < 3 * estimate.standard_error
    assert estimate.standard_error < 0.1 * exact
    assert trace(hessian, tolerance=0.5, min_draws=10).draws == 10
    assert math.isnan(trace(hessian, max_draws=1).standard_error)


def test_trace_of_a_diagonal_matrix_is_exact_in_one_draw() -> None:
    assert trace(diagonal(1.0, 2.0, -5.0), max_draws=1).mean == pytest.approx(-2, abs=1e-14)


def test_density_moments_are_those_of_the_matrix() -> None:
    model, batch = network(), samples()
    dense = dense_hessian(model, batch)
    hessian = Hessian(model, cross_entropy_sum, [batch])
    found = density(hessian, draws=6, steps=25)
    # The same vectors give Hutchinson's estimates of trace(H) and trace(H²) exactly.
    vectors = [random_vector(hessian, 0, i, rademacher=True) for i in range(6)]
    first = sum(float(v @ dense @ v) for v in vectors) / 6
    second = sum(float((dense @ v).square().sum()) for v in vectors) / 6 / 153
    assert found.trace == pytest.approx(first, rel=1e-10)
    assert found.moment(2) == pytest.approx(second, rel=1e-10)
    assert found.trace == pytest.approx(trace(hessian, max_draws=6, tolerance=0.0).mean, rel=1e-10)
    grid, curve = found.curve(2000)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-4)
    assert float(torch.trapezoid(curve * grid, grid)) == pytest.approx(found.moment(1), rel=1e-3)


def test_one_sample_spectra_are_those_of_each_sample() -> None:
    model, (inputs, labels) = network(), samples()

    def sample(index: int) -> Batch:
        return inputs[index : index + 1], labels[index : index + 1]

    table = one_sample_eigenvalues(
        model, cross_entropy_sum, sample, 3, top=4, max_steps=60, tolerance=1e-9
    )
    for index in range(3):
        values = torch.linalg.eigvalsh(dense_hessian(model, sample(index)))
        top = values[values.abs().argsort(descending=True)[:4]]
        torch.testing.assert_close(table[index], top, rtol=1e-5, atol=1e-9)


def test_loss_along_the_dominant_eigenvector_curves_by_its_eigenvalue() -> None:
    model, batch = network(), samples()
    hessian = Hessian(model, cross_entropy_sum, [batch])
    found = top_eigenvalues(hessian, max_iterations=1500, tolerance=1e-13)
    before = copy.deepcopy(model.state_dict())
    step = 1e-3
    left, middle, right = loss_along(
        model,
        cross_entropy_sum,
        chunks(batch, 25, 15),
        found.vectors[0],
        [-step, 0.0, step],
    )
    assert (left - 2 * middle + right) / step**2 == pytest.approx(found.values[0], rel=1e-5)
    assert middle == pytest.approx(hessian.gradient().loss, rel=1e-14)
    slope = float(hessian.gradient().gradient @ found.vectors[0])
    assert (right - left) / (2 * step) == pytest.approx(slope, rel=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_loss_along_restores_parameters_when_the_loss_fails() -> None:
    model, batch = network(), samples()
    before = copy.deepcopy(model.state_dict())

    def failing(outputs: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        loss_along(model, failing, [batch], torch.ones(153, dtype=torch.float64), [1.0])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_gradient_is_the_mean_over_all_chunks() -> None:
    model, batch = network(), samples()
    loss = cross_entropy_sum(model(batch[0]), batch[1]) / 40
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, model.parameters())])
    found = Hessian(model, cross_entropy_sum, chunks(batch, 33, 7)).gradient()
    torch.testing.assert_close(found.gradient, expected, rtol=0, atol=1e-14)
    assert found.norm == pytest.approx(float(expected.norm()))
    assert found.count == 40


def test_batch_norm_uses_running_statistics_and_keeps_mode_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 9)).double()
    batch = samples()
    model(batch[0])
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    hessian = Hessian(model, cross_entropy_sum, chunks(batch, 1, 39))
    found = top_eigenvalues(hessian, max_iterations=2000, tolerance=1e-12)
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    frozen = copy.deepcopy(model).eval()
    values = torch.linalg.eigvalsh(dense_hessian(frozen, batch))
    assert abs(found.values[0]) == pytest.approx(float(values.abs().max()), rel=1e-6)


def test_attention_layers_have_second_derivatives() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.TransformerEncoderLayer(3, 1, 4, batch_first=True),
        nn.Flatten(),
        nn.Linear(6, 9),
    ).double()
    hessian = Hessian(model, cross_entropy_sum, [samples(5)])
    direction = random_vector(hessian, 0, 0)
    product = hessian.product(direction)
    step = 1e-6
    gradients = []
    for sign in (1, -1):
        shifted = copy.deepcopy(model)
        for p, d in zip(shifted.parameters(), hessian.split(direction), strict=True):
            p.data.add_(sign * step * d)
        gradients.append(Hessian(shifted, cross_entropy_sum, [samples(5)]).gradient().gradient)
    numeric = (gradients[0] - gradients[1]) / (2 * step)
    torch.testing.assert_close(product, numeric, rtol=1e-4, atol=1e-6)


def test_parameters_without_second_derivative_give_zero() -> None:
    model = nn.Linear(6, 1).double()
    hessian = Hessian(model, lambda outputs, labels: outputs.sum(), [samples()])
    assert top_eigenvalues(hessian).values == (0.0,)
    assert top_eigenvalues(hessian).converged == (True,)


def test_not_finite_loss_gives_nan_at_once() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    found = top_eigenvalues(Hessian(model, cross_entropy_sum, [samples()]), 3)
    assert math.isnan(found.values[0]) and found.products == 1
    found = top_by_lanczos(Hessian(model, cross_entropy_sum, [samples()]), 3)
    assert math.isnan(found.values[0]) and found.converged == (False,)
    with pytest.raises(NumericalError, match="not finite"):
        spectrum(Hessian(model, cross_entropy_sum, [samples()]))


def test_time_budget_ends_every_analysis_after_the_product_that_exceeds_it() -> None:
    def hessian() -> Hessian:
        return Hessian(network(), cross_entropy_sum, [samples()], time_budget_s=0.0)

    found = top_eigenvalues(hessian(), 3)
    assert (found.products, found.converged) == (1, (False,))
    assert top_by_lanczos(hessian(), 3).converged == (False,)
    assert spectrum(hessian())[0].products == 1
    assert trace(hessian()).draws == 1
    assert len(density(hessian(), draws=4).nodes) == 1


def test_kfac_eigenvalue_is_the_largest_product_of_factor_spectra() -> None:
    for method in ("eigen", "inverse"):
        model, (inputs, labels) = network(), samples()
        kfac = KFAC(model, method=method, damping=0.1)
        assert math.isnan(kfac_eigenvalue(kfac))
        F.cross_entropy(model(inputs), labels).backward()
        kfac.step()
        expected = 0.0
        for factors in kfac.factors().values():
            a, g = (torch.linalg.eigvalsh(factors[name]) for name in ("A", "G"))
            expected = max(expected, float(a.max() * g.max()))
        assert kfac_eigenvalue(kfac) == pytest.approx(expected, rel=1e-12)


def test_bias_variance_is_mean_and_spread_of_single_losses() -> None:
    model, batch = network(), samples()
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none").detach()
    found = bias_variance(model, cross_entropy_sum, chunks(batch, 11, 29))
    assert found.mean == pytest.approx(float(losses.mean()), rel=1e-12)
    assert found.variance == pytest.approx(float(losses.var()), rel=1e-12)
    assert found.bound(2.0) == pytest.approx(float(losses.mean() + 2 * (losses.var() / 40).sqrt()))


def test_bad_requests_are_refused_before_any_work() -> None:
    model, batch = network(), samples()

    def once() -> Iterator[Batch]:
        yield batch

    with pytest.raises(UsageError, match="many times"):
        Hessian(model, cross_entropy_sum, once())
    with pytest.raises(UsageError, match="no samples on any rank"):
        Hessian(model, cross_entropy_sum, chunks(samples(0), 0)).gradient()
    with pytest.raises(UsageError, match="1 to 153"):
        top_eigenvalues(Hessian(model, cross_entropy_sum, [batch]), 154)
    parameters = list(model.parameters())
    assert check_request(parameters, vectors=10, limit_bytes=None) == 10 * 153 * 8
    with pytest.raises(ConfigError, match="does not fit in memory"):
        check_request(parameters, vectors=10, limit_bytes=10_000)
