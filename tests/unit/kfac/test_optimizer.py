"""KFACOptimizer does what torch's own tests ask of an optimizer, and equals KFAC beside its inner rule.

The checks named `torch_*` are those of torch's test_optim.py and test_lrscheduler.py, over a model of
layers instead of bare parameters.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from elastic_kfac import KFAC, KFACOptimizer
from elastic_kfac.errors import ConfigError, StateError, UsageError
from support.training_loops import X, Y, loss_of, mlp

RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.1, "momentum": 0.9, **k}),
    "adamw": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.01, **k}),
}
every_rule = pytest.mark.parametrize("rule", RULES)
# The adaptive trust region would hide a wrong scale of the statistics.
OPTIONS: dict[str, Any] = {
    "factor_update_steps": 2,
    "inverse_update_steps": 4,
    "damping": 0.1,
    "trust_region": "none",
}


def make(rule: str = "sgd", **options: Any) -> tuple[nn.Module, KFACOptimizer]:
    model = mlp()
    return model, KFACOptimizer(model, RULES[rule](model.parameters()), **{**OPTIONS, **options})


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(found: nn.Module, right: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(
        values(found), values(right), **(tolerance or {"rtol": 0, "atol": 0})
    )


def beside(rule: str, steps: int) -> nn.Module:
    """The preconditioner form of `make`."""
    model = mlp()
    inner = RULES[rule](model.parameters())
    kfac = KFAC(model, lr=inner, **OPTIONS)
    for _ in range(steps):
        inner.zero_grad()
        loss_of(model).backward()
        kfac.step()
        inner.step()
    return model


@every_rule
def test_step_equals_preconditioner_and_inner_rule(rule: str) -> None:
    model, optimizer = make(rule)
    take(model, optimizer, 6)
    assert_equal(model, beside(rule, 6))


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned() -> None:
    model, optimizer = make()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(6)]
    assert calls == [True] * 6 and losses[-1] < losses[0]
    assert_equal(model, beside("sgd", 6))


@every_rule
@pytest.mark.parametrize("foreach", [False, True])
def test_foreach_of_the_inner_rule_changes_nothing(rule: str, foreach: bool) -> None:
    model = mlp()
    optimizer = KFACOptimizer(model, RULES[rule](model.parameters(), foreach=foreach), **OPTIONS)
    assert optimizer.defaults["foreach"] is foreach
    take(model, optimizer, 6)
    assert_equal(model, beside(rule, 6), rtol=1e-12, atol=1e-12)


SCHEDULES: tuple[Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], ...] = (
    lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=2),
    lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
    lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
    lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_schedules_move_the_inner_rate_and_the_loss_goes_down(
    schedule: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler],
) -> None:
    model, optimizer = make()
    scheduler = schedule(optimizer)
    first = loss_of(model).item()
    rates = set()
    for _ in range(6):
        take(model, optimizer, 1)
        rates.add(optimizer.inner.param_groups[0]["lr"])
        scheduler.step()
    assert loss_of(model).item() < first and len(rates) > 1


def test_torch_plateau_and_tensor_rates() -> None:
    model = mlp()
    inner = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=False)
    optimizer = KFACOptimizer(model, inner, **OPTIONS)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0, 3.0):
        take(model, optimizer, 1)
        scheduler.step(loss)
    assert float(inner.param_groups[0]["lr"]) == pytest.approx(0.0001)


def test_torch_param_groups_have_rates_of_their_own_and_can_be_added() -> None:
    model = mlp()
    first, last = model[0], model[2]
    groups = [{"params": last.weight, "lr": 0.0}, {"params": list(first.parameters())}]
    optimizer = KFACOptimizer(model, torch.optim.SGD(groups, lr=0.1), skip_layers=["^2$"])
    before = values(model)
    optimizer.add_param_group({"params": [last.bias], "lr": 0.0})
    take(model, optimizer, 2)
    weight, bias, last_weight, last_bias = values(model)
    assert not torch.equal(weight, before[0]) and not torch.equal(bias, before[1])
    assert torch.equal(last_weight, before[2]) and torch.equal(last_bias, before[3])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [last.bias]})


@every_rule
def test_torch_step_without_or_with_zero_gradients_changes_nothing(rule: str) -> None:
    model = mlp()
    inner = RULES[rule](model.parameters(), **({"weight_decay": 0.0} if rule == "adamw" else {}))
    optimizer = KFACOptimizer(model, inner, **OPTIONS)
    before = values(model)
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    assert optimizer.kfac.steps == 0


def test_gradients_without_a_pass_are_refused() -> None:
    model, optimizer = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(UsageError, match="no statistics"):
        optimizer.step()


@every_rule
def test_torch_state_continues_bit_for_bit_from_weights_only_files(rule: str) -> None:
    model, optimizer = make(rule)
    take(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    take(model, optimizer, 4)
    other, again = make(rule)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    take(other, again, 4)
    assert_equal(other, model)
    assert again.kfac.steps == 7
    keys = [list(o.state_dict()["state"]) for o in (optimizer, again, again)]
    assert keys[0] == keys[1] == keys[2]  # torch: deterministic


def test_state_of_another_model_changes_nothing_and_of_the_inner_rule_alone_warns() -> None:
    model, optimizer = make()
    take(model, optimizer, 1)
    state = optimizer.state_dict()
    state["kfac"] = {**state["kfac"], "layers": {}}
    before = copy.deepcopy(optimizer.inner.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(StateError):
        optimizer.load_state_dict(state)
    assert optimizer.inner.state_dict()["param_groups"] == before["param_groups"]
    with pytest.warns(UserWarning, match="starts afresh"):
        optimizer.load_state_dict(optimizer.inner.state_dict())


def test_torch_hooks_of_step_and_state() -> None:
    model, optimizer = make()
    seen: list[str] = []
    removers = [
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append("after")),
        optimizer.inner.register_step_pre_hook(lambda o, a, k: seen.append("inner")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append(type(o).__name__)),
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving")),
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1}),
        optimizer.register_load_state_dict_pre_hook(
            lambda o, state: {k: v for k, v in state.items() if k != "note"}
        ),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded")),
    ]
    take(model, optimizer, 1)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    for remover in removers:
        remover.remove()
    take(model, optimizer, 1)
    assert state["note"] == 1
    assert [name for name in seen if name not in ("SGD", "KFACOptimizer")] == [
        "before",
        "inner",
        "after",
        "saving",
        "loaded",
    ]
    assert seen.count("KFACOptimizer") == seen.count("SGD") == 1


def test_torch_copies_with_the_model_and_prints() -> None:
    model, optimizer = make()
    take(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    take(model, optimizer, 3)
    take(other, twin, 3)
    assert_equal(other, model)
    assert "SGD" in repr(optimizer) and "momentum: 0.9" in repr(optimizer)
    with pytest.raises(UsageError, match="pickle"):
        pickle.dumps(optimizer)


def test_torch_checkpoint_helpers_make_the_state_without_a_step() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = make("adamw")
    before = values(model)
    state = get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    assert optimizer.kfac.steps == 0


# -- loss scaling ------------------------------------------------------------------------------


def scaled_run(given: bool, clips: bool, steps: int = 5) -> tuple[nn.Module, KFACOptimizer]:
    """The third pass overflows."""
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    inner = RULES["sgd"](model.parameters())
    optimizer = KFACOptimizer(model, inner, grad_scaler=scaler if given else None, **OPTIONS)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, X * (float("inf") if step == 2 else 1.0))
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer


@pytest.mark.parametrize(("given", "clips"), [(False, False), (True, False), (True, True)])
def test_scaled_loss_gives_the_unscaled_result_and_skips_an_overflow(
    given: bool, clips: bool
) -> None:
    model, optimizer = scaled_run(given, clips)
    assert optimizer.kfac.steps == 4
    assert_equal(model, beside("sgd", 4), rtol=1e-12, atol=1e-12)


def test_unknown_scale_and_scaled_gradients_are_refused() -> None:
    with pytest.raises(UsageError, match="grad_scaler=scaler"):
        scaled_run(False, True, 1)
    model = mlp()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = KFACOptimizer(model, RULES["sgd"](model.parameters()), grad_scaler=scaler)
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(UsageError, match=r"scaler\.step"):
        optimizer.step()


def test_clipped_and_accumulated_gradients_equal_the_preconditioner_form() -> None:
    def run(model: nn.Module, precondition: Callable[[], Any], step: Callable[[], Any]) -> None:
        for _ in range(4):
            for part in (slice(0, 4), slice(4, 8)):
                loss = nn.functional.cross_entropy(model(X[part]), Y[part])
                (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            precondition()
            step()
            model.zero_grad()

    model, optimizer = make(accumulation_steps=2)
    run(model, lambda: None, optimizer.step)
    other = mlp()
    inner = RULES["sgd"](other.parameters())
    kfac = KFAC(other, lr=inner, accumulation_steps=2, **OPTIONS)
    run(other, kfac.step, inner.step)
    assert_equal(model, other)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (lambda m: (m, m.parameters()), {}, "wraps an optimizer"),
        (lambda m: (m, torch.optim.LBFGS(m.parameters())), {}, "LBFGS"),
        (lambda m: (m, RULES["sgd"](m.parameters())), {"lr": 0.1}, "inner optimizer's lr"),
        (lambda m: (m, RULES["sgd"](m.parameters())), {"dampin": 0.1}, "did you mean damping"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments: Any, options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        KFACOptimizer(*arguments(mlp()), **options)
    assert "\n" not in str(raised.value)
