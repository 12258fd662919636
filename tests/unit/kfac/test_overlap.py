"""`overlap_reduction`: the curvature that is due in one step is used from the next one on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.config.kfac import KfacConfig, KfacOptions, ShardedConfig
from elastic_kfac.errors import ConfigError, UsageError
from support.training_loops import SharedQueries

GAMMA, DECAY, LR = 0.05, 0.7, 0.2
FACTORS_EVERY, INVERSES_EVERY = 2, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 4, dtype=torch.double, generator=generator)
    return x, torch.randint(3, (7,), generator=generator)


def build(model: nn.Module, **options: Any) -> KFAC:
    given = {
        "lr": LR,
        "damping": GAMMA,
        "factor_decay": DECAY,
        "factor_update_steps": FACTORS_EVERY,
        "inverse_update_steps": INVERSES_EVERY,
        "kl_clip": None,
        "overlap_reduction": True,
    }
    return KFAC(model, **{**given, **options})


def train(model: nn.Module, kfac: KFAC, steps: Sequence[int]) -> list[Tensor]:
    """The weights after each step."""
    seen = []
    for step in steps:
        x, y = batch(step)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        descend(model)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return seen


def descend(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= LR * p.grad  # type: ignore[operator]


# -- the plain loop -----------------------------------------------------------------------------


def sums(model: nn.Sequential, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(A, G) of both layers, from one sample at a time."""
    found = []
    layers = [model[0], model[2]]
    for layer in layers:
        a = torch.zeros(layer.in_features + 1, layer.in_features + 1, dtype=torch.double)
        g = torch.zeros(layer.out_features, layer.out_features, dtype=torch.double)
        found.append((a, g))
    for one, label in zip(x, y, strict=True):
        h = [one]
        outputs = [model[0](one)]
        h.append(torch.tanh(outputs[0]))
        outputs.append(model[2](h[1]))
        gradients = torch.autograd.grad(F.cross_entropy(outputs[1], label), outputs)
        for (a, g), given, gradient in zip(found, h, gradients, strict=True):
            row = torch.cat([given.detach(), torch.ones(1, dtype=torch.double)])
            a += torch.outer(row, row) / len(x)
            g += torch.outer(gradient, gradient) / len(x)
    return found


def dense(steps: int, late: int) -> list[Tensor]:
    """The weights after each step of K-FAC whose step k uses the curvature due in step k - late."""
    model, seen = network(), []
    factors: list[tuple[Tensor, Tensor]] = []
    curvature: list[list[Tensor]] = []
    for step in range(steps):
        x, y = batch(step)
        if step % FACTORS_EVERY == 0:
            new, old = sums(model, x, y), min(1 - 1 / (1 + step // FACTORS_EVERY), DECAY)
            factors = [
                (old * a + (1 - old) * b, old * g + (1 - old) * h)
                for (a, g), (b, h) in zip(factors or new, new, strict=True)
            ]
        inverses = curvature[-1] if curvature else []
        if step % INVERSES_EVERY == 0:
            inverses = [
                torch.linalg.inv(torch.kron(g, a) + GAMMA * torch.eye(len(g) * len(a)).double())
                for a, g in factors
            ]
        curvature.append(inverses)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for layer, inverse in zip(
            (model[0], model[2]), curvature[max(0, step - late)], strict=True
        ):
            d = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            p = (inverse @ d.reshape(-1)).view_as(d)
            layer.weight.grad, layer.bias.grad = p[:, :-1].clone(), p[:, -1].clone()
        descend(model)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return seen


@pytest.mark.parametrize("late", [0, 1])
def test_curvature_is_used_exactly_one_step_after_it_is_due(late: int) -> None:
    model = network()
    ours = train(model, build(model, overlap_reduction=bool(late)), range(11))
    right, other = dense(11, late), dense(11, 1 - late)
    for step, weights in enumerate(ours):
        torch.testing.assert_close(
            weights, right[step], rtol=1e-9, atol=1e-11, msg=lambda m, step=step: f"{step}: {m}"
        )
    # Steps 1 to 3 use what step 0 has decomposed; step 4 is the first that differs.
    assert torch.equal(right[3], other[3]) and (right[4] - other[4]).abs().max() > 1e-4


def test_the_first_step_has_its_curvature_at_once() -> None:
    model = network()
    kfac = build(model)
    train(model, kfac, [0])
    assert {(s.factor_updates, s.inverse_step) for s in kfac.states} == {(1, 0)}
    assert kfac.overlap.late is None
    train(model, kfac, [1, 2])
    assert {s.factor_updates for s in kfac.states} == {1} and kfac.overlap.late is not None
    train(model, kfac, [3])
    assert {s.factor_updates for s in kfac.states} == {2}


# -- around steps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look",
    [
        lambda kfac: kfac.state_dict(),
        lambda kfac: kfac.flush(),
        lambda kfac: copy.deepcopy((kfac._model, kfac)),
        lambda kfac: kfac.resize(None),
        lambda kfac: kfac.skip_step(),
        lambda kfac: (kfac.leave(), kfac.resize(None)),
        lambda kfac: kfac.load_state_dict(kfac.state_dict()),
    ],
)
@pytest.mark.parametrize("options", [{}, {"method": "inverse"}, {"trust_region": "adaptive"}])
def test_nothing_done_between_the_steps_changes_them(
    look: Callable[[KFAC], Any], options: dict[str, Any]
) -> None:
    if options.get("trust_region"):
        options = {**options, "kl_clip": KfacOptions().kl_clip}
    left, looked_at = network(), network()
    expected = train(left, build(left, **options), range(10))
    kfac, seen = build(looked_at, **options), []
    for step in range(10):
        seen += train(looked_at, kfac, [step])
        look(kfac)
    assert torch.equal(torch.stack(seen), torch.stack(expected))


def test_skipped_steps_leave_what_is_under_way_to_the_next_one_that_is_taken() -> None:
    plain, scaled = network(), network()
    expected = train(plain, build(plain), range(6))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=LR)
    kfac = build(scaled, lr=optimizer, grad_scaler=scaler)
    seen = []
    for step in range(6):
        x, y = batch(step)
        for overflow in (step in (3, 5), False)[: 2 if step in (3, 5) else 1]:
            optimizer.zero_grad()
            factor = float("inf") if overflow else 1.0
            scaler.scale(F.cross_entropy(scaled(x), y) * factor).backward()
            scaler.unscale_(optimizer)
            kfac.step()
            scaler.step(optimizer)
            scaler.update()
        seen.append(nn.utils.parameters_to_vector(scaled.parameters()).detach().clone())
    assert kfac.counters["skipped_steps"] == 2
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_statistics_that_are_not_finite_are_discarded_a_step_later() -> None:
    model = network()
    kfac = build(model, factor_update_steps=1, inverse_update_steps=1)
    train(model, kfac, range(3))
    kfac.flush()
    before = copy.deepcopy(kfac.factors())
    x, y = batch(3)
    model.zero_grad()
    (F.cross_entropy(model(x), y) * float("inf")).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kfac.step()
    assert not kfac.counters["discarded_statistics"]
    kfac.flush()
    assert kfac.counters["discarded_statistics"] == 2
    for name, factors in kfac.factors().items():
        assert all(torch.equal(value, before[name][factor]) for factor, value in factors.items())
    train(model, kfac, [4, 5])
    assert {s.factor_updates for s in kfac.states} == {4}


