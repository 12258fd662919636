"""Clip, loss scaler, optimizers and numbers agree in KFAC."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.errors import ElasticKfacError
from support.training_loops import X, loss_of, mlp

# -- clip, scaler and optimizer agree ------------------------------------------------------------


def test_a_gradient_that_is_not_a_number_lets_no_other_layer_move() -> None:
    model = mlp()
    kfac = KFAC(model, damping=1e-6)
    loss_of(model).backward()
    model[0].weight.grad[0, 0] = float("nan")  # type: ignore[index]
    kfac.step()
    assert kfac.kl_clip_scale == 0.0
    assert float(model[2].weight.grad.norm()) == 0.0  # type: ignore[union-attr]


def test_the_clip_bounds_groups_with_rates_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 10.0}]
    kfac = KFAC(model, lr=torch.optim.SGD(groups, lr=0.1))
    loss_of(model).backward()
    plain = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    kfac.step()
    moved = zip((0.1, 10.0), model.parameters(), plain, strict=True)
    total = sum(float(lr * lr * kfac.kl_clip_scale * (p.grad * d).sum()) for lr, p, d in moved)
    assert 0 < total <= 1e-3


def test_several_optimizers_over_one_model_hold_the_rates_together() -> None:
    model = mlp()
    body = torch.optim.SGD(model[0].parameters(), lr=0.1)
    head = torch.optim.Adam(model[2].parameters(), lr=0.01)
    kfac = KFAC(model, lr=[body, head])
    loss_of(model).backward()
    kfac.step()
    with pytest.raises(ElasticKfacError, match=r"lr=\[first, second\]"):
        alone = KFAC(model, lr=body)
        loss_of(model).backward()
        alone.step()


def scaled(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    return torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)


def test_a_forgotten_unscale_is_an_error_that_names_it() -> None:
    model = mlp().float()
    optimizer, scaler = scaled(model)
    kfac = KFAC(model, lr=optimizer, grad_scaler=scaler)
    scaler.scale(loss_of(model, X.float())).backward()
    with pytest.raises(ElasticKfacError, match="unscale_"):
        kfac.step()


def test_an_overflow_in_an_uncovered_parameter_skips_the_step_here_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) + self.shift
            return out

    model = Net()
    optimizer, scaler = scaled(model)
    with pytest.warns(UserWarning, match="does not precondition"):
        kfac = KFAC(model, grad_scaler=scaler)
    scaler.scale(loss_of(model, X.float())).backward()
    model.shift.grad[0] = float("inf")  # type: ignore[index]
    scaler.unscale_(optimizer)
    kfac.step()
    scaler.step(optimizer)
    assert kfac.steps == 0 and kfac.counters["skipped_steps"] == 1


def test_an_interval_that_is_no_multiple_warns() -> None:
    with pytest.warns(UserWarning, match="no multiple"):
        KFAC(mlp(), factor_update_steps=3, inverse_update_steps=10)


def test_numpy_numbers_are_numbers() -> None:
    kfac = KFAC(mlp(), lr=np.float32(0.1), inverse_update_steps=np.int64(10))
    assert kfac.options.inverse_update_steps == 10


@pytest.mark.parametrize("steps", [1, 5])
def test_a_model_of_another_type_goes_on_with_its_factors(steps: int) -> None:
    """Also between the steps that refresh statistics."""
    model = mlp().float()
    kfac = KFAC(model, kl_clip=None, factor_update_steps=steps)
    loss_of(model, X.float()).backward()
    kfac.step()
    before = kfac.factors()["0"]["A"]
    model.zero_grad()
    model.double()
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        kfac.step()
        assert kfac.factors()["0"]["A"].dtype == torch.float64
        assert kfac.states[0].decomposition["A_vectors"].dtype == torch.float64
    if steps > 1:
        assert torch.equal(kfac.factors()["0"]["A"], before.double())


def test_a_layer_without_outputs_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the initialisation
        empty = nn.Linear(4, 0)
    with pytest.warns(UserWarning, match="no elements"):
        KFAC(nn.Sequential(empty, nn.Linear(4, 3)))


@pytest.mark.parametrize("options", [{}, {"method": "inverse"}, {"bn_fisher": "full"}])
def test_near_singular_statistics_in_float32_come_near_those_in_float64(
    options: dict[str, Any],
) -> None:
    # One sample and a large loss: rounding in flat directions must not outgrow the step.
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))
        model.to(dtype)
        kfac = KFAC(model, lr=1e-3, **options)
        inputs = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
        (model(inputs) - 1000).square().mean().backward()
        kfac.step()
        found.append([p.grad.double() for p in model.parameters()])  # type: ignore[union-attr]
        assert kfac.kl_clip_scale == pytest.approx(1.0)
    for single, double in zip(*found, strict=True):
        assert float((single - double).norm()) < 0.2 * float(double.norm())


def test_a_large_loss_over_many_samples_is_inverted_in_float32_as_in_float64() -> None:
    # F is large but conditioned well: nothing has to be damped further for the sake of rounding.
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1)).to(
            dtype
        )
        kfac = KFAC(model, lr=1e-3, method="inverse", kl_clip=1e-3)
        inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
        (model(inputs) - 1000).square().mean().backward()
        kfac.step()
        found.append([p.grad.double() for p in model.parameters()])  # type: ignore[union-attr]
    for single, double in zip(*found, strict=True):
        assert float((single - double).norm()) < 0.05 * float(double.norm())
