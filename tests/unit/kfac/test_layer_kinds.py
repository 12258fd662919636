"""Every kind of layer with A ⊗ G against dense algebra: rows by autograd, one output at a time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.errors import ElasticKfacError
from support.training_loops import seeded

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
DAMPING = 0.03
N = 3

CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "1d strided, dilated": (nn.Conv1d, {"kernel_size": 2, "stride": 2, "dilation": 2}),
    "1d circular, no bias": (
        nn.Conv1d,
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "bias": False},
    ),
    "1d grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": "same"}),
    "2d grouped": (nn.Conv2d, {"kernel_size": (1, 2), "groups": 4}),
    "3d": (nn.Conv3d, {"kernel_size": 2}),
    "3d grouped, strided": (nn.Conv3d, {"kernel_size": (1, 2, 1), "groups": 2, "stride": 2}),
    "transposed 1d": (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "transposed 1d, output padding": (
        nn.ConvTranspose1d,
        {"kernel_size": 2, "stride": 3, "padding": 1, "output_padding": 2, "bias": False},
    ),
    "transposed 2d": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2}),
    "transposed 2d grouped, dilated": (
        nn.ConvTranspose2d,
        {"kernel_size": (2, 1), "groups": 2, "dilation": 2, "padding": (1, 0)},
    ),
    "transposed 3d depthwise": (nn.ConvTranspose3d, {"kernel_size": (1, 1, 2), "groups": 4}),
}


def convolution(name: str) -> tuple[Any, Tensor]:
    """A module and its input."""
    torch.manual_seed(0)
    kind, options = CONVOLUTIONS[name]
    module = kind(4, 4, **options).double()
    sides = (5, 3, 2)[: len(module.kernel_size)]  # type: ignore[arg-type]
    return module, torch.randn(N, 4, *sides, generator=seeded(1)).double()


def matrix(module: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A gradient as `[groups, out, in·k (+ 1)]`."""
    if module.transposed:  # [in, out, ...]
        inputs = module.in_channels // module.groups
        weight = weight.unflatten(0, (module.groups, inputs)).transpose(1, 2)
    rows = weight.reshape(module.groups, module.out_channels // module.groups, -1)
    if bias is None:
        return rows
    return torch.cat((rows, bias.reshape(*rows.shape[:2], 1)), -1)


def loss_of(output: Tensor) -> Tensor:
    """A mean over samples, without any symmetry between positions or channels."""
    weights = torch.linspace(0.5, 2, output[0].numel(), dtype=torch.double).view_as(output[0])
    return (weights * torch.sin(output)).square().sum() / len(output)


def dense(module: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A `[groups, a, a]`, G `[groups, g, g]` and the gradient `[groups, g, a]`, by their definitions."""
    output = module(inputs)
    (gradients,) = torch.autograd.grad(len(inputs) * loss_of(output), output, retain_graph=True)
    parameters = list(module.parameters())
    size = module.out_channels // module.groups
    patches = []
    for group in range(module.groups):
        values = output[:, group * size].reshape(-1)
        found = [torch.autograd.grad(v, parameters, retain_graph=True) for v in values]
        rows = [matrix(module, *(f if len(f) == 2 else (*f, None)))[group, 0] for f in found]
        patches.append(torch.stack(rows))
    x = torch.stack(patches)
    g = gradients.unflatten(1, (module.groups, size)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    gradient = g.mT @ x / len(inputs)
    return x.mT @ x / len(inputs), g.mT @ g / g.shape[1], gradient


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_dense_algebra(name: str) -> None:
    module, inputs = convolution(name)
    a, g, gradient = dense(module, inputs)
    kfac = KFAC(module, damping=DAMPING, kl_clip=None, loss_reduction="mean")
    loss_of(module(inputs)).backward()
    bias = None if module.bias is None else module.bias.grad
    torch.testing.assert_close(matrix(module, module.weight.grad, bias), gradient, **TOLERANCE)
    kfac.step()
    (found,) = kfac.factors().values()
    torch.testing.assert_close(found["A"].view_as(a), a, **TOLERANCE)
    torch.testing.assert_close(found["G"].view_as(g), g, **TOLERANCE)
    expected = torch.stack(
        [
            torch.linalg.solve(
                torch.kron(one_g, one_a) + DAMPING * torch.eye(d.numel(), dtype=torch.double),
                d.flatten(),
            ).view_as(d)
            for one_a, one_g, d in zip(a, g, gradient, strict=True)
        ]
    )
    bias = None if module.bias is None else module.bias.grad
    torch.testing.assert_close(matrix(module, module.weight.grad, bias), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_half_precision_uses_the_epsilon_that_torch_uses(dtype: torch.dtype) -> None:
    inputs = (0.05 * torch.randn(6, 5, 8, generator=seeded(1))).to(dtype)
    found = []
    for kind in (dtype, torch.double):
        module = nn.RMSNorm(8).to(kind)
        kfac = KFAC(module, kl_clip=None, loss_reduction="mean")
        loss_of(module(inputs.to(kind)).double()).backward()
        kfac.step()
        found.append(kfac.factors()[""]["F"].double())
    torch.testing.assert_close(*found, rtol=0.05, atol=1e-3)


class LikeRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_norm_of_the_users_own_is_named() -> None:
    with pytest.warns(UserWarning, match=r"0 \(LikeRMSNorm\)"):
        kfac = KFAC(nn.Sequential(LikeRMSNorm(4), nn.Linear(4, 2)))
    assert kfac.coverage()["0"] == "unsupported type LikeRMSNorm"


# -- weights that several modules share ----------------------------------------------------------


class Tied(nn.Module):
    """Modules of one weight, each on an input of its own."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.uses = nn.ModuleList(modules)
        for module in modules[1:]:
            module.weight = modules[0].weight
        self.double()

    def forward(self, inputs: list[Tensor]) -> Tensor:
        outputs = [
            (1 + i) * use(x) for i, (use, x) in enumerate(zip(self.uses, inputs, strict=True))
        ]
        return torch.cat([output.flatten(1) for output in outputs], 1)


TIES: dict[str, tuple[list[nn.Module], list[tuple[int, ...]]]] = {
    "no bias": ([nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)], [(N, 4), (N, 4)]),
    "own biases": ([nn.Linear(4, 3), nn.Linear(4, 3)], [(N, 4), (N, 5, 4)]),
    "one bias of three": (
        [nn.Linear(4, 3, bias=False), nn.Linear(4, 3), nn.Linear(4, 3, bias=False)],
        [(N, 4), (N, 2, 4), (N, 4)],
    ),
    "dilations": (
        [nn.Conv1d(4, 3, 2, dilation=d, padding=d) for d in (1, 2, 3)],
        [(N, 4, 5), (N, 4, 6), (N, 4, 7)],
    ),
    "groups": ([nn.Conv2d(4, 4, 1, groups=2) for _ in "ab"], [(N, 4, 2, 1), (N, 4, 1, 2)]),
    "transposed": (
        [nn.ConvTranspose1d(4, 3, 2, stride=s) for s in (1, 2)],
        [(N, 4, 3), (N, 4, 2)],
    ),
}


@pytest.mark.parametrize("name", TIES)
def test_modules_that_share_a_weight_are_one_layer(name: str) -> None:
    torch.manual_seed(0)
    modules, shapes = TIES[name]
    model = Tied(*modules)
    inputs = [torch.randn(shape, generator=seeded(i)).double() for i, shape in enumerate(shapes)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac = KFAC(model, damping=DAMPING, kl_clip=None, loss_reduction="mean")
    assert [layer.name for layer in kfac.layers] == ["uses.0"]
    biases = [use.bias for use in model.uses if use.bias is not None]
    # Every output row by itself: its derivative is a row of inputs, among which one of the biases.
    first: Any = model.uses[0]
    groups = getattr(first, "groups", 1)

    def rows_of(weight: Tensor, columns: list[Tensor | None]) -> Tensor:
        if getattr(first, "transposed", False):
            weight = weight.transpose(0, 1)
        rows = weight.reshape(groups, weight.shape[0] // groups, -1)
        zeros = [
            torch.zeros_like(b) if c is None else c for b, c in zip(biases, columns, strict=True)
        ]
        return torch.cat((rows, *(z.view(*rows.shape[:2], 1) for z in zeros)), -1)

    outputs = [use(x) for use, x in zip(model.uses, inputs, strict=True)]
    scaled = [(1 + i) * output.flatten(1) for i, output in enumerate(outputs)]
    gradients = torch.autograd.grad(N * loss_of(torch.cat(scaled, 1)), outputs, retain_graph=True)
    a: Any = 0
    g: Any = 0
    count = 0
    for output, gradient in zip(outputs, gradients, strict=True):
        if isinstance(first, nn.Linear):
            output, gradient = (v.reshape(-1, v.shape[-1]) for v in (output, gradient))
        else:
            output, gradient = (
                v.flatten(2).transpose(1, 2).flatten(0, 1) for v in (output, gradient)
            )
        size = output.shape[1] // groups
        for value, one in zip(output, gradient, strict=True):
            x = []
            for group in range(groups):
                weight, *columns = torch.autograd.grad(
                    value[group * size],
                    [first.weight, *biases],
                    retain_graph=True,
                    allow_unused=True,
                )
                x.append(rows_of(weight, columns)[group, 0])
            patch, parts = torch.stack(x), one.view(groups, size)
            a = a + patch[:, :, None] * patch[:, None]
            g = g + parts[:, :, None] * parts[:, None]
            count += 1
    a, g = a / N, g / count
    loss_of(model(inputs)).backward()
    gradient = rows_of(first.weight.grad, [b.grad for b in biases])
    kfac.step()
    (found,) = kfac.factors().values()
    torch.testing.assert_close(found["A"].view_as(a), a, **TOLERANCE)
    torch.testing.assert_close(found["G"].view_as(g), g, **TOLERANCE)
    result = rows_of(first.weight.grad, [b.grad for b in biases])
    for one_a, one_g, before, after in zip(a, g, gradient, result, strict=True):
        curvature = torch.kron(one_g, one_a) + DAMPING * torch.eye(before.numel()).double()
        torch.testing.assert_close(curvature @ after.flatten(), before.flatten(), **TOLERANCE)
    assert {kfac.coverage()[f"uses.{i}"] for i in range(len(modules))} == {"covered"}


def test_embeddings_that_share_a_table_count_the_tokens_of_both() -> None:
    tokens = [torch.tensor([[1, 2], [3, 1]]), torch.tensor([[0, 0, 2], [1, 2, 2]])]
    model = Tied(nn.Embedding(5, 3), nn.Embedding(5, 3, padding_idx=0))
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    loss_of(model(tokens)).backward()  # type: ignore[arg-type]
    kfac.step()
    counts = torch.tensor([0, 3, 4, 1, 0]).double()
    torch.testing.assert_close(kfac.factors()["uses.0"]["A"], counts / 2)


def test_a_use_that_a_pass_leaves_out_leaves_the_others_covered() -> None:
    torch.manual_seed(0)
    model = Tied(nn.Linear(4, 3), nn.Linear(4, 3))
    kfac = KFAC(model, damping=DAMPING, kl_clip=None)
    alone = KFAC(nn.Linear(4, 3).double(), damping=DAMPING, kl_clip=None)
    alone.layers[0].module.load_state_dict(model.uses[0].state_dict())
    x = torch.randn(N, 4, generator=seeded(3)).double()
    for use, one in ((model.uses[0], kfac), (alone.layers[0].module, alone)):
        loss_of(use(x)).backward()
        one.step()
        assert one.coverage() == dict.fromkeys(one.coverage(), "covered")
    assert model.uses[1].bias.grad is None
    for name in ("weight", "bias"):
        ours, theirs = (getattr(m, name).grad for m in (model.uses[0], alone.layers[0].module))
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("third", ["embedding", "attention", "norm", "bias"])
def test_a_weight_that_modules_of_different_kinds_share_is_left_out_of_all(third: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "free": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    if third == "embedding":
        model["c"] = nn.Embedding(4, 4)
        model["c"].weight = model["a"].weight
    elif third == "attention":
        model["c"] = nn.MultiheadAttention(4, 1)
        model["c"].out_proj.weight = model["a"].weight
    elif third == "norm":
        model["c"] = nn.LayerNorm(4)
        model["c"].bias = model["b"].bias
    else:  # the weight of one layer, the bias of another
        model["c"] = nn.Linear(4, 4)
        model["c"].weight, model["c"].bias = model["a"].weight, model["free"].bias
    with pytest.warns(UserWarning, match=r"c \(shares a weight with a\)"):
        if third == "bias":
            with pytest.raises(ElasticKfacError, match="no layer"):
                KFAC(model)
            return
        kfac = KFAC(model)
    assert [layer.name for layer in kfac.layers] == ["free"]
    assert {"a": kfac.coverage()["a"], "b": kfac.coverage()["b"]} == dict.fromkeys(
        "ab", "shares a weight with c"
    )


def test_a_shared_weight_that_is_used_elsewhere_too_is_left_out_for_all_modules() -> None:
    torch.manual_seed(0)
    model = Tied(nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False))
    kfac = KFAC(model, kl_clip=None)
    x = torch.randn(N, 4, generator=seeded(3)).double()
    loss = loss_of(model([x, 2 * x])) + loss_of(x @ model.uses[0].weight.t())  # type: ignore[operator]
    loss.backward()
    with pytest.warns(UserWarning, match="uses.0"):
        kfac.step()
    assert all("W x" in kfac.coverage()[f"uses.{i}"] for i in range(2))
