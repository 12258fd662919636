"""People's own models: nothing is left on them, other layers are named, coverage follows."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.errors import ElasticKfacError
from support.training_loops import X, Y, assert_same_factors, loss_of, mlp, seeded, stepped

# -- nothing is left on people's modules ---------------------------------------------------------


def attentive() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"att": nn.MultiheadAttention(8, 2, batch_first=True), "fc": nn.Linear(8, 3)}
    )


def attend(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model["fc"](model["att"](x, x, x)[0])  # type: ignore[index]
    return out


def test_a_zeroed_copy_of_an_attention_computes_zeros() -> None:
    model = attentive()
    kfac = KFAC(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert float(attend(twin, torch.randn(2, 5, 8)).norm()) == 0.0
    del kfac


def test_an_average_of_weights_computes_with_its_own() -> None:
    model = attentive()
    kfac = KFAC(model, loss_reduction="mean")
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 5, 8, generator=seeded(5))
    for _ in range(3):
        optimizer.zero_grad()
        attend(model, x).square().mean().backward()
        kfac.step()
        optimizer.step()
        average.update_parameters(model)
    fresh = attentive()
    fresh.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        assert torch.equal(attend(average.module, x), attend(fresh, x))


def test_a_whole_model_can_be_saved_and_scripted() -> None:
    model, plain = attentive(), mlp()
    both = KFAC(model), KFAC(plain)
    torch.save(model, io.BytesIO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(plain)
    for kfac in both:
        kfac.close()


def test_two_preconditioners_close_in_order_and_both_work() -> None:
    model = attentive()
    first, second = (KFAC(model, loss_reduction="mean") for _ in range(2))
    first.close()
    attend(model, torch.randn(2, 5, 8)).square().mean().backward()
    second.step()
    assert len(second.factors()) == 5
    second.close()


def test_a_users_own_forward_survives_close() -> None:
    model = attentive()
    original = model["att"].forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model["att"].forward = patched  # type: ignore[method-assign]
    KFAC(model).close()
    assert model["att"].forward is patched


def test_a_forgotten_preconditioner_leaves_no_hooks() -> None:
    model = mlp()
    for _ in range(3):
        kfac = KFAC(model)
        model.zero_grad()
        loss_of(model).backward()
        kfac.step()
        del kfac
        gc.collect()
        assert not model[0]._forward_hooks
        assert not model[0].weight._post_accumulate_grad_hooks  # type: ignore[union-attr]


def test_data_parallel_is_refused_in_one_line() -> None:
    with pytest.raises(ElasticKfacError, match="DistributedDataParallel"):
        KFAC(nn.DataParallel(mlp()))


# -- the layer really computes W x + b -----------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


class PadsItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Gain(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.embedding(x))), self.embedding.weight)


@pytest.mark.parametrize(
    ("layer", "shape"), [(Standardised(3, 4, 3), (2, 3, 5, 5)), (PadsItself(3, 4, 3), (2, 3, 3, 3))]
)
def test_a_layer_that_computes_something_else_is_left_out_by_name(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer, nn.Flatten(1), nn.LazyLinear(2)).double()
    x = torch.randn(shape, generator=seeded(5)).double()
    model(x)
    kfac = KFAC(model, kl_clip=None)
    model.zero_grad()
    model(x).square().mean().backward()
    plain = layer.weight.grad.clone()  # type: ignore[union-attr, operator]
    with pytest.warns(UserWarning, match=r"\b0 "):
        kfac.step()
    assert torch.equal(plain, layer.weight.grad)  # type: ignore[arg-type]
    assert kfac.coverage()["0"] != "covered" and kfac.coverage()["2"] == "covered"


def test_functional_tying_is_left_out_by_name() -> None:
    model = Tied().double()
    kfac = KFAC(model, kl_clip=None, loss_reduction="positions")
    x = torch.randint(10, (6, 5), generator=seeded(1))
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    plain = model.embedding.weight.grad.clone()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="embedding"):
        kfac.step()
    assert torch.equal(plain, model.embedding.weight.grad)  # type: ignore[arg-type]
    assert kfac.coverage()["inner"] == "covered"


def test_a_further_parameter_of_a_subclass_is_named_at_construction() -> None:
    with pytest.warns(UserWarning, match="gain"):
        KFAC(nn.Sequential(Gain(4, 3), nn.Linear(3, 3)))


def test_complex_weights_are_left_out_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="complex"):
        kfac = KFAC(model)
    assert "complex" in kfac.coverage()["0"]


def test_a_hook_that_changes_the_output_is_seen_through() -> None:
    def doubled() -> nn.Sequential:
        model = mlp()
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
        return model

    kfac = stepped(lambda m: loss_of(m, X[:1]).backward(), doubled)
    model = doubled()
    loss_of(model, X[:1]).backward()
    squares = sum(float(p.grad.square().sum()) for p in model[0].parameters())  # type: ignore[union-attr]
    factors = kfac.factors()["0"]
    assert float(factors["A"].trace() * factors["G"].trace()) == pytest.approx(squares)


def test_keyword_calls_count() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, features: Tensor) -> Tensor:
            out: Tensor = self.net[2](input=torch.tanh(self.net[0](input=features)))
            return out

    model = Net()
    kfac = KFAC(model, kl_clip=None)
    F.cross_entropy(model(features=X), Y).backward()
    kfac.step()
    right = stepped().factors()
    for ours, theirs in (("net.0", "0"), ("net.2", "2")):
        torch.testing.assert_close(kfac.factors()[ours]["G"], right[theirs]["G"])


# -- coverage follows the model ------------------------------------------------------------------


def two_steps(model: nn.Module, kfac: KFAC, layer: nn.Module) -> Tensor:
    """The weight's plain gradient in the second of two steps; the first one names the layer."""
    plain = torch.zeros(0)
    with pytest.warns(UserWarning, match="from the next pass on") as said:
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            plain = layer.weight.grad.clone()  # type: ignore[union-attr, operator]
            kfac.step()
    assert len(said) == 1
    return plain


