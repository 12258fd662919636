"""LARS, LAMB and the velocity form against their formulas, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError
from elastic_kfac.optimizers.large_batch import LAMB, LARS, VelocitySGD
from elastic_kfac.state.state import join_tree, optimizer_by_name, restore_optimizer, split_tree


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(*s, dtype=torch.float64)) for s in ((4, 3), (4,), (2, 2, 3, 3))
    ]


def gradients(step: int) -> list[Tensor]:
    torch.manual_seed(step)
    return [torch.randn(*s, dtype=torch.float64) for s in ((4, 3), (4,), (2, 2, 3, 3))]


def run(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()


def test_lars_is_its_formula() -> None:
    weights = parameters()
    expected = [w.detach().clone() for w in weights]
    velocity = [torch.zeros_like(w) for w in expected]
    lr, mu, wd, eta, eps = 0.5, 0.9, 0.01, 0.02, 1e-9
    run(LARS(weights, lr, mu, wd, trust=eta, eps=eps), weights, range(4))
    for step in range(4):
        for i, gradient in enumerate(gradients(step)):
            w = expected[i]
            q = eta * w.norm() / (gradient.norm() + wd * w.norm() + eps) if w.dim() > 1 else 1.0
            velocity[i] = mu * velocity[i] + lr * q * (gradient + wd * w)
            expected[i] = w - velocity[i]
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_lars_without_decay_steps_by_a_part_of_the_weight_whatever_the_gradient(
    size: float,
) -> None:
    weight = parameters()[0]
    before = weight.detach().clone()
    weight.grad = size * gradients(0)[0]
    LARS([weight], 0.5, 0.0, trust=0.02, eps=0.0).step()
    step = float((weight.detach() - before).norm())
    assert step == pytest.approx(0.5 * 0.02 * float(before.norm()), rel=1e-12)


def test_lars_of_zero_norms_and_unadapted_groups_is_plain_descent() -> None:
    zero = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    zero.grad = torch.ones_like(zero)
    still = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    still.grad = torch.zeros_like(still)
    plain = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    plain.grad = torch.ones_like(plain)
    groups = [{"params": [zero, still]}, {"params": [plain], "adapt": False}]
    LARS(groups, 0.5, 0.0).step()
    assert float(zero.detach().amax()) == -0.5
    assert float(still.detach().amin()) == 1.0
    assert float(plain.detach().amax()) == 0.5


def test_lamb_is_its_formula() -> None:
    weights = parameters()
    expected = [w.detach().clone() for w in weights]
    first = [torch.zeros_like(w) for w in expected]
    second = [torch.zeros_like(w) for w in expected]
    run(LAMB(weights, 0.1, (0.8, 0.95), 0.02, eps=1e-6, clip=2.0), weights, range(5))
    for step in range(5):
        for i, gradient in enumerate(gradients(step)):
            w = expected[i]
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            m, v = first[i] / (1 - 0.8 ** (step + 1)), second[i] / (1 - 0.95 ** (step + 1))
            r = m / (v.sqrt() + 1e-6) + 0.02 * w
            expected[i] = w - 0.1 * min(float(w.norm()), 2.0) / r.norm() * r
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-12)


def test_lamb_without_adaptation_is_torch_adamw_without_decay() -> None:
    ours, theirs = parameters(), parameters()
    run(LAMB([{"params": ours, "adapt": False}], 0.01, eps=1e-8), ours, range(5))
    run(torch.optim.Adam(theirs, 0.01, eps=1e-8), theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_lamb_ratio_is_one_where_the_weight_is_zero() -> None:
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    LAMB([weight], 0.1).step()
    assert float(weight.detach().amax()) == pytest.approx(-0.1, rel=1e-5)


def test_velocity_form_is_torch_sgd_at_a_constant_rate_and_not_at_a_falling_one() -> None:
    ours, theirs = parameters(), parameters()
    first = VelocitySGD(ours, 0.1, 0.9, 0.01)
    second = torch.optim.SGD(theirs, 0.1, 0.9, weight_decay=0.01)
    run(first, ours, range(4))
    run(second, theirs, range(4))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    # θ ← θ − lr·P + m·(θ_t − θ_{t−1}), written with the last two points.
    before_last = parameters()
    run(VelocitySGD(before_last, 0.1, 0.9, 0.0), before_last, range(3))
    last = parameters()
    optimizer = VelocitySGD(last, 0.1, 0.9, 0.0)
    run(optimizer, last, range(4))
    expected = [
        b - 0.01 * g + 0.5 * (b - a)
        for a, b, g in zip(before_last, last, gradients(4), strict=True)
    ]
    optimizer.param_groups[0].update(lr=0.01, momentum=0.5)
    run(optimizer, last, range(4, 5))
    for a, b in zip(last, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [LARS, LAMB, VelocitySGD])
def test_state_by_parameter_name_continues_bit_for_bit(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    copied = copy.deepcopy(model)

    def train(target: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            target(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()

    train(model, kind(model.parameters(), 0.05), range(6))
    first = kind(copied.parameters(), 0.05)
    train(copied, first, range(3))
    tensors: dict[str, Tensor] = {}
    skeleton = split_tree(optimizer_by_name(copied, first), "optimizer", tensors)
    second = kind(copied.parameters(), 0.05)
    restore_optimizer(copied, second, join_tree(skeleton, tensors))
    train(copied, second, range(3, 6))
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closure_is_evaluated_with_gradients() -> None:
    for kind in (LARS, LAMB, VelocitySGD):
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = kind([weight])

        def closure(weight: nn.Parameter = weight) -> float:
            loss = weight.square().sum()
            weight.grad = torch.autograd.grad(loss, weight)[0]
            return float(loss.detach())

        assert optimizer.step(closure) == 4.0
        assert float(weight.detach()[0, 0]) < 1


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        (LARS, {"momentum": 1.0}, "momentum"),
        (LARS, {"lr": -1.0}, "lr"),
        (LAMB, {"betas": (0.9, 1.5)}, "momentum"),
        (VelocitySGD, {"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_bad_values_are_refused(kind: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(parameters(), **arguments)
