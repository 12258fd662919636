"""More loops of the kinds that people write; each gives what one plain pass of its loss gives."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_kfac import KFAC
from elastic_kfac.curvature.layer import LayerState
from elastic_kfac.errors import ConfigError, UsageError
from support.training_loops import X, Y, assert_same_factors, loss_of, mlp, seeded, stepped

Loop = Callable[[nn.Module, KFAC], Any]


def _swa(model: nn.Module, kfac: KFAC) -> None:
    loss_of(model).backward()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    loss_of(average).backward()


def _copied_in_the_middle(model: nn.Module, kfac: KFAC) -> None:
    loss = loss_of(model)
    loss_of(copy.deepcopy(model)).backward()
    loss.backward()


def _gradients_for_a_log(model: nn.Module, kfac: KFAC) -> None:
    loss = loss_of(model)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def _hessian_vector(model: nn.Module, kfac: KFAC) -> None:
    weights = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model), weights, create_graph=True)
    torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), weights)
    loss_of(model).backward()


def _inference(model: nn.Module, kfac: KFAC) -> None:
    with torch.inference_mode():
        model(3 * X)
    loss_of(model).backward()
    with torch.no_grad():
        model(3 * X)


def _checkpointed(reentrant: bool) -> Loop:
    def loop(model: nn.Module, kfac: KFAC) -> None:
        out = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
        F.cross_entropy(out, Y).backward()

    return loop


def _uneven_micro_batches(model: nn.Module, kfac: KFAC) -> None:
    for part in (slice(0, 3), slice(3, 8)):
        with kfac.micro_batch(scale=1 / 8):
            loss = F.cross_entropy(model(X[part]), Y[part], reduction="sum") / 8
        loss.backward()


def _penalised(model: nn.Module, kfac: KFAC) -> None:
    penalty = sum(p.square().sum() for p in model.parameters())
    (loss_of(model) + 0.01 * penalty).backward()


def _hooked(model: nn.Module, kfac: KFAC) -> None:
    model[2].register_full_backward_hook(lambda module, inputs, outputs: None)  # type: ignore[index]
    loss_of(model).backward()


LOOPS: dict[str, Loop] = {
    "an average of weights is updated between": _swa,
    "the model is copied between forward and backward": _copied_in_the_middle,
    "gradients are taken for a log": _gradients_for_a_log,
    "a Hessian product comes before": _hessian_vector,
    "inference before and after": _inference,
    "a reentrant checkpoint": _checkpointed(True),
    "a checkpoint": _checkpointed(False),
    "uneven micro-batches": _uneven_micro_batches,
    "a penalty on the weights": _penalised,
    "a full backward hook": _hooked,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_gives_the_factors_of_one_plain_pass(name: str) -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None)
    LOOPS[name](model, kfac)
    kfac.step()
    assert_same_factors(kfac, stepped())


def test_a_step_that_a_scaler_skips_leaves_no_trace() -> None:
    model = mlp().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kfac = KFAC(model, lr=optimizer, grad_scaler=scaler, kl_clip=None)
    for inputs in (X.float() * float("inf"), X.float()):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, inputs)).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.update()
    right = stepped(lambda m: loss_of(m, X.float()).backward(), lambda: mlp().float())
    for layer, factors in right.factors().items():
        for name, value in factors.items():
            torch.testing.assert_close(kfac.factors()[layer][name], value, rtol=1e-5, atol=1e-7)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.reentrant:
            return self.net(x)  # type: ignore[no-any-return]
        out: Tensor = checkpoint(self.net, x, use_reentrant=True)
        return out


@pytest.mark.parametrize("sizes", [(2, 6), (4, 4)])
def test_unequal_forwards_through_a_reentrant_checkpoint_keep_their_batches(
    sizes: tuple[int, int],
) -> None:
    def loss(model: nn.Module) -> None:
        x = X.clone().requires_grad_()
        parts = zip(x.split(sizes), Y.split(sizes), strict=True)
        losses = [F.cross_entropy(model(part), target) for part, target in parts]
        (losses[0] + losses[1]).backward()

    found = stepped(loss, lambda: Checkpointed(True))
    assert_same_factors(found, stepped(loss, lambda: Checkpointed(False)))


def test_two_players_with_a_preconditioner_each_see_their_own_passes() -> None:
    def critic() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def maker() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    noise = torch.randn(8, 2, generator=seeded(9)).double()
    first, second = critic(), maker()
    ours, theirs = KFAC(first, kl_clip=None), KFAC(second, kl_clip=None)
    made = second(noise)
    real, fake = first(X), first(made.detach())
    (F.softplus(-real).mean() + F.softplus(fake).mean()).backward()
    ours.step()
    F.softplus(-first(made)).mean().backward()
    theirs.step()

    def critics_loss(model: nn.Module) -> None:
        parts = model(X), model(maker()(noise).detach())
        (F.softplus(-parts[0]).mean() + F.softplus(parts[1]).mean()).backward()

    assert_same_factors(ours, stepped(critics_loss, critic))
    right = stepped(lambda m: F.softplus(-critic()(m(noise))).mean().backward(), maker)
    assert_same_factors(theirs, right)


@pytest.mark.parametrize("first", [False, True])
def test_a_copied_pair_goes_on_beside_the_original(first: bool) -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None, factor_update_steps=1)

    def step(model: nn.Module, kfac: KFAC) -> None:
        model.zero_grad()
        loss_of(model).backward()
        kfac.step()

    if not first:
        step(model, kfac)
    twin, its = copy.deepcopy((model, kfac))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(twin, its)
    its.close()
    step(model, kfac)
    assert [s.factor_updates for s in kfac.states] == [s.factor_updates for s in its.states]
    assert_same_factors(its, kfac)


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ConfigError, match=r"given: 0\.weight on the meta device; model\.to_empty"):
        KFAC(model)


def test_pickling_is_refused_with_what_to_save() -> None:
    with pytest.raises(UsageError, match="state_dict"):
        pickle.dumps(KFAC(mlp()))


def test_a_layer_that_only_functions_use_is_named_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)}).double()
    kfac = KFAC(model, kl_clip=None)
    with pytest.warns(UserWarning, match=r"precondition: a \(they have a gradient") as named:
        for _ in range(2):
            model.zero_grad()
            hidden = F.linear(X, model["a"].weight, model["a"].bias).tanh()  # type: ignore[arg-type]
            F.cross_entropy(model["b"](hidden), Y).backward()
            kfac.step()
    assert len(named) == 1


def test_batch_norm_in_eval_mode_has_the_fisher_of_its_running_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).double()
    norm.running_mean.copy_(torch.randn(4))  # type: ignore[union-attr]
    norm.running_var.copy_(torch.rand(4) + 0.5)  # type: ignore[union-attr]
    model = nn.Sequential(norm.eval(), nn.Linear(4, 3).double())
    kfac = KFAC(model, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    right = torch.zeros(4, 2, 2).double()
    for n in range(len(X)):
        model.zero_grad()
        F.cross_entropy(model(X[n : n + 1]), Y[n : n + 1]).backward()
        both = torch.stack([norm.weight.grad, norm.bias.grad], -1)  # type: ignore[list-item]
        right += both[:, :, None] * both[:, None, :] / len(X)
    torch.testing.assert_close(kfac.factors()["0"]["F"], right, rtol=1e-9, atol=1e-12)


def test_weights_that_get_another_shape_are_followed() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    model.zero_grad()
    for p, shape in ((model[0].weight, (5, 4)), (model[0].bias, (5,)), (model[2].weight, (3, 5))):
        p.data = torch.randn(shape).double()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="has changed.*: 0, 2"):
        loss_of(model).backward()
        kfac.step()
    model.zero_grad()
    loss_of(model).backward()
    kfac.step()
    assert {name: len(f["A"]) for name, f in kfac.factors().items()} == {"0": 5, "2": 6}


def test_one_number_before_the_inputs_does_not_count_the_samples() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return scale * out

    model = Scaled()
    kfac = KFAC(model, kl_clip=None)
    F.cross_entropy(model(torch.ones(1).double(), X), Y).backward()
    kfac.step()
    torch.testing.assert_close([*kfac.factors().values()], [*stepped().factors().values()])


def test_dampening_is_no_momentum_that_the_trust_region_can_measure() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    kfac = KFAC(model, lr=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        kfac.step()
        optimizer.step()
    assert kfac.bound.trust is not None and not kfac.bound.trust.steps_taken
    assert float(kfac.bound.trust.growth) == 1.0


def test_the_reproducible_mode_names_that_it_does_not_follow_a_changed_model() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    kfac = KFAC(model, tree=True)
    with pytest.warns(UserWarning, match="reproducible mode.*build another KFAC") as named:
        for _ in range(2):
            model.zero_grad()
            model[0].requires_grad_(True)
            loss_of(model).backward()
            kfac.step(statistics=kfac.take_statistics())
    assert len(named) == 1


def test_sums_that_a_caller_gives_stay_as_they_are() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {"factor_update_steps": 1}
    given, own = KFAC(model, tree=True, **options), KFAC(twin, **options)
    for _ in range(3):
        for each in (model, twin):
            each.zero_grad()
            loss_of(each).backward()
        statistics = given.take_statistics()
        before = copy.deepcopy(statistics.sums)
        given.step(statistics=statistics)
        for sums, copies in zip(statistics.sums, before, strict=True):
            assert sums and all(torch.equal(sums[name], copies[name]) for name in copies)
        own.step()
    assert_same_factors(given, own)


@pytest.mark.parametrize("padded", [False, True])
def test_an_average_is_where_its_sum_was_unless_more_is_there(padded: bool) -> None:
    (layer,) = KFAC(nn.Linear(4, 3, bias=False)).layers
    total = torch.randn(5 if padded else 4, 4)[:4]
    expected = 0.9 * torch.eye(4) + 0.1 * total / 8
    state = LayerState({"A": torch.eye(4)}, factor_updates=9)
    kept = layer.average(state, {"A": total}, {"A": 8.0}, 0.95)
    torch.testing.assert_close(kept.factors["A"], expected)
    moved = layer.average(state, {"A": total}, {"A": 8.0}, 0.95, consume=True)
    torch.testing.assert_close(moved.factors["A"], expected)
    assert (moved.factors["A"].data_ptr() == total.data_ptr()) is not padded
    torch.testing.assert_close(state.factors["A"], torch.eye(4))


def refused_in_backward(model: nn.Module) -> None:
    hidden = model[0](X)  # type: ignore[index]

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    hidden.register_hook(refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        F.cross_entropy(model[2](hidden.tanh()), Y).backward()  # type: ignore[index]
    model.zero_grad()


def refused_in_forward(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5).double())


def in_another_model(model: nn.Module) -> None:
    other = nn.Sequential(model[0], nn.Tanh(), nn.Linear(6, 2).double())  # type: ignore[index]
    other(X).square().mean().backward()
    model.zero_grad()


def a_copy_by_pickle(model: nn.Module) -> None:
    loss_of(pickle.loads(pickle.dumps(model))).backward()


def inference(model: nn.Module) -> None:
    with torch.inference_mode():
        model(X)


def layer_by_layer_reset(model: nn.Module) -> None:
    loss_of(model, 5 * X).backward()
    for layer in model.children():
        layer.zero_grad()


@pytest.mark.parametrize(
    "first",
    [
        *(refused_in_backward, refused_in_forward, in_another_model),
        *(a_copy_by_pickle, inference, layer_by_layer_reset),
    ],
)
def test_what_comes_before_the_pass_does_not_count(first: Callable[[nn.Module], None]) -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None)
    first(model)
    loss_of(model).backward()
    kfac.step()
    assert_same_factors(kfac, stepped())


def test_a_hook_that_scales_the_gradient_of_an_output_leaves_its_layer_out_by_name() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None)
    out = model(X)
    out.register_hook(lambda g: 2 * g)
    (F.cross_entropy(out, Y) / 2).backward()
    with pytest.warns(UserWarning, match="2 .its gradient is not that of W x"):
        kfac.step()
    right = stepped().factors()["0"]
    torch.testing.assert_close(kfac.factors(), {"0": right}, rtol=1e-9, atol=1e-12)


def test_a_bias_that_is_added_and_a_larger_table_are_followed() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3, bias=False)).double()
    kfac, indices = KFAC(model, kl_clip=None, factor_update_steps=1), torch.arange(8)
    for step in range(3):
        model.zero_grad()
        if step == 1:
            model[0] = nn.Embedding(12, 4).double()
            model[1].bias = nn.Parameter(torch.zeros(3).double())
        F.cross_entropy(model(indices), Y).backward()
        if step == 1:
            with pytest.warns(UserWarning, match="has changed.*: 0, 1"):
                kfac.step()
        else:
            kfac.step()
    assert {name: len(f["A"]) for name, f in kfac.factors().items()} == {"0": 12, "1": 5}