@pytest.mark.parametrize("spread", [False, True])
def test_a_state_goes_on_with_and_without_the_option(spread: bool) -> None:
    options = {"factor_update_steps": 2, "inverse_update_steps": 4, "stagger": spread}
    for first, then in ((True, False), (False, True)):
        model = network()
        kfac = build(model, overlap_reduction=first, **options)
        train(model, kfac, range(5))  # step 4 has statistics and decompositions
        state = kfac.state_dict()
        assert state.get("late") == (4 if first else None)
        again = build(copy.deepcopy(model), overlap_reduction=then, **options)
        again.load_state_dict(state)
        train(again._model, again, [5])
        assert {s.factor_updates for s in again.states} == {3}
        if not spread:
            assert {s.inverse_step for s in again.states} == {4}


def test_layers_that_change_are_followed_with_statistics_under_way() -> None:
    model = network()
    kfac = build(model, factor_update_steps=1, inverse_update_steps=1)
    train(model, kfac, range(3))
    model[2].requires_grad_(False)
    model.add_module("3", nn.Linear(3, 3).double())
    with pytest.warns(UserWarning, match="from the next pass on: 3"):
        train_trainable(model, kfac, [3])
    assert [layer.name for layer in kfac.layers] == ["0", "3"]
    assert kfac.states[0].factor_updates == 3
    train_trainable(model, kfac, [4, 5, 6])
    assert [s.factor_updates for s in kfac.states] == [5, 2]


def train_trainable(model: nn.Module, kfac: KFAC, steps: Sequence[int]) -> None:
    for step in steps:
        x, y = batch(step)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kfac.step()


def test_a_layer_with_faults_is_left_out_though_more_statistics_of_it_are_under_way() -> None:
    model = SharedQueries().double()
    kfac = build(model, factor_update_steps=1, inverse_update_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            model.shared = step == 2
            x, y = batch(step)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            kfac.step(num_samples=7, loss_scale_per_sample=1 / 7)
    assert kfac.coverage()["inner"] == "covered"
    assert "shared by all samples" in kfac.coverage()["queries"]
    assert sum("does not precondition: queries" in str(w.message) for w in caught) == 1
    assert not kfac.states[1].factors


def test_a_step_without_statistics_is_named_in_the_next_one() -> None:
    model = network()
    kfac = build(model, factor_update_steps=1, inverse_update_steps=1)
    train(model, kfac, range(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kfac.step()
    with pytest.raises(UsageError, match="found no statistics"):
        train(model, kfac, [3])
    train(model, kfac, [4, 5])


def test_what_is_under_way_is_counted_and_closing_waits_for_it() -> None:
    model = network()
    kfac = build(model, factor_update_steps=1, inverse_update_steps=1)
    train(model, kfac, range(2))
    elements = sum(t.numel() for f in kfac.factors().values() for t in f.values())
    assert kfac.memory_usage()["pending"] == 8 * elements
    kfac.close()
    assert {s.factor_updates for s in kfac.states} == {1}
    kfac.flush()
    assert {s.factor_updates for s in kfac.states} == {2}
    assert kfac.memory_usage()["pending"] == 0


# -- what it cannot do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"refresh": "adaptive"}, "overlap_reduction=true needs refresh=fixed"),
        ({"method": "ekfac"}, "overlap_reduction=true needs method=eigen, inverse or one_sided"),
        ({"tree": True}, "given: overlap_reduction=True with tree=True; allowed: .*; leave"),
        (
            {"sharding": ShardedConfig(gather="gradients")},
            "given: overlap_reduction=True with sharding; allowed: .*; leave",
        ),
    ],
)
def test_what_needs_statistics_at_once_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        build(network(), **options)
    assert "\n" not in str(error.value)


def test_it_is_a_key_of_a_run() -> None:
    assert KfacConfig(overlap_reduction=True).overlap_reduction
    assert not KfacConfig().overlap_reduction
