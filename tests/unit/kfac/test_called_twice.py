"""Modules that are called several times in one pass: every kind against rows or samples by autograd."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.layer_kinds import (
    DAMPING,
    TOLERANCE,
    N,
    as_matrix,
    assert_rows,
    kronecker_rows,
    loss_of,
)
from support.training_loops import seeded
from unit.kfac.test_adapters import LoraLinear


class Twice(nn.Module):
    """One module on several inputs; what it makes of them meets in one output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.double()

    def call(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *others = (self.call(x).flatten(1) for x in inputs)
        mixed = first.sum(1, keepdim=True)
        return torch.cat((first, *(3 * y * torch.cos(mixed) for y in others)), 1)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=seeded(i)).double() for i, shape in enumerate(shapes)]


KRONECKER: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "linear": (nn.Linear(4, 3), [(N, 4), (N, 5, 4)]),
    "linear, three calls": (nn.Linear(4, 3, bias=False), [(N, 4), (N, 4), (N, 2, 4)]),
    "conv1d": (nn.Conv1d(4, 3, 2, padding=1), [(N, 4, 5), (N, 4, 3)]),
    "conv2d, groups": (nn.Conv2d(4, 4, 2, groups=2), [(N, 4, 3, 2), (N, 4, 2, 3)]),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 1), bias=False), [(N, 2, 1, 3, 1), (N, 2, 2, 2, 1)]),
    "transposed 1d": (nn.ConvTranspose1d(4, 3, 3, stride=2), [(N, 4, 3), (N, 4, 2)]),
    "transposed 2d": (nn.ConvTranspose2d(2, 3, 2), [(N, 2, 2, 1), (N, 2, 1, 2)]),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, (1, 1, 2)), [(N, 2, 1, 1, 2), (N, 2, 1, 2, 1)]),
}


@pytest.mark.parametrize("name", KRONECKER)
def test_calls_of_a_kronecker_layer_are_further_rows(name: str) -> None:
    torch.manual_seed(0)
    layer, shapes = KRONECKER[name]
    model, inputs = Twice(copy.deepcopy(layer)), drawn(*shapes)
    _assert_rows(model, inputs)


def test_calls_of_an_embedding_count_their_tokens() -> None:
    model = Twice(nn.Embedding(5, 3, padding_idx=0))
    _assert_rows(model, [torch.tensor([[1, 2], [3, 1], [4, 4]]), torch.tensor([[2], [4], [1]])])


def _assert_rows(model: Twice, inputs: list[Tensor]) -> None:
    """A is the sum over the rows of all calls per sample, G their mean, and the step is that of both."""
    module: Any = model.layer
    biases = [b for b in (getattr(module, "bias", None),) if b is not None]
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: outputs.append(output))
    loss = N * loss_of(model(*inputs))
    handle.remove()
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
    a, g, count = kronecker_rows(module, outputs, gradients, biases)
    a, g = a / N, g / count
    kfac = KFAC(model, damping=DAMPING, kl_clip=None, loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model(*inputs)).backward()
        before = as_matrix(module, module.weight.grad, [b.grad for b in biases], biases)
        before = before.clone()
        kfac.step()
    (found,) = kfac.factors().values()
    kept = a[0].diagonal() if found["A"].dim() == 1 else a.view(found["A"].shape)
    torch.testing.assert_close(found["A"], kept, **TOLERANCE)
    torch.testing.assert_close(found["G"].view_as(g), g, **TOLERANCE)
    after = as_matrix(module, module.weight.grad, [b.grad for b in biases], biases)
    for one_a, one_g, d, p in zip(a, g, before, after, strict=True):
        curvature = torch.kron(one_g, one_a) + DAMPING * torch.eye(d.numel()).double()
        torch.testing.assert_close(curvature @ p.flatten(), d.flatten(), **TOLERANCE)


def test_calls_of_adapters_are_further_rows() -> None:
    torch.manual_seed(0)
    lora = LoraLinear(nn.Linear(4, 3), 2, 8)
    nn.init.normal_(lora.lora_B["default"].weight)  # type: ignore[arg-type]
    names = [f"layer.lora_{letter}.default" for letter in "AB"]
    assert_rows(Twice(lora), tuple(drawn((N, 4), (N, 5, 4))), dict.fromkeys(names, 6))


