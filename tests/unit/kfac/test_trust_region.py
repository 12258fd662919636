"""The adaptive trust region: invariant, bounded with momentum in it, and exact about what it measures."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.kronecker import EmbeddingLayer
from elastic_kfac.errors import ConfigError
from elastic_kfac.kfac import trust_region


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(seed: int, n: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.double, generator=generator)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, dtype=torch.double, generator=generator)).argmax(
        1
    )


class Run:
    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        before: float = 0.0,
        **options: Any,
    ) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        options = {"trust_region": "adaptive", "damping": 0.01, "momentum": before, **options}
        self.kfac = KFAC(model, lr=self.optimizer, **options)

    def step(self, seed: int, factor: float = 1.0) -> None:
        x, y = batch(seed)
        self.optimizer.zero_grad()
        (factor * F.cross_entropy(self.model(x), y)).backward()
        self.kfac.step()
        self.optimizer.step()


@pytest.mark.parametrize(("factor", "lr"), [(1000.0, 0.1), (0.001, 0.1), (1.0, 10.0)])
def test_neither_the_units_of_the_loss_nor_the_largest_rate_matter(
    factor: float, lr: float
) -> None:
    plain, other = Run(network()), Run(network(), lr=lr)
    for step in range(30):
        plain.step(step)
        other.step(step, factor)
    assert plain.kfac.bound.trust is not None
    assert float(plain.kfac.bound.trust.growth) > 1.0
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_uncovered_parameters_get_the_gradient_of_the_normalised_loss(lr: float) -> None:
    found = []
    for factor in (1.0, 1000.0):
        model = network()
        model.register_parameter("shift", nn.Parameter(torch.zeros(5, dtype=torch.double)))
        with pytest.warns(UserWarning, match="does not precondition"):
            kfac = KFAC(model, lr=lr, trust_region="adaptive", skip_layers=("0",))
        x, y = batch(0)
        (factor * F.cross_entropy(model(x + model.shift), y)).backward()
        kfac.step()
        found.append([model.shift.grad, model[0].weight.grad])
    torch.testing.assert_close(found[0], found[1])


def dense_curvature(kfac: KFAC) -> list[Tensor]:
    """F + γI of each layer in the units of the loss, for row-major weights with the bias last."""
    return [
        torch.kron(f["G"] + state.floor * torch.eye(len(f["G"])).double(), f["A"])
        + kfac.bound.tikhonov(kfac.damping) * torch.eye(len(f["G"]) * len(f["A"])).double()
        for f, state in zip(kfac.factors().values(), kfac.states, strict=True)
    ]


def weights(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [torch.cat((m.weight, m.bias[:, None]), 1).detach().reshape(-1) for m in layers]


@pytest.mark.parametrize("warm_up", [0, 5, 12])
def test_the_whole_step_is_measured_exactly_and_bounded(warm_up: int) -> None:
    # The factors stay those of the first batch, so that norms at different steps compare.
    run = Run(network(), factor_update_steps=1000, inverse_update_steps=1000)
    trust = run.kfac.bound.trust
    assert trust is not None
    longest = 0.0
    for step in range(25):
        before = weights(run.model)
        # As schedulers of warm-ups do, from 0 on: what is in the momentum came at smaller rates.
        rate = 0.1 * min(1.0, step / warm_up) if warm_up else 0.1
        run.optimizer.param_groups[0]["lr"] = rate
        run.step(step)
        assert trust.scale is not None
        moved = [b - a for a, b in zip(before, weights(run.model), strict=True)]
        squares = [
            float(d @ c @ d) / trust.scale.fisher
            for d, c in zip(moved, dense_curvature(run.kfac), strict=True)
        ]
        for measured, dense in zip(trust.squares.tolist(), squares, strict=True):
            assert rate**2 * measured == pytest.approx(dense, rel=1e-9, abs=1e-15)
        assert sum(squares) <= float(trust.growth) ** 2 * trust.kappa * (1 + 1e-9)
        longest = max(longest, sum(squares))
    assert longest > 0.3 * trust.kappa


def test_the_scale_is_the_size_of_the_gradient_at_the_layer_called_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(6, 3), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh())

    model, (x, y) = Backwards().double(), batch(0)
    kfac = KFAC(model, lr=0.1, trust_region="adaptive")
    output = model(x)
    output.retain_grad()
    (7.0 * F.cross_entropy(output, y)).backward()
    assert output.grad is not None
    kfac.step()
    expected = math.sqrt(float((output.grad * len(x)).square().sum(1).mean()))
    assert kfac.bound.trust is not None and kfac.bound.trust.scale is not None
    assert kfac.bound.trust.scale.loss == pytest.approx(expected)


def test_damping_follows_the_size_of_the_output_gradient() -> None:
    run = Run(network(), factor_update_steps=2, inverse_update_steps=2, factor_decay=0.2)
    head, trust = run.model[2], run.kfac.bound.trust
    assert isinstance(head, nn.Linear) and trust is not None
    gradients: list[Tensor] = []
    head.register_full_backward_pre_hook(lambda _, g: gradients.append(g[0]))
    first = average = known = math.nan
    damping = []
    for step in range(16):
        run.step(step, 0.4**step)
        if step % 2 == 0:
            now = float(gradients[-1].mul(32).square().sum(1).mean())
            # Known from the next update on.
            expected = 2.0 ** math.ceil(math.log2(math.sqrt(known))) if step else 1.0
            first = first if step else now
            average = 0.2 * average + 0.8 * now if step else now
            known = average / first
        assert trust.scale is not None
        damping.append(run.kfac.bound.tikhonov(0.01))
        assert damping[-1] == pytest.approx(0.01 * expected * trust.scale.fisher), step
        if step % 5 == 0:  # a state holds what is not known yet
            trust.restore(json.loads(json.dumps(trust.saved())))
    assert damping[0] / damping[-1] >= 32.0
    assert damping[0] == pytest.approx(0.01 * trust.scale.fisher)


def test_the_preconditioner_is_that_of_the_damping_which_follows() -> None:
    options = {"factor_update_steps": 1, "inverse_update_steps": 1, "factor_decay": 0.2}
    run = Run(network(), momentum=0.0, **options)
    trust = run.kfac.bound.trust
    assert trust is not None
    for step in range(15):
        before = torch.cat(weights(run.model))
        x, y = batch(step)
        loss = 0.8**step * F.cross_entropy(run.model(x), y)
        plain = torch.autograd.grad(loss, list(run.model.parameters()))
        run.step(step, 0.8**step)
    assert trust.residual < 0.2
    dense = [
        torch.linalg.solve(c, torch.cat((w, b[:, None]), 1).reshape(-1))
        for c, w, b in zip(dense_curvature(run.kfac), plain[::2], plain[1::2], strict=True)
    ]
    moved = torch.cat(weights(run.model)) - before
    direction = -torch.cat(dense)
    torch.testing.assert_close(moved / moved.norm(), direction / direction.norm())


def test_the_radius_multiplies_the_longest_step() -> None:
    runs = [Run(network(), momentum=0.0, trust_radius=radius) for radius in (1.0, 3.0)]
    for run in runs:
        run.step(0)
    moved = [torch.cat(weights(run.model)) - torch.cat(weights(network())) for run in runs]
    torch.testing.assert_close(moved[1], 3.0 * moved[0])
    with pytest.raises(ConfigError, match="trust_radius needs trust_region=adaptive"):
        KFAC(network(), trust_radius=3.0, kl_clip=1e-3)


def test_the_bound_follows_the_rows_of_the_largest_batch() -> None:
    def step(rows: int) -> None:
        x = torch.randn(rows, 5, dtype=torch.double)
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        kfac.step()

    model = network()
    kfac = KFAC(model, lr=0.1, factor_update_steps=1)
    trust = kfac.bound.trust
    assert trust is not None
    found = []
    for rows in (50, 600, 200, 5000):
        step(rows)
        found.append(trust.kappa)
    assert found == pytest.approx([1e-3, 6e-3, 6e-3, 1e-2])
    twin = KFAC(network(), lr=0.1, factor_update_steps=1)
    twin.load_state_dict(kfac.state_dict())
    assert twin.bound.trust is not None and twin.bound.trust.rows == 5000


def test_positions_count_as_rows_of_a_batch() -> None:
    model = network()
    kfac = KFAC(model, lr=0.1, loss_reduction="positions")
    x = torch.randn(8, 40, 5, dtype=torch.double)
    F.cross_entropy(model(x).flatten(0, 1), x[..., :3].argmax(-1).flatten()).backward()
    kfac.step()
    assert kfac.bound.trust is not None and kfac.bound.trust.kappa == pytest.approx(3.2e-3)


def test_momentum_is_cut_where_the_step_met_rising_ground() -> None:
    trust = trust_region.TrustRegion(["one"], torch.device("cpu"))
    velocity = torch.zeros(2, dtype=torch.double)
    cut = 0.0
    for d in ([3.0, 0.0], [-1.0, 1.0]):  # F + γI = I, so that P = D
        gradient = torch.tensor(d, dtype=torch.double)
        value, before = gradient.clone(), velocity.clone()
        rates = trust_region.StepRates([0.1], [0.9])
        factor, _ = trust.apply(
            [0], [value], [gradient], [None], rates, is_linear=True, total=lambda table: table
        )
        if before.any():
            rho = -float(gradient @ before / gradient.norm() / before.norm())
            cut = (rho - trust_region.BRAKE) / (1 - trust_region.BRAKE)
        velocity = 0.9 * velocity + value  # as torch.optim.SGD
        torch.testing.assert_close(velocity, 0.9 * (1 - cut) * before + factor * gradient)
        torch.testing.assert_close(trust.steps_taken["one"].matrix, velocity)
        torch.testing.assert_close(trust.squares[0], velocity @ velocity)
    assert cut == pytest.approx((math.sqrt(0.5) - 0.2) / 0.8)


def test_what_is_measured_is_the_momentum_of_the_optimizer() -> None:
    run = Run(network())
    for step in range(40):
        run.step(step)
    trust = run.kfac.bound.trust
    assert trust is not None
    layers = [m for m in run.model.modules() if isinstance(m, nn.Linear)]
    for step, layer in zip(trust.steps_taken.values(), layers, strict=True):
        weight, bias = (
            run.optimizer.state[p]["momentum_buffer"] for p in (layer.weight, layer.bias)
        )
        torch.testing.assert_close(step.matrix, torch.cat((weight, bias[:, None]), 1))


def test_momentum_before_the_preconditioner_averages_gradients_and_is_measured_exactly() -> None:
    """Against dense curvature, which stays that of the first batch: M, the step, its length, ρ."""
    m = 0.8
    steady = {"factor_update_steps": 1000, "inverse_update_steps": 1000}
    run = Run(network(), momentum=0.0, before=m, **steady)
    trust = run.kfac.bound.trust
    assert trust is not None
    average, last, descent, braked = None, None, 0.0, 0
    for step in range(40):
        x, y = batch(step)
        before = weights(run.model)
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        layers = [module for module in run.model if isinstance(module, nn.Linear)]
        gradient = torch.cat(
            [torch.cat((p.weight.grad, p.bias.grad[:, None]), 1).reshape(-1) for p in layers]
        )
        run.kfac.step()
        run.optimizer.step()
        assert trust.scale is not None
        curvature = torch.block_diag(*dense_curvature(run.kfac)) / trust.scale.fisher
        gradient = gradient / trust.scale.loss
        average = gradient if average is None else m * average + (1 - m) * gradient
        moved = torch.cat([b - a for a, b in zip(before, weights(run.model), strict=True)])
        direction = torch.linalg.solve(curvature, average)
        factor = float(run.kfac.bound.scale)
        torch.testing.assert_close(moved, -0.1 * factor * direction, rtol=1e-8, atol=1e-12)
        assert float(moved @ curvature @ moved) <= float(trust.growth) ** 2 * trust.kappa * 1.0001
        assert 0.01 * float(trust.squares.sum()) == pytest.approx(
            float(moved @ curvature @ moved), rel=1e-8
        )
        if last is not None:
            size = math.sqrt(
                float(gradient @ torch.linalg.solve(curvature, gradient))
                * float(last @ curvature @ last)
            )
            rho = float(gradient @ last) / size
            descent = 0.9 * descent + 0.1 * rho
            cut = min(max((rho - trust_region.BRAKE) / (1 - trust_region.BRAKE), 0.0), 1.0)
            braked += cut > 0
            average = (1 - cut) * average
        assert float(trust.descent) == pytest.approx(descent, abs=1e-7)
        last = moved
    assert braked


def test_momentum_before_the_preconditioner_outlives_a_gradient_that_is_not_finite() -> None:
    run = Run(network(), momentum=0.0, before=0.9)
    for step in range(3):
        run.step(step)
    before = weights(run.model)
    x, y = batch(3)
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(x), y).backward()
    run.model[0].weight.grad.fill_(math.nan)
    run.kfac.step()
    run.optimizer.step()
    for a, b in zip(before, weights(run.model), strict=True):
        assert a.equal(b)
    run.step(4)
    after = weights(run.model)
    assert all(bool(torch.isfinite(b).all()) for b in after)
    assert not after[0].equal(before[0])


def test_momentum_before_the_preconditioner_outlives_a_resize() -> None:
    whole, resized = (Run(network(), momentum=0.0, before=0.9) for _ in range(2))
    for step in range(12):
        whole.step(step)
        if step == 7:
            resized.kfac.resize(None)
        resized.step(step)
    trust = resized.kfac.bound.trust
    assert trust is not None and set(trust.averages) == {"0", "2"}
    for p, q in zip(whole.model.parameters(), resized.model.parameters(), strict=True):
        assert p.equal(q)


def test_momentum_on_both_sides_of_the_preconditioner_is_refused() -> None:
    run = Run(network(), before=0.9)
    with pytest.raises(ConfigError, match=r"before and behind.*=0\.9 of KFAC, 0\.9 of the"):
        run.step(0)
    with pytest.raises(ConfigError, match="needs trust_region=adaptive"):
        KFAC(network(), momentum=0.9, kl_clip=1e-3)


def test_growth_follows_descent_and_shrinks_on_overshoot() -> None:
    def growth(cosines: list[float]) -> list[float]:
        trust = trust_region.TrustRegion(["one"], torch.device("cpu"))
        trust.squares += 1.0
        found = []
        for cosine in cosines:
            trust._grow(1.0, -cosine)
            found.append(float(trust.growth))
        return found

    descent = growth([-1.0] * 60)
    assert descent == sorted(descent) and descent[-1] == trust_region.LARGEST
    assert growth([-1.0] * 60 + [0.0] * 100)[-1] == 1.0
    assert growth([0.9] * 60)[-1] == trust_region.SMALLEST
    assert growth([0.9] * 60 + [-0.1] * 200)[-1] == 1.0
    assert growth([-0.15, 0.15] * 50)[-1] == 1.0
    assert growth([math.nan] * 3) == [1.0] * 3


def test_the_course_of_the_rate_counts_from_its_largest_value() -> None:
    def lengths(rates: list[float]) -> list[float]:
        run = Run(network(), momentum=0.0, factor_update_steps=1000, inverse_update_steps=1000)
        found = []
        for rate in rates:
            run.optimizer.param_groups[0]["lr"] = rate
            run.step(0)
            assert run.kfac.bound.trust is not None
            length = math.sqrt(float(run.kfac.bound.trust.squares.sum()))
            found.append(rate * length / float(run.kfac.bound.trust.growth))
        return found

    root = math.sqrt(trust_region.LEAST)
    assert lengths([1.0, 2.0, 1.0, 0.2]) == pytest.approx(
        [root, root, root / 2, root / 10], rel=1e-9
    )


def test_a_given_kl_clip_is_the_fixed_rule() -> None:
    assert KfacOptions(kl_clip=1e-4).trust_region == "fixed"
    assert KfacOptions(kl_clip=None).trust_region == "none"
    config = KfacOptions(trust_region="adaptive")
    assert KFAC(network(), config, kl_clip=1e-4).options.trust_region == "fixed"
    assert KFAC(network(), config).options.trust_region == "adaptive"
    with pytest.raises(ConfigError, match="factor_scale"):
        KFAC(network(), trust_region="adaptive", factor_scale="kaisa")
    assert KfacOptions(factor_scale="kaisa").trust_region == "fixed"
    with pytest.raises(ConfigError, match="no effect"):
        KFAC(network(), trust_region="adaptive", kl_clip=1e-5)


def words(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(40, (6, 2), generator=generator),
        torch.randint(3, (6,), generator=generator),
    )


def reading(momentum: float) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 5), nn.Flatten(), nn.Tanh(), nn.Linear(10, 3))
    return Run(model.double(), momentum=momentum, factor_update_steps=10, inverse_update_steps=10)


def read(run: Run, step: int) -> None:
    x, y = words(step)
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(x), y).backward()
    run.kfac.step()
    run.optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_rows_that_are_not_used_cost_nothing_and_keep_their_momentum(momentum: float) -> None:
    run = reading(momentum)
    scales = set()
    for step in range(60):
        read(run, step)
        assert run.kfac.bound.trust is not None
        taken = run.kfac.bound.trust.steps_taken["0"]
        scales.add(taken.scale)
        table = run.model[0].weight
        velocity = run.optimizer.state[table].get("momentum_buffer", table.grad)
        torch.testing.assert_close(taken.scale * taken.matrix, velocity.t())
    assert len(scales) > 10 or not momentum
    assert min(scales) >= 2**-20


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_table_continues_bit_for_bit(momentum: float) -> None:
    whole, first, second = (reading(momentum) for _ in range(3))
    for step in range(15):
        read(whole, step)
    for step in range(7):
        read(first, step)
    state = first.kfac.state_dict()
    assert ("step_scale" in state["trust_region"]) == (momentum > 0)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.kfac.load_state_dict(state)
    for step in range(7, 15):
        read(second, step)
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert p.equal(q)


def test_predicted_change_is_that_of_the_whole_step_with_momentum_in_it() -> None:
    """Against the dense quadratic ∇Lᵀδ + ½ c δᵀ(F/c² + γI)δ, with factors that stay."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    run = Run(model, factor_update_steps=100, inverse_update_steps=100)
    for step in range(4):
        x, y = batch(step)
        before = model.weight.detach().clone()
        run.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert model.weight.grad is not None
        gradient = model.weight.grad.clone()
        run.kfac.step()
        run.optimizer.step()
        delta = model.weight.detach() - before
        trust, state = run.kfac.bound.trust, run.kfac.states[0]
        assert trust is not None and trust.scale is not None
        c = trust.scale.loss
        g = state.floored["G"]
        curved = g @ delta @ state.factors["A"] / c**2 + 0.01 * delta
        dense = (gradient * delta).sum() + 0.5 * c * (delta * curved).sum()
        assert run.kfac.predicted_change() == pytest.approx(float(dense), rel=1e-9)


