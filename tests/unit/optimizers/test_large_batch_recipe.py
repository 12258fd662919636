"""Schedules, momentum rules, presets and weight rescaling of the large-batch recipe."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from elastic_kfac.errors import ConfigError
from elastic_kfac.optimizers.large_batch import VelocitySGD, WeightRescaling
from elastic_kfac.optimizers.schedules import polynomial_decay, tied_momentum
from support.recipes import IMAGENET_SAMPLES, PRESETS


def test_polynomial_decay_at_its_corners() -> None:
    factor = polynomial_decay(1, 53, 11)
    assert [factor(0), factor(0.999), factor(1)] == [1, 1, 1]
    assert factor(27) == 0.5**11
    assert factor(35) == pytest.approx((18 / 52) ** 11)  # training ends at a rate that is not 0
    assert [factor(53), factor(100)] == [0, 0]


@pytest.mark.parametrize("bad", [(3, 3, 1), (-1, 3, 1), (0, 3, 0)])
def test_polynomial_decay_out_of_range_is_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="0 <= start < end"):
        polynomial_decay(*bad)


def test_momentum_rules_follow_the_rate_at_the_start_or_of_the_step_before() -> None:
    rates = {"base_lr": 0.4, "previous_lr": 0.2}
    assert tied_momentum("ratio0", 0.9, lr=0.1, **rates) == pytest.approx(0.225)
    assert tied_momentum("ratio_prev", 0.9, lr=0.1, **rates) == pytest.approx(0.45)
    assert tied_momentum("ratio_prev", 0.9, lr=0.3, **rates) == 0.9  # a rising rate
    assert tied_momentum("ratio_prev", 0.9, lr=0.3, base_lr=0.4, previous_lr=0.0) == 0.9
    with pytest.raises(ConfigError, match="ratio0, ratio_prev"):
        tied_momentum("prev", 0.9, lr=0.1, **rates)  # type: ignore[arg-type]


def test_ratio_prev_with_a_velocity_is_torch_sgd_with_constant_momentum() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(5, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    first, second = VelocitySGD([ours]), torch.optim.SGD([theirs], 0.1, 0.9)
    factor = polynomial_decay(0, 10, 2)
    previous = 0.1
    for step in range(8):
        lr = 0.1 * factor(step)
        momentum = tied_momentum("ratio_prev", 0.9, lr=lr, base_lr=0.1, previous_lr=previous)
        first.param_groups[0].update(lr=lr, momentum=momentum)
        second.param_groups[0]["lr"] = lr
        gradient = torch.randn(5, dtype=torch.float64)
        ours.grad, theirs.grad = gradient, gradient.clone()
        first.step()
        second.step()
        previous = lr
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_presets_have_the_published_iterations() -> None:
    assert sorted(PRESETS) == [4096 * 2**k for k in range(6)]
    for batch, preset in PRESETS.items():
        exact = math.ceil(Fraction(IMAGENET_SAMPLES * preset.epochs, batch))
        assert preset.iterations == exact
        if batch == 8192:  # the poster's number fits no number of epochs of the recipe
            assert (preset.iterations, preset.printed_iterations) == (5474, 5434)
        else:
            assert preset.iterations == preset.printed_iterations


def test_presets_have_the_shape_of_the_recipe() -> None:
    rows = [PRESETS[batch] for batch in sorted(PRESETS)]
    for small, large in itertools.pairwise(rows):
        assert large.base_lr > small.base_lr
        assert large.base_momentum < small.base_momentum
        assert large.power <= small.power
        assert large.mixup_alpha >= small.mixup_alpha
        assert large.iterations < small.iterations
    assert all(row.lr_schedule()(row.epochs) > 0 for row in rows)
    with pytest.raises(TypeError):
        PRESETS[1] = rows[0]  # type: ignore[index]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3)
    ).double()


def test_rescaled_weights_have_the_norm_of_the_rule() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight.mul_(100)
        net[3].weight.mul_(1e-3)
    small = net[3].weight.detach().clone()
    biases = [net[0].bias.clone(), net[1].weight.clone(), net[1].bias.clone()]
    WeightRescaling(net).apply()
    assert float(net[0].weight.detach().norm()) == pytest.approx(math.sqrt(16), rel=1e-9)
    assert torch.equal(net[3].weight, small)  # `shrink` makes nothing larger
    assert all(
        torch.equal(a, b)
        for a, b in zip(biases, [net[0].bias, net[1].weight, net[1].bias], strict=True)
    )
    WeightRescaling(net, "always").apply()
    assert float(net[3].weight.detach().norm()) == pytest.approx(math.sqrt(8), rel=1e-6)
    assert float(net[4].weight.detach().norm()) == pytest.approx(math.sqrt(6), rel=1e-6)


def test_rescaling_a_shared_weight_happens_once_and_zero_weights_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)).double()
    net[1].weight = net[0].weight
    nn.init.zeros_(net[2].weight)
    rescaling = WeightRescaling(net, "always")
    rescaling.apply()
    assert float(net[0].weight.detach().norm()) == pytest.approx(math.sqrt(8), rel=1e-8)
    assert not net[2].weight.any()
    WeightRescaling(nn.Sequential(nn.ReLU())).apply()
    with pytest.raises(ConfigError, match="shrink, always"):
        WeightRescaling(net, "grow")  # type: ignore[arg-type]
