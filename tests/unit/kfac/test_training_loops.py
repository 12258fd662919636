"""People's own training loops: KFAC's factors are those of the loss whose gradient is in `.grad`."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from elastic_kfac import KFAC
from elastic_kfac.errors import ElasticKfacError


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


X = torch.randn(8, 4, generator=seeded(1)).double()
Y = torch.randint(3, (8,), generator=seeded(2))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y[: len(x)])


def stepped(
    prepare: Callable[[nn.Module], Any] = lambda model: loss_of(model).backward(),
    model: Callable[[], nn.Module] = mlp,
    **options: Any,
) -> KFAC:
    """A preconditioner after one step on what `prepare` leaves in `.grad`."""
    net = model()
    kfac = KFAC(net, **{"kl_clip": None, **options})
    told = prepare(net)
    kfac.step(**(told if isinstance(told, dict) else {}))
    return kfac


def assert_same_factors(found: KFAC, right: KFAC) -> None:
    ours, theirs = found.factors(), right.factors()
    assert ours.keys() == theirs.keys() and theirs
    for layer, factors in theirs.items():
        for name, value in factors.items():
            torch.testing.assert_close(ours[layer][name], value, rtol=1e-9, atol=1e-12)


# -- only the gradient's own passes --------------------------------------------------------------


def saliency(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def generator_through_frozen(model: nn.Module) -> None:
    generator = nn.Linear(2, 4).double()
    model.requires_grad_(False)
    F.softplus(-model(generator(torch.randn(8, 2).double()))).mean().backward()
    model.requires_grad_(True)


def generator_through_live(model: nn.Module) -> None:
    generator = nn.Linear(2, 4).double()
    F.softplus(-model(generator(torch.randn(8, 2).double()))).mean().backward()
    model.zero_grad()


def outlier(set_to_none: bool) -> Callable[[nn.Module], None]:
    def drop(model: nn.Module) -> None:
        (1000 * loss_of(model, 100 * X)).backward()
        model.zero_grad(set_to_none=set_to_none)

    return drop


def not_a_number(model: nn.Module) -> None:
    (float("nan") * loss_of(model)).backward()
    model.zero_grad()


def per_sample_gradients(model: nn.Module) -> None:
    values = {name: p.detach() for name, p in model.named_parameters()}

    def one(p: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (x[None],)), y[None])

    vmap(grad(one), (None, 0, 0))(values, X, Y)


def first_pass_of_sam(model: nn.Module) -> None:
    loss_of(model).backward()
    model.zero_grad()


def task_norms(model: nn.Module) -> None:
    out = model(X)
    for loss in (F.cross_entropy(out, Y), out.square().mean()):
        torch.autograd.grad(loss, model[2].weight, retain_graph=True)  # type: ignore[index]


def hessian_product(model: nn.Module) -> None:
    weights = list(model.parameters())
    first = torch.autograd.grad(loss_of(model), weights, create_graph=True)
    torch.autograd.grad(sum((g * g).sum() for g in first), weights)


def evaluation(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(100 * X)
    model(100 * X)
    model.train()


ASIDE = [
    saliency,
    generator_through_frozen,
    generator_through_live,
    outlier(True),
    outlier(False),
    not_a_number,
    per_sample_gradients,
    first_pass_of_sam,
    task_norms,
    hessian_product,
    evaluation,
]


@pytest.mark.parametrize("aside", ASIDE)
def test_passes_on_the_side_do_not_count(aside: Callable[[nn.Module], None]) -> None:
    def both(model: nn.Module) -> None:
        aside(model)
        loss_of(model).backward()

    assert_same_factors(stepped(both), stepped())


def test_two_losses_with_a_retained_graph_equal_their_sum() -> None:
    def apart(model: nn.Module) -> None:
        out = model(X)
        F.cross_entropy(out, Y).backward(retain_graph=True)
        out.square().mean().backward()

    def together(model: nn.Module) -> None:
        out = model(X)
        (F.cross_entropy(out, Y) + out.square().mean()).backward()

    assert_same_factors(stepped(apart), stepped(together))


def test_a_loss_and_its_negative_have_no_fisher() -> None:
    def both(model: nn.Module) -> None:
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        (-loss).backward()

    assert all(float(f["G"].abs().sum()) == 0 for f in stepped(both).factors().values())


def test_step_inside_a_closure_of_the_optimizer_counts_the_last_pass() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model, lr=optimizer, kl_clip=None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        kfac.step()
        return loss

    optimizer.step(closure)
    assert_same_factors(kfac, stepped())


# -- what is a sample ----------------------------------------------------------------------------


def test_order_of_unequal_batches_in_one_backward_does_not_matter() -> None:
    u = torch.randn(12, 4, generator=seeded(3)).double()

    def labelled_first(model: nn.Module) -> None:
        a = model(X[:4])
        b = model(u)
        (F.cross_entropy(a, Y[:4]) + b.square().mean()).backward()

    def unlabelled_first(model: nn.Module) -> None:
        b = model(u)
        a = model(X[:4])
        (F.cross_entropy(a, Y[:4]) + b.square().mean()).backward()

    assert_same_factors(stepped(labelled_first), stepped(unlabelled_first))
    total = X[:4].square().sum() + u.square().sum() + 16
    torch.testing.assert_close(stepped(labelled_first).factors()["0"]["A"].trace(), total / 16)


def test_embedding_of_one_index_per_sample_is_a_batch() -> None:
    index = torch.randint(10, (32,), generator=seeded(1))

    def tables() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"u": nn.Embedding(10, 5), "v": nn.Embedding(10, 5)}).double()

    def flat(model: nn.Module) -> None:
        (model["u"](index) * model["v"](index)).sum(-1).square().mean().backward()  # type: ignore[index]

    def column(model: nn.Module) -> None:
        u, v = (model[n](index[:, None]).squeeze(1) for n in "uv")  # type: ignore[index]
        (u * v).sum(-1).square().mean().backward()

    found = stepped(flat, tables)
    torch.testing.assert_close(found.factors()["u"]["A"].sum(), torch.tensor(1.0).double())
    assert_same_factors(found, stepped(column, tables))


@pytest.mark.parametrize("positions", [6, 16, 32])
def test_a_position_embedding_shared_by_all_samples_is_left_out_by_name(positions: int) -> None:
    n = 16
    tokens = torch.randint(20, (n, positions), generator=seeded(1))
    labels = torch.randint(3, (n,), generator=seeded(2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.t, self.p = nn.Embedding(20, 8), nn.Embedding(positions, 8)
            self.f = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            where = torch.arange(x.shape[1])[None]
            out: Tensor = self.f((self.t(x) + self.p(where)).tanh()).mean(1)
            return out

    model = Net().double()
    kfac = KFAC(model, kl_clip=None)
    F.cross_entropy(model(tokens), labels).backward()
    plain = model.p.weight.grad.clone()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="p .*all samples"):
        kfac.step()
    assert torch.equal(plain, model.p.weight.grad)  # type: ignore[arg-type]
    assert "all samples" in kfac.coverage()["p"] and kfac.coverage()["t"] == "covered"


LENGTHS = torch.tensor([1, 2, 1, 10])
PADDED = torch.randn(4, 10, 4, generator=seeded(3)).double()
TARGETS = torch.randint(3, (4, 10), generator=seeded(4))
REAL = torch.arange(10)[None] < LENGTHS[:, None]


def packed() -> KFAC:
    """Only real tokens, one row each: what padded sequences must equal."""
    return stepped(lambda m: F.cross_entropy(m(PADDED[REAL]), TARGETS[REAL]).backward())


@pytest.mark.parametrize("time_major", [False, True])
def test_padded_sequences_equal_packed_ones(time_major: bool) -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None, loss_reduction="positions", batch_axis=int(time_major))
    x, y, mask = PADDED, TARGETS.masked_fill(~REAL, -100), REAL
    if time_major:
        x, y, mask = x.transpose(0, 1), y.t(), mask.t()
    with kfac.micro_batch(mask=mask):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    kfac.step()
    assert_same_factors(kfac, packed())


def test_two_masked_micro_batches_equal_one() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None, loss_reduction="positions")
    total = int(REAL.sum())
    for part in (slice(0, 3), slice(3, 4)):
        with kfac.micro_batch(mask=REAL[part], scale=1 / total):
            y = TARGETS[part].masked_fill(~REAL[part], -100)
            out = model(PADDED[part]).flatten(0, 1)
            (F.cross_entropy(out, y.flatten(), reduction="sum") / total).backward()
    kfac.step()
    assert_same_factors(kfac, packed())


def test_a_mean_over_tokens_equals_tokens_as_samples() -> None:
    x = torch.randn(3, 7, 4, generator=seeded(3)).double()
    y = torch.randint(3, (3, 7), generator=seeded(4))
    rows = stepped(lambda m: F.cross_entropy(m(x.flatten(0, 1)), y.flatten()).backward())
    tokens = stepped(
        lambda m: F.cross_entropy(m(x).flatten(0, 1), y.flatten()).backward(),
        loss_reduction="positions",
    )
    assert_same_factors(tokens, rows)


def test_a_sum_over_samples_equals_their_mean() -> None:
    summed = stepped(
        lambda m: F.cross_entropy(m(X), Y, reduction="sum").backward(), loss_reduction="sum"
    )
    assert_same_factors(summed, stepped())


def test_outputs_with_positions_and_no_option_warn_once_with_what_to_write() -> None:
    x = torch.randn(3, 7, 4).double()
    model = mlp()
    kfac = KFAC(model)
    with pytest.warns(UserWarning, match="loss_reduction") as said:
        for _ in range(2):
            model.zero_grad()
            model(x).square().mean().backward()
            kfac.step()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(lambda m: m(x).square().mean((1, 2)).mean().backward(), loss_reduction="mean")


def test_time_major_reduce_equals_batch_major() -> None:
    x = torch.randn(7, 3, 4, generator=seeded(3)).double()
    options: dict[str, Any] = {"weight_sharing": "reduce", "loss_reduction": "mean"}
    batch_major = stepped(
        lambda m: F.cross_entropy(m(x.transpose(0, 1)).mean(1), Y[:3]).backward(), **options
    )
    time_major = stepped(
        lambda m: F.cross_entropy(m(x).mean(0), Y[:3]).backward(), batch_axis=1, **options
    )
    assert_same_factors(time_major, batch_major)


def test_an_empty_batch_changes_nothing() -> None:
    model = mlp()
    kfac = KFAC(model)
    loss_of(model).backward()
    kfac.step()
    before = copy.deepcopy(kfac.factors())
    model.zero_grad()
    F.cross_entropy(model(X[:0]), Y[:0], reduction="sum").backward()
    kfac.step()
    for layer, factors in kfac.factors().items():
        for name, value in factors.items():
            assert torch.equal(value, before[layer][name])
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


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
    kfac = KFAC(model, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    assert "frozen" in kfac.coverage()["0"]
    model[0].requires_grad_(True)
    plain = two_steps(model, kfac, model[0])
    assert kfac.coverage()["0"] == "covered" and "0" in kfac.factors()
    assert not torch.equal(plain, model[0].weight.grad)  # type: ignore[arg-type]


def test_a_replaced_head_is_covered_from_then_on() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    model[2] = nn.Linear(6, 3).double()
    plain = two_steps(model, kfac, model[2])
    assert not torch.equal(plain, model[2].weight.grad)  # type: ignore[arg-type]


def test_a_layer_in_eval_mode_is_covered_all_the_same() -> None:
    def partly(model: nn.Module) -> None:
        model[0].eval()  # type: ignore[index]
        loss_of(model).backward()

    assert_same_factors(stepped(partly), stepped())


def test_a_bias_that_is_frozen_later_leaves_the_weight_covered() -> None:
    model = mlp()
    kfac = KFAC(model, kl_clip=None)
    loss_of(model).backward()
    kfac.step()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    plain = two_steps(model, kfac, model[0])
    assert not torch.equal(plain, model[0].weight.grad)  # type: ignore[arg-type]


def test_layer_norm_over_two_dimensions_takes_one_sample() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4))).double()
    kfac = KFAC(model)
    model(torch.randn(3, 4).double()).square().sum().backward()
    kfac.step()


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


def test_a_model_of_another_type_goes_on_with_its_factors() -> None:
    model = mlp().float()
    kfac = KFAC(model, kl_clip=None)
    loss_of(model, X.float()).backward()
    kfac.step()
    model.zero_grad()
    model.double()
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        kfac.step()
    assert kfac.factors()["0"]["A"].dtype == torch.float64


def test_a_layer_without_outputs_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the initialisation
        empty = nn.Linear(4, 0)
    with pytest.warns(UserWarning, match="no elements"):
        KFAC(nn.Sequential(empty, nn.Linear(4, 3)))