def test_levenberg_marquardt_from_its_default_start_trains_a_regression() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    y = 100 * (x[:, :1] * x[:, 1:2] + x[:, 2:3]) + 150
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = {"rule": "levenberg_marquardt", "initial": 1e-3}
    kfac = KFAC(model, lr=optimizer, damping=rule)
    losses, values = [], set()
    for step in range(200):
        rows = torch.arange(32) + 32 * (step % 8)
        optimizer.zero_grad()
        loss = 0.5 * (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        due = kfac.reduction_due()
        kfac.step()
        optimizer.step()
        if due:
            with torch.no_grad():
                after = 0.5 * (model(x[rows]) - y[rows]).square().mean()
            kfac.adapt_damping(float(after - loss.detach()))
        losses.append(float(loss.detach()))
        values.add(kfac.damping)
    assert len(values) > 2
    assert sum(losses[-8:]) < 0.2 * sum(losses[:8])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_a_few_rows_equal_steps_of_the_whole_table(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(60, 4), nn.Linear(4, 5)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        kfac = KFAC(model, lr=optimizer, loss_reduction="mean", factor_update_steps=2)
        for seed in range(8):
            rows = torch.randint(30, (8, 2), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            kfac.step()
            optimizer.step()
        table: Tensor = model[0].weight.detach()
        return table

    few = trained()
    monkeypatch.setattr(EmbeddingLayer, "used_columns", lambda *a, **k: None)
    torch.testing.assert_close(few, trained(), rtol=1e-12, atol=1e-14)