def test_an_unfrozen_layer_is_covered_from_then_on() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    kfac = KFAC(model, factor_update_steps=1, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    assert "frozen" in kfac.coverage()["0"]
    model[0].requires_grad_(True)
    plain = two_steps(model, kfac, model[0])
    assert kfac.coverage()["0"] == "covered" and "0" in kfac.factors()
    assert not torch.equal(plain, model[0].weight.grad)  # type: ignore[arg-type]


def test_a_replaced_head_is_covered_from_then_on() -> None:
    model = mlp()
    kfac = KFAC(model, factor_update_steps=1, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    model[2] = nn.Linear(6, 3).double()
    plain = two_steps(model, kfac, model[2])
    assert not torch.equal(plain, model[2].weight.grad)  # type: ignore[arg-type]


def test_a_new_layer_is_due_at_once_and_not_at_the_next_interval() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None, factor_update_steps=2)
    due = []
    for step in range(6):
        if step == 1:
            model[2] = nn.Linear(6, 3).double()
        model.zero_grad()
        loss_of(model).backward()
        with pytest.warns(UserWarning, match="next pass") if step == 2 else nullcontext():
            kfac.step()
        due.append([bool(names) for names in kfac.due])
    # Seen in step 2, whose statistics are those of the old layers: its own come in step 3.
    assert due == [[step % 2 == 1, step % 2 == 1 or step == 2] for step in range(6)]
    assert kfac.states[1].inverse_step == 3


def test_a_layer_in_eval_mode_is_covered_all_the_same() -> None:
    def partly(model: nn.Module) -> None:
        model[0].eval()  # type: ignore[index]
        loss_of(model).backward()

    assert_same_factors(stepped(partly), stepped())


def test_a_bias_that_is_frozen_later_leaves_the_weight_covered() -> None:
    model = mlp()
    kfac = KFAC(model, factor_update_steps=1, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    plain = two_steps(model, kfac, model[0])
    assert not torch.equal(plain, model[0].weight.grad)  # type: ignore[arg-type]


def test_adaptive_intervals_of_layers_that_stay_are_kept() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None, refresh="adaptive", refresh_threshold=1e9)

    def step() -> None:
        model.zero_grad()
        loss_of(model).backward()
        kfac.step()

    while kfac.steps < 3:
        step()
    clocks, state = kfac.refresh.saved_clocks(), kfac.state_dict()
    assert clocks["0"]["A"]["interval"] > 1
    model[2] = nn.Linear(6, 3).double()
    with pytest.warns(UserWarning, match="from the next pass on: 2$"):
        while not kfac.factors_due():
            step()
        step()
    now = kfac.refresh.saved_clocks()
    assert now["0"] == clocks["0"] and now["2"]["A"]["refreshes"] == 0
    kept = kfac.state_dict()
    for kind in ("factors", "second_order"):
        torch.testing.assert_close(kept["layers"]["0"][kind], state["layers"]["0"][kind])
    torch.testing.assert_close(
        kept["refresh"]["snapshots"]["0"], state["refresh"]["snapshots"]["0"]
    )


def test_layer_norm_over_two_dimensions_takes_one_sample() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4))).double()
    kfac = KFAC(model)
    model(torch.randn(3, 4).double()).square().sum().backward()
    kfac.step()


def test_statistics_that_stay_away_are_an_error_even_if_a_layer_is_left_out() -> None:
    model = nn.Sequential(Standardised(3, 4, 3), nn.Flatten(1), nn.Linear(36, 2)).double()
    kfac = KFAC(model, factor_update_steps=1, kl_clip=None)
    x = torch.randn(2, 3, 5, 5, generator=seeded(5)).double()
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="W x"):
        kfac.step()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of no pass that was seen
    with pytest.raises(ElasticKfacError, match="no statistics"):
        kfac.step()