class Attention(nn.Module):
    """What nn.MultiheadAttention computes, with Linear layers."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        weights = (*packed.in_proj_weight.chunk(3), packed.out_proj.weight)
        biases = (*packed.in_proj_bias.chunk(3), packed.out_proj.bias)
        for part, weight, bias in zip(self.parts, weights, biases, strict=True):
            part.weight, part.bias = (nn.Parameter(v.detach().clone()) for v in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.parts[:3])
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        out: Tensor = self.parts[3]((weights @ v).transpose(1, 2).flatten(2))
        return out


class SelfAttention(Twice):
    def call(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return out


def test_calls_of_an_attention_are_further_rows_of_its_projections() -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(4, 2, batch_first=True)
    inputs = drawn((N, 3, 4), (N, 2, 4))
    apart = Twice(Attention(packed))
    right = assert_rows(apart, tuple(inputs), {f"layer.parts.{i}": 5 for i in range(4)})
    model = SelfAttention(packed)
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    loss_of(model(*inputs)).backward()
    kfac.step()
    pairs = zip(kfac.factors().items(), right.factors().values(), strict=True)
    for (name, ours), theirs in pairs:
        for factor, value in theirs.items():
            torch.testing.assert_close(ours[factor], value, **TOLERANCE, msg=f"{name} {factor}")


NORMS: dict[str, tuple[nn.Module, list[tuple[int, ...]]]] = {
    "layer": (nn.LayerNorm(4), [(N, 4), (N, 5, 4)]),
    "layer2d, three calls": (
        nn.LayerNorm((2, 2), bias=False),
        [(N, 2, 2), (N, 3, 2, 2), (N, 2, 2)],
    ),
    "rms": (nn.RMSNorm(4), [(N, 2, 4), (N, 4)]),
    "batch1d": (nn.BatchNorm1d(4), [(N, 4), (N, 4, 2)]),
    "batch2d": (nn.BatchNorm2d(4), [(N, 4, 2, 1), (N, 4, 1, 3)]),
    "batch3d": (nn.BatchNorm3d(4), [(N, 4, 2, 1, 1), (N, 4, 1, 1, 3)]),
    "group": (nn.GroupNorm(2, 4), [(N, 4, 3), (N, 4, 1, 2)]),
}


def of_samples(module: nn.Module, values: list[Tensor]) -> Tensor:
    """Gradients of each value, `[values, p, features]`, by autograd."""
    parameters = list(module.parameters())
    return torch.stack(
        [
            torch.stack(
                [g.flatten() for g in torch.autograd.grad(v, parameters, retain_graph=True)]
            )
            for v in values
        ]
    )


def moments(rows: Tensor, mode: str) -> Tensor:
    if mode == "unit":
        return torch.einsum("npf,nqf->fpq", rows, rows)
    flat = rows.flatten(1)
    return flat.t() @ flat if mode == "full" else flat.square().sum(0)


def norm_of(name: str) -> tuple[Twice, list[Tensor]]:
    torch.manual_seed(0)
    module, shapes = copy.deepcopy(NORMS[name])
    for p in module.parameters():
        nn.init.normal_(p)
    return Twice(module), drawn(*shapes)


@pytest.mark.parametrize("mode", ["unit", "full", "diag"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_squares_the_sum_of_a_samples_gradients_over_its_calls(name: str, mode: str) -> None:
    model, inputs = norm_of(name)
    output = model(*inputs)
    samples = [N * loss_of(output * (torch.arange(N) == i)[:, None]) for i in range(N)]
    expected = moments(of_samples(model.layer, samples), mode) / N
    kfac = KFAC(model, kl_clip=None, bn_fisher=mode)
    loss_of(model(*inputs)).backward()
    kfac.step()
    torch.testing.assert_close(kfac.factors()["layer"]["F"], expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["layer", "batch2d"])
def test_a_norm_does_so_with_sampled_labels(name: str) -> None:
    model, inputs = norm_of(name)
    output = model(*inputs)
    expected = sum(
        moments(of_samples(model.layer, list(column)), "full") for column in output.unbind(1)
    )
    kfac = KFAC(model, kl_clip=None, bn_fisher="full", fisher="exact")
    output = model(*inputs)
    kfac.sample_fisher(output, likelihood="gaussian")
    loss_of(output).backward()
    kfac.step()
    torch.testing.assert_close(kfac.factors()["layer"]["F"], expected / N, **TOLERANCE)


def _backward_of_parts(model: Twice, inputs: list[Tensor], how: str) -> None:
    """Two losses of one call of the model, propagated together or one after the other."""
    parts = model(*inputs).split([4, 20], 1)
    losses = [loss_of(part) for part in parts]
    if how == "together":
        sum(losses).backward()  # type: ignore[union-attr]
        return
    for loss in losses:
        loss.backward(retain_graph=loss is losses[0])


@pytest.mark.parametrize("mode", ["unit", "full"])
def test_a_norm_adds_up_the_passes_over_one_call_of_the_model(mode: str) -> None:
    found = []
    for how in ("together", "apart"):
        model, inputs = norm_of("layer")
        kfac = KFAC(model, kl_clip=None, bn_fisher=mode, loss_scale_per_sample=1 / N)
        _backward_of_parts(model, inputs, how)
        kfac.step()
        found.append(kfac.factors()["layer"]["F"])
    torch.testing.assert_close(*found, **TOLERANCE)


def test_calls_with_backward_passes_of_their_own_are_about_the_same_samples() -> None:
    """Both branches of one call of the model, whose graphs have nothing in common."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4).double()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x), self.norm(y)

    found = []
    for together in (True, False):
        model = Branches()
        kfac = KFAC(model, kl_clip=None, bn_fisher="full", loss_scale_per_sample=1 / N)
        losses = [loss_of(part) for part in model(*drawn((N, 4), (N, 4)))]
        for loss in [sum(losses)] if together else losses:
            loss.backward()  # type: ignore[union-attr]
        kfac.step()
        found.append(kfac.factors()["norm"]["F"])
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("n", [N, 2 * N])
def test_the_size_of_a_batch_says_whether_calls_of_the_model_share_its_samples(n: int) -> None:
    torch.manual_seed(0)
    x, y = drawn((N, 4), (N, 4))
    model = nn.Sequential(nn.LayerNorm(4)).double()
    values = [
        N * loss_of(model(v) * (torch.arange(N) == i)[:, None]) for v in (x, y) for i in range(N)
    ]
    rows = of_samples(model, values)
    rows = rows[:N] + rows[N:] if n == N else rows
    kfac = KFAC(model, kl_clip=None, bn_fisher="full")
    with kfac.micro_batch(n, scale=1 / N):
        (loss_of(model(x)) + loss_of(model(y))).backward()
    kfac.step()
    torch.testing.assert_close(kfac.factors()["0"]["F"], moments(rows, "full") / n, **TOLERANCE)


