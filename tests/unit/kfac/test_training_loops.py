"""People's own training loops: KFAC's factors are those of the loss whose gradient is in `.grad`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from elastic_kfac import KFAC
from support.training_loops import X, Y, assert_same_factors, loss_of, mlp, seeded, stepped

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


def compiled_teachers(model: nn.Module) -> None:
    """Modules of TorchScript, which are no ordinary modules, are called while KFAC's hooks are alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        teachers = torch.jit.script(mlp()), torch.jit.trace(mlp(), X)
    for teacher in teachers:
        teacher(X).sum().backward()


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
    compiled_teachers,
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


@pytest.mark.parametrize("width", [10, 8], ids=["as-wide-as-long", "narrower"])
def test_layer_after_pooling_is_not_masked_whatever_its_width(width: int) -> None:
    """Its input [n, width] has the shape of the mask where there are as many positions."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.head = nn.Linear(4, width), nn.Linear(width, 3)

        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            found = self.tokens(x).tanh() * real.unsqueeze(2)
            out: Tensor = self.head(found.sum(1) / real.sum(1, keepdim=True))
            return out

    model = Pooled().double()
    kfac = KFAC(model, kl_clip=None, factor_decay=0.0)
    seen: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    with kfac.micro_batch(mask=REAL):
        F.cross_entropy(model(PADDED, REAL), TARGETS[:, 0]).backward()
    handle.remove()
    kfac.step()
    assert set(kfac.coverage().values()) == {"covered"}
    inputs = torch.cat([seen[0].detach(), torch.ones(4, 1).double()], dim=1)
    torch.testing.assert_close(
        kfac.factors()["head"]["A"], inputs.T @ inputs / 4, rtol=0, atol=1e-12
    )


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


class Pooled(nn.Module):
    """Tokens `[positions, n]` or `[n, positions]` and one category per sample, to one output each."""

    def __init__(self, time_major: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_major = time_major
        self.tokens, self.category = nn.Embedding(10, 4), nn.Embedding(5, 4)
        self.conv, self.images = nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.norm, self.flat = nn.RMSNorm(4), nn.Linear(4, 4)
        self.batch, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.double()

    def forward(self, tokens: Tensor, category: Tensor) -> Tensor:
        x = self.tokens(tokens)
        lengths = x.shape[:2]
        lines = x.permute(1, 2, 0) if self.time_major else x.transpose(1, 2)  # [n, 4, positions]
        lines = self.images(torch.tanh(self.conv(lines)))
        x = self.norm(lines.permute(2, 0, 1) if self.time_major else lines.transpose(1, 2))
        x = torch.tanh(self.flat(x.flatten(0, 1))).unflatten(0, lengths)
        x = self.batch(x.mean(0 if self.time_major else 1) + self.category(category))
        out: Tensor = self.head(x)
        return out


def test_time_major_models_with_images_and_pooling_equal_batch_major() -> None:
    tokens = torch.randint(10, (8, 5), generator=seeded(3))
    category = torch.randint(5, (8,), generator=seeded(4))
    found = [
        stepped(
            lambda m, x=x: F.cross_entropy(m(x, category), Y).backward(),
            lambda axis=axis: Pooled(axis == 1),
            batch_axis=axis,
        )
        for axis, x in enumerate((tokens, tokens.t()))
    ]
    assert set(found[1].coverage().values()) == {"covered"}
    assert_same_factors(found[1], found[0])


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


# -- models that are called with keywords, or with what is no tensor ------------------------------


class Tagger(nn.Module):
    """A language model as libraries write them: keywords in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(10, 4), nn.Embedding(7, 4)
        self.head = nn.Linear(4, 10)
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        places = self.places(torch.arange(tokens.shape[1])[None])
        logits = self.head(torch.tanh(self.tokens(tokens) + places))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


TOKENS = torch.randint(10, (4, 7), generator=seeded(1))


def by_keywords(model: nn.Module) -> Tensor:
    loss: Tensor = model(tokens=TOKENS, labels=TOKENS)["loss"]
    return loss


def by_position(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS)["logits"].flatten(0, 1), TOKENS.flatten())


def by_dictionary(model: nn.Module) -> Tensor:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: dict[str, Tensor]) -> Any:
            return self.model(**batch)

    loss: Tensor = Wrapped()({"tokens": TOKENS, "labels": TOKENS})["loss"]
    return loss


@pytest.mark.parametrize("reduction", ["positions", "mean"])
@pytest.mark.parametrize("call", [by_keywords, by_dictionary])
def test_samples_are_counted_in_keywords_and_dictionaries(
    call: Callable[[nn.Module], Tensor], reduction: str
) -> None:
    kfacs = []
    for loss in (call, by_position):
        with pytest.warns(UserWarning, match="places .its input of 1 rows is shared"):
            kfacs.append(
                stepped(lambda m, loss=loss: loss(m).backward(), Tagger, loss_reduction=reduction)
            )
    assert_same_factors(*kfacs)
    factors = kfacs[0].factors()
    assert factors.keys() == {"tokens", "head"}
    samples = 28 if reduction == "positions" else 4
    torch.testing.assert_close(factors["tokens"]["A"].sum(), torch.tensor(28 / samples).double())


def test_positions_in_a_dictionary_of_results_are_seen() -> None:
    model = Tagger()
    kfac = KFAC(model, kl_clip=None)
    by_keywords(model).backward()
    with pytest.warns(UserWarning, match="places"), pytest.warns(match="loss_reduction"):
        kfac.step()


def test_a_list_of_images_is_counted_at_the_first_layer() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, rows: list[Tensor]) -> Tensor:
            out: Tensor = self.net(torch.stack(rows))
            return out

    listed = stepped(lambda m: F.cross_entropy(m(list(X)), Y).backward(), Stacked)
    right = stepped().factors()
    for name, factors in right.items():
        for factor, value in factors.items():
            torch.testing.assert_close(listed.factors()[f"net.{name}"][factor], value)


def test_a_layer_that_stays_left_out_is_named_once() -> None:
    model = Tagger()
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    with pytest.warns(UserWarning, match="places") as said:
        for _ in range(3):
            model.zero_grad()
            by_keywords(model).backward()
            kfac.step()
    assert len(said) == 1
