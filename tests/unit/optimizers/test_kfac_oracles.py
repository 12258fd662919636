"""KFAC against closed forms and dense algebra, in float64 to 1e-10."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.kronecker import dense_kfac_step, dense_layers

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def small_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2, dilation=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5),
    ).double()


def batch(n: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 8, 8, dtype=torch.double, generator=generator)
    return x, torch.randint(5, (n,), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def preconditioned(
    model: nn.Module, run: Callable[[KFAC], None], **options
) -> tuple[dict[str, Tensor], KFAC]:
    options = {"kl_clip": None, "damping": 0.05, **options}
    kfac = KFAC(model, **options)
    model.zero_grad()
    run(kfac)
    result = gradients(model)
    kfac.close()
    return result, kfac


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[KFAC], None]:
    def run(kfac: KFAC) -> None:
        F.cross_entropy(model(x), y).backward()
        kfac.step()

    return run


@pytest.mark.parametrize(
    ("method", "precompute"), [("eigen", False), ("eigen", True), ("inverse", False)]
)
def test_step_small_network_equals_dense_kronecker_solve(method: str, precompute: bool) -> None:
    model = small_net()
    x, y = batch()
    result, _ = preconditioned(model, mean_loss(model, x, y), method=method, precompute=precompute)
    model.zero_grad()
    expected = dense_kfac_step(model, x, y, damping=0.05, method=method)
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **TOLERANCE)


def test_moving_average_second_step_equals_definition() -> None:
    model = small_net()
    kfac = KFAC(model, damping=0.05, kl_clip=None, factor_decay=0.9, inverse_update_steps=1)
    seen = []
    for seed in range(3):
        x, y = batch(seed=seed)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        # A copy carries the hooks along, but they are inert there.
        seen.append(dense_layers(copy.deepcopy(model), x, y))
    for name, factors in kfac.factors().items():
        for factor in ("A", "G"):
            average = seen[0][name][factor]  # k = 1: the first statistic itself
            average = 0.5 * average + 0.5 * seen[1][name][factor]  # 1 - 1/2 < 0.9
            average = average * (2 / 3) + seen[2][name][factor] / 3  # 1 - 1/3 < 0.9
            torch.testing.assert_close(factors[factor], average, **TOLERANCE)


def test_identity_start_second_step_equals_definition() -> None:
    model = small_net()
    kfac = KFAC(model, ema_init="identity", factor_decay=0.9)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    known = dense_layers(copy.deepcopy(model), x, y)
    for name, factors in kfac.factors().items():
        a = known[name]["A"]
        expected = 0.9 * torch.eye(len(a), dtype=torch.double) + 0.1 * a
        torch.testing.assert_close(factors["A"], expected, **TOLERANCE)


def test_batch_of_one_single_layer_curvature_is_outer_product_of_gradient() -> None:
    model = nn.Linear(4, 3).double()
    kfac = KFAC(model)
    x = torch.randn(1, 4, dtype=torch.double)
    F.cross_entropy(model(x), torch.tensor([1])).backward()
    gradient = torch.cat((model.weight.grad, model.bias.grad[:, None]), 1).reshape(-1)
    kfac.step()
    (state,) = kfac.states
    curvature = torch.kron(state.factors["G"], state.factors["A"])
    torch.testing.assert_close(curvature, torch.outer(gradient, gradient), **TOLERANCE)


@pytest.mark.parametrize("fisher", ["exact", "1mc"])
def test_linear_regression_one_step_lands_on_least_squares(fisher: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.double)
    y = torch.randn(50, 1, dtype=torch.double)
    model = nn.Linear(4, 1).double()
    kfac = KFAC(model, damping=1e-13, kl_clip=None, fisher=fisher)
    output = model(x)
    if fisher == "exact":
        kfac.sample_fisher(output, likelihood="gaussian")
    else:
        # With one output every draw has G = noise², so let the noise be exactly one.
        kfac.sample_fisher(output, likelihood="gaussian", generator=_unit_noise(50))
    (0.5 * (output - y).square().sum() / 50).backward()
    kfac.step()
    if fisher == "1mc":
        (state,) = kfac.states
        model.weight.grad *= state.factors["G"].item()
        model.bias.grad *= state.factors["G"].item()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    design = torch.cat((x, torch.ones(50, 1, dtype=torch.double)), 1)
    solution = torch.linalg.lstsq(design, y).solution[:, 0]
    found = torch.cat((model.weight[0], model.bias)).detach()
    torch.testing.assert_close(found, solution, rtol=1e-9, atol=1e-9)


def _unit_noise(_: int) -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_deep_linear_network_blocks_equal_gauss_newton() -> None:
    # For a deep linear network with squared error the Kronecker factorisation is exact.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x = torch.randn(9, 3, dtype=torch.double)
    kfac = KFAC(model, fisher="exact")
    output = model(x)
    kfac.sample_fisher(output, likelihood="gaussian")
    (0.5 * output.square().sum() / 9).backward()
    kfac.step()
    for layer, state in zip(model, kfac.states, strict=True):
        gauss_newton = torch.zeros(layer.weight.numel(), layer.weight.numel(), dtype=torch.double)
        for row in x:
            out = model(row)
            for value in out:
                (g,) = torch.autograd.grad(value, layer.weight, retain_graph=True)
                gauss_newton += torch.outer(g.reshape(-1), g.reshape(-1)) / 9
        block_curvature = torch.kron(state.factors["G"], state.factors["A"])
        torch.testing.assert_close(block_curvature, gauss_newton, **TOLERANCE)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_weight_sharing_curvature_is_exact_in_its_own_setting(sharing: str) -> None:
    # Linear over T positions with squared error: per position (expand), or of the mean (reduce).
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 4, 3, dtype=torch.double)
    kfac = KFAC(model, fisher="exact", weight_sharing=sharing, loss_reduction="mean")
    output = model(x) if sharing == "expand" else model(x).mean(1)
    kfac.sample_fisher(output, likelihood="gaussian")
    (0.5 * output.square().sum() / 5).backward()
    kfac.step()
    gauss_newton = torch.zeros(8, 8, dtype=torch.double)
    for value in (model(x) if sharing == "expand" else model(x).mean(1)).reshape(-1):
        w, b = torch.autograd.grad(value, (model.weight, model.bias), retain_graph=True)
        row = torch.cat((w, b[:, None]), 1).reshape(-1)
        gauss_newton += torch.outer(row, row) / 5
    (state,) = kfac.states
    curvature = torch.kron(state.factors["G"], state.factors["A"])
    torch.testing.assert_close(curvature, gauss_newton, **TOLERANCE)


def test_affine_reparameterisation_of_inputs_leaves_function_trajectory_unchanged() -> None:
    x, y = torch.randn(40, 5, dtype=torch.double), torch.randn(40, 3, dtype=torch.double)
    scale = torch.logspace(-1, 1, 5, dtype=torch.double)

    def train(inputs: Tensor, start: Tensor, second_order: bool) -> Tensor:
        model = nn.Linear(5, 3, bias=False).double()
        model.weight.data.copy_(start)
        kfac = KFAC(model, damping=1e-14, kl_clip=None, inverse_update_steps=1)
        for _ in range(4):
            model.zero_grad()
            (model(inputs) - y).square().sum(1).mean().backward()
            if second_order:
                kfac.step()
            with torch.no_grad():
                model.weight -= 0.1 * model.weight.grad
        return model.weight.detach()

    start = torch.randn(3, 5, dtype=torch.double) * 0.1
    plain = train(x, start, True)
    scaled = train(x * scale, start / scale, True)
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-6, atol=1e-8)
    sgd, sgd_scaled = train(x, start, False), train(x * scale, start / scale, False)
    assert (sgd_scaled * scale - sgd).abs().max() > 0.01  # the control: SGD does notice


def test_coupled_weight_decay_equals_dense_regularised_newton() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(8, 4, dtype=torch.double), torch.randint(3, (8,))
    result, kfac = preconditioned(model, mean_loss(model, x, y), weight_decay=0.2, damping=0.05)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    (state,) = kfac.states
    dense = torch.kron(state.factors["G"], state.factors["A"])
    dense += 0.25 * torch.eye(12, dtype=torch.double)
    d = (model.weight.grad + 0.2 * model.weight.detach()).reshape(-1)
    expected = torch.linalg.solve(dense, d).reshape(3, 4)
    torch.testing.assert_close(result["weight"], expected, **TOLERANCE)


# -- normalisation is known, not guessed ---------------------------------------------------------


def _run_mean(model: nn.Module, x: Tensor, y: Tensor, kfac: KFAC) -> None:
    F.cross_entropy(model(x), y).backward()
    kfac.step()


def _run_sum(model: nn.Module, x: Tensor, y: Tensor, kfac: KFAC) -> None:
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for p in model.parameters():
        p.grad /= len(x)
    kfac.step(loss_scale_per_sample=1.0)


def _run_loss_scale(model: nn.Module, x: Tensor, y: Tensor, kfac: KFAC) -> None:
    (F.cross_entropy(model(x), y) * 1024).backward()
    for p in model.parameters():
        p.grad /= 1024
    kfac.step(loss_scale_per_sample=1024 / len(x))


def _run_uneven_accumulation(model: nn.Module, x: Tensor, y: Tensor, kfac: KFAC) -> None:
    for part in (slice(0, 2), slice(2, 7)):
        (F.cross_entropy(model(x[part]), y[part], reduction="sum") / len(x)).backward()
    kfac.step(num_samples=len(x), loss_scale_per_sample=1 / len(x))


def _run_uneven_means(model: nn.Module, x: Tensor, y: Tensor, kfac: KFAC) -> None:
    # Means of unequal micro-batches: each is undone with its own size.
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    for part in (slice(0, 2), slice(2, 7)):
        F.cross_entropy(model(x[part]), y[part]).backward()
    # The gradients themselves belong to the caller; here they are those of the whole batch.
    for p, whole in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad.copy_(whole.grad)
    kfac.step()


RUNS = [_run_mean, _run_sum, _run_loss_scale, _run_uneven_accumulation, _run_uneven_means]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.removeprefix("_run_"))
def test_factors_do_not_depend_on_how_the_loss_was_normalised(run) -> None:
    model = small_net()
    x, y = batch()
    expected = dense_kfac_step(model, x, y, damping=0.05, method="eigen")
    result, _ = preconditioned(model, lambda kfac: run(model, x, y, kfac))
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **TOLERANCE)


def test_equal_accumulation_of_divided_means_equals_one_batch() -> None:
    model = small_net()
    x, y = batch(6)
    expected = dense_kfac_step(model, x, y, damping=0.05, method="eigen")

    def run(kfac: KFAC) -> None:
        for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
            (F.cross_entropy(model(x[part]), y[part]) / 3).backward()
        kfac.step()

    result, _ = preconditioned(model, run, accumulation_steps=3)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **TOLERANCE)


def test_token_loss_counts_tokens_as_samples() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.double)
    y = torch.randint(6, (3, 5))
    model = nn.Linear(4, 6).double()

    def tokens(kfac: KFAC) -> None:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        kfac.step(num_samples=15, loss_scale_per_sample=1 / 15)

    def rows(kfac: KFAC) -> None:
        F.cross_entropy(model(x.flatten(0, 1)), y.flatten()).backward()
        kfac.step()

    first, _ = preconditioned(model, tokens)
    second, _ = preconditioned(model, rows)
    torch.testing.assert_close(first["weight"], second["weight"], **TOLERANCE)


def test_gradient_factor_scale_does_not_depend_on_batch_size() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    traces = []
    for n in (50, 400, 3200):
        kfac = KFAC(model)
        x = torch.randn(n, 6, dtype=torch.double)
        model.zero_grad()
        F.cross_entropy(model(x), torch.randint(4, (n,))).backward()
        kfac.step()
        traces.append(kfac.states[0].factors["G"].trace().item())
        kfac.close()
    assert max(traces) / min(traces) < 1.25  # the published code: a factor of 4096


def test_product_of_traces_estimates_mean_square_of_per_sample_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 36, 5)).double()
    x, y = batch(16)
    _, kfac = preconditioned(model, mean_loss(model, x, y))
    squares = 0.0
    for sample, label in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model(sample[None]), label[None]).backward()
        squares += (model[0].weight.grad.square().sum() + model[0].bias.grad.square().sum()).item()
    factors = kfac.states[0].factors
    estimate = factors["A"].trace().item() * factors["G"].trace().item()
    assert estimate == pytest.approx(squares / 16, rel=0.35)


@pytest.mark.parametrize("scale", ["sc20", "kaisa"])
def test_published_factor_scales_differ_by_their_stated_powers(scale: str) -> None:
    model = small_net()
    x, y = batch()
    _, ours = preconditioned(model, mean_loss(model, x, y))
    _, theirs = preconditioned(model, mean_loss(model, x, y), factor_scale=scale)
    n = len(x)
    for state, other, t in zip(ours.states, theirs.states, (64, 4, 1), strict=True):
        conv = t > 1
        if scale == "sc20":
            a, g = (t**-2, t**2) if conv else (1, 1)
        else:
            a, g = (t**-3, n**-2 * t**-2) if conv else (1, n**-2)
        torch.testing.assert_close(other.factors["A"], state.factors["A"] * a, **TOLERANCE)
        torch.testing.assert_close(other.factors["G"], state.factors["G"] * g, **TOLERANCE)


# -- Fisher kinds ----------------------------------------------------------------------------------


def test_exact_fisher_single_softmax_sample_equals_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(1, 4, dtype=torch.double)
    kfac = KFAC(model, fisher="exact")
    output = model(x)
    kfac.sample_fisher(output)
    F.cross_entropy(output, torch.tensor([2])).backward()
    kfac.step()
    weight = model.weight.detach()

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.reshape(3, 4).t(), torch.tensor([2]))

    hessian = torch.autograd.functional.hessian(loss, weight.reshape(-1))
    (state,) = kfac.states
    curvature = torch.kron(state.factors["G"], state.factors["A"])
    torch.testing.assert_close(curvature, hessian, **TOLERANCE)


def test_sampled_fisher_error_falls_as_inverse_square_root() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5, bias=False).double()
    x, y = torch.randn(30, 4, dtype=torch.double), torch.randint(5, (30,))

    def factor(fisher: str, draws: int, seed: int) -> Tensor:
        kfac = KFAC(model, fisher=fisher)
        model.zero_grad()
        output = model(x)
        generator = torch.Generator().manual_seed(seed)
        kfac.sample_fisher(output, draws=draws, generator=generator)
        F.cross_entropy(output, y).backward()
        kfac.step()
        kfac.close()
        return kfac.states[0].factors["G"]

    exact = factor("exact", 1, 0)
    errors = []
    for draws in (1, 16, 256):
        kind = "1mc" if draws == 1 else "mc"
        runs = [(factor(kind, draws, seed) - exact).norm() / exact.norm() for seed in range(8)]
        errors.append(torch.stack(runs).mean().item())
    assert 2.5 < errors[0] / errors[1] < 6.5  # ideal: 4
    assert 2.5 < errors[1] / errors[2] < 6.5
    empirical = KFAC(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    empirical.step()
    gap = (empirical.states[0].factors["G"] - exact).norm() / exact.norm()
    assert gap > 0.1  # away from the optimum the empirical Fisher is another matrix


def test_sampling_leaves_parameter_gradients_alone() -> None:
    model = small_net()
    x, y = batch()
    kfac = KFAC(model, fisher="1mc")
    output = model(x)
    kfac.sample_fisher(output)
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(output, y).backward()
    result = gradients(model)
    kfac.close()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(result[name], value, rtol=0, atol=0)


def test_hessian_equals_gauss_newton_minus_residual_identity() -> None:
    # Row 47: ∂²J = (∂log p)(∂log p)ᵀ − E_q[∂²p / p] on softmax regression, q the label distribution.
    torch.manual_seed(0)
    x = torch.randn(12, 3, dtype=torch.double)
    y = torch.randint(4, (12,))
    weight = torch.randn(12, dtype=torch.double)

    def probabilities(w: Tensor) -> Tensor:
        return (x @ w.reshape(4, 3).t()).softmax(1)[torch.arange(12), y]

    hessian = torch.autograd.functional.hessian(lambda w: -probabilities(w).log().mean(), weight)
    scores = torch.autograd.functional.jacobian(lambda w: probabilities(w).log(), weight)
    empirical = scores.t() @ scores / 12
    p = probabilities(weight)
    residual = torch.zeros(12, 12, dtype=torch.double)
    for i in range(12):
        second = torch.autograd.functional.hessian(lambda w, i=i: probabilities(w)[i], weight)
        residual += second / p[i] / 12
    torch.testing.assert_close(hessian, empirical - residual, **TOLERANCE)