def test_a_norm_whose_calls_see_other_rows_of_the_samples_is_left_out_by_name() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            regions = self.norm(x.flatten(0, 1)).view(x.shape)
            out: Tensor = self.head(self.norm(x.mean(1)) + regions.sum(1))
            return out

    model = Regions()
    kfac = KFAC(model, kl_clip=None)
    loss_of(model(*drawn((N, 5, 4)))).backward()
    plain = model.norm.weight.grad.clone()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"norm \(its calls see 3 and 15 rows of the same samples"):
        kfac.step()
    assert torch.equal(model.norm.weight.grad, plain)  # type: ignore[arg-type]
    assert kfac.coverage()["head"] == "covered" and set(kfac.factors()) == {"head"}


def test_calls_under_reduce_are_further_rows_and_named_once() -> None:
    torch.manual_seed(0)
    model, inputs = Twice(nn.Linear(4, 3, bias=False)), drawn((N, 4), (N, 5, 4))
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean", weight_sharing="reduce")
    loss_of(model(*inputs)).backward()
    with pytest.warns(
        UserWarning, match="the calls of layer for the same samples count as further"
    ):
        kfac.step()
    rows = torch.cat((inputs[0], inputs[1].mean(1)))
    torch.testing.assert_close(kfac.factors()["layer"]["A"], rows.t() @ rows / N, **TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad()
        loss_of(model(*inputs)).backward()
        kfac.step()
        once = KFAC(model, kl_clip=None, loss_scale_per_sample=1 / N, weight_sharing="reduce")
        model.zero_grad()
        for part in inputs:  # a call of the model each: other samples
            loss_of(model(part)).backward()
        once.step()
