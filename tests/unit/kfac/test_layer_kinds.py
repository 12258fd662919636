"""Every kind of layer with A ⊗ G against dense algebra: rows by autograd, one output at a time."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.errors import ElasticKfacError
from support.training_loops import assert_same_factors, seeded, stepped

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


@pytest.mark.parametrize("bias", [False, True])
def test_a_use_that_a_pass_leaves_out_leaves_the_others_covered(bias: bool) -> None:
    torch.manual_seed(0)
    model = Tied(nn.Linear(4, 3, bias=bias), nn.Linear(4, 3))
    alone = nn.Linear(4, 3, bias=bias).double()
    alone.load_state_dict(model.uses[0].state_dict())
    x = torch.randn(N, 4, generator=seeded(3)).double()
    for owner, use in ((model, model.uses[0]), (alone, alone)):
        kfac = KFAC(owner, damping=DAMPING, kl_clip=None)
        loss_of(use(x)).backward()
        kfac.step()
        assert set(kfac.coverage().values()) == {"covered"}
    assert model.uses[1].bias.grad is None
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(
            model.uses[0].get_parameter(name).grad, parameter.grad, **TOLERANCE
        )


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


@pytest.mark.parametrize(("skipped", "other"), ["ab", "ba"])
def test_a_weight_that_a_skipped_module_has_too_is_left_out(skipped: str, other: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model["b"].weight = model["a"].weight
    with pytest.warns(UserWarning, match=rf"{other} .shares a weight with {skipped}"):
        kfac = KFAC(model, skip_layers=(f"^{skipped}$",))
    assert [layer.name for layer in kfac.layers] == ["c"]
    assert kfac.coverage()[skipped].startswith("skip_layers")


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


# -- adapters, attention, recurrence -------------------------------------------------------------


def rows_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of the trainable Linear and Conv1d of width 1, as rows by name."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                output.retain_grad()
                seen.setdefault(name, []).append((args[0].detach(), output))

            handles.append(module.register_forward_hook(keep))
    (N * loss_of(model(*inputs))).backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    result = {}
    for name, calls in seen.items():
        x = torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in calls])
        g = torch.cat([out.grad.reshape(-1, out.shape[-1]) for _, out in calls])  # type: ignore[union-attr]
        module: Any = model.get_submodule(name)
        bias = [] if module.bias is None else [torch.ones(len(x), 1).double()]
        result[name] = torch.cat((x, *bias), 1), g
    return result


def assert_rows(model: nn.Module, inputs: tuple[Tensor, ...], positions: dict[str, int]) -> KFAC:
    """K-FAC of the Linears named by `positions` (per sample) equals their rows; returns it."""
    rows = rows_of(model, inputs)
    assert {name: len(x) / N for name, (x, _) in rows.items()} == positions
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    loss_of(model(*inputs)).backward()
    plain = {name: model.get_submodule(name).weight.grad.clone() for name in rows}  # type: ignore[union-attr, operator]
    kfac.step()
    factors = kfac.factors()
    assert factors.keys() >= rows.keys()
    for name, (x, g) in rows.items():
        torch.testing.assert_close(factors[name]["A"], x.t() @ x / N, **TOLERANCE)
        torch.testing.assert_close(factors[name]["G"], g.t() @ g / len(g), **TOLERANCE)
        width = plain[name].shape[1]
        torch.testing.assert_close((g.t() @ x)[:, :width] / N, plain[name], **TOLERANCE)
    return kfac


class LoraLinear(nn.Module):
    """What PEFT puts in the place of a Linear: a frozen base, and two small ones in dictionaries."""

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, base_layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]
        self.scaling = {"default": alpha / r}
        self.active_adapters = ["default"]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        for name in self.active_adapters:
            small = self.lora_A[name](self.lora_dropout[name](x))
            result = result + self.lora_B[name](small) * self.scaling[name]
        return result


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return nn.Sequential(
        *(LoraLinear(x, 2, 8) if isinstance(x, nn.Linear) else x for x in model)
    ).double()


def test_adapters_beside_a_frozen_base_equal_their_rows() -> None:
    model = adapted()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[index, union-attr]
    x = torch.randn(N, 5, 4, generator=seeded(3)).double()
    names = [f"{i}.lora_{letter}.default" for i in (0, 2) for letter in "AB"]
    kfac = assert_rows(model, (x,), dict.fromkeys(names, 5))
    assert kfac.coverage() == dict.fromkeys(names, "covered") | {
        f"{i}.base_layer": "frozen" for i in (0, 2)
    }


def test_adapters_that_start_at_zero_train() -> None:
    """The gradient of A is zero in the first step, that of B is not."""
    model = adapted()
    x = torch.randn(32, 4, generator=seeded(3)).double()
    targets = model(x).detach() + x @ torch.randn(4, 3, generator=seeded(4)).double()
    kfac = KFAC(model, lr=0.1)
    losses = []
    for _ in range(60):
        model.zero_grad()
        loss = F.mse_loss(model(x), targets)
        loss.backward()
        losses.append(loss.item())
        kfac.step()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(f["G"].trace()) > 0 for f in kfac.factors().values())


def test_adapters_of_peft_equal_their_rows() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    assert type(base[0]).__module__.startswith("peft")
    x = torch.randn(N, 5, 4, generator=seeded(3)).double()
    names = [f"base_model.model.{i}.lora_{letter}.default" for i in (0, 2) for letter in "AB"]
    kfac = assert_rows(model, (x,), dict.fromkeys(names, 5))
    assert [name for name, state in kfac.coverage().items() if state == "covered"] == names


class Attention(nn.Module):
    """Separate projections under `scaled_dot_product_attention`, with fewer heads of keys and values."""

    def __init__(self, heads: int = 4, shared_heads: int = 2, size: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        width = heads * size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(6, shared_heads * size)
        self.v_proj = nn.Linear(6, shared_heads * size, bias=False)
        self.out_proj = nn.Linear(width, width)
        self.double()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(-2, -3)
            for part in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.out_proj(mixed.transpose(-2, -3).flatten(-2))
        return out


POSITIONS = {"q_proj": 5, "k_proj": 7, "v_proj": 7, "out_proj": 5}


def test_separate_projections_equal_their_rows() -> None:
    x = torch.randn(N, 5, 8, generator=seeded(3)).double()
    memory = torch.randn(N, 7, 6, generator=seeded(4)).double()
    kfac = assert_rows(Attention(), (x, memory), POSITIONS)
    assert kfac.captured_samples() == 0
    assert {name: f["G"].shape[0] for name, f in kfac.factors().items()} == {
        "q_proj": 8,
        "k_proj": 4,
        "v_proj": 4,
        "out_proj": 8,
    }


class Flattened(Attention):
    """Projects rows `[n·T, d]`, as code with packed positions does."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        n = len(x)
        q = self.q_proj(x.flatten(0, 1)).unflatten(0, (n, -1))
        k, v = (p(memory.flatten(0, 1)).unflatten(0, (n, -1)) for p in (self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(n * x.shape[1], -1))
        return out.unflatten(0, (n, -1))


def test_projections_of_flattened_rows_equal_those_of_batches() -> None:
    x = torch.randn(N, 5, 8, generator=seeded(3)).double()
    memory = torch.randn(N, 7, 6, generator=seeded(4)).double()
    kfacs = [assert_rows(model, (x, memory), POSITIONS) for model in (Attention(), Flattened())]
    assert_same_factors(*kfacs)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_modules_are_named_and_keep_their_gradient(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"memory": kind(4, 3), "head": nn.Linear(3, 2)}).double()
    with pytest.warns(UserWarning, match=rf"memory \({kind.__name__}\)"):
        kfac = KFAC(model, kl_clip=None)
    assert kind.__name__ in kfac.coverage()["memory"]
    out = model["memory"](torch.randn(N, 4, generator=seeded(1)).double())
    while isinstance(out, tuple):
        out = out[0]
    loss_of(model["head"](out)).backward()
    plain = [p.grad.clone() for p in model["memory"].parameters()]  # type: ignore[union-attr]
    before = model["head"].weight.grad.clone()  # type: ignore[union-attr, operator]
    kfac.step()
    assert all(map(torch.equal, plain, [p.grad for p in model["memory"].parameters()]))  # type: ignore[arg-type]
    assert not torch.equal(before, model["head"].weight.grad)  # type: ignore[arg-type]


# -- training loops ------------------------------------------------------------------------------


class Net(nn.Module):
    """The kinds in one model, on `[n, 2, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 3, 3, stride=2, groups=1)
        self.volume = nn.Conv3d(3, 4, (1, 1, 3))
        self.norm = nn.RMSNorm(4)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.conv(x))))
        x = self.volume(x[:, :, None, None]).flatten(2).mT
        out: Tensor = self.decoder(torch.tanh(self.encoder(self.norm(x)))).mean(1)
        return out


IMAGES = torch.randn(8, 2, 4, generator=seeded(7)).double()
LABELS = torch.randint(4, (8,), generator=seeded(8))


def entropy(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(IMAGES[rows]), LABELS[rows])


def accumulated(model: nn.Module) -> None:
    for rows in (slice(0, 4), slice(4, 8)):
        (entropy(model, rows) / 2).backward()


def several_passes(model: nn.Module) -> None:
    loss = entropy(model)
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()


def after_a_dropped_batch(model: nn.Module) -> None:
    (100 * entropy(model, slice(0, 3))).backward()
    model.zero_grad()
    torch.autograd.grad(entropy(model, slice(2, 5)), list(model.parameters()))
    entropy(model).backward()


def checkpointed(model: nn.Module) -> None:
    out = torch.utils.checkpoint.checkpoint(model, IMAGES, use_reentrant=False)
    F.cross_entropy(out, LABELS).backward()


LOOPS: list[tuple[Callable[[nn.Module], None], dict[str, Any]]] = [
    (accumulated, {"accumulation_steps": 2}),
    (several_passes, {}),
    (after_a_dropped_batch, {}),
    (checkpointed, {}),
]


@pytest.mark.parametrize(("loop", "options"), LOOPS)
def test_kinds_in_training_loops_equal_one_pass(
    loop: Callable[[nn.Module], None], options: dict[str, Any]
) -> None:
    right = stepped(lambda model: entropy(model).backward(), Net)
    found = stepped(loop, Net, **options)
    assert set(found.coverage().values()) == {"covered"}
    assert_same_factors(found, right)


def test_an_empty_batch_leaves_every_kind_as_it_was() -> None:
    model = Net()
    kfac = KFAC(model, kl_clip=None)
    entropy(model).backward()
    kfac.step()
    before = copy.deepcopy(kfac.factors())
    model.zero_grad()
    F.cross_entropy(model(IMAGES[:0]), LABELS[:0], reduction="sum").backward()
    kfac.step()
    for name, factors in kfac.factors().items():
        for factor, value in factors.items():
            assert torch.equal(value, before[name][factor])
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm under autocast, torch's own
def test_kinds_in_half_precision_and_autocast_stay_near_float64() -> None:
    right = stepped(lambda m: F.cross_entropy(m(IMAGES), LABELS).backward(), Net).factors()

    def half(model: nn.Module) -> None:
        F.cross_entropy(model(IMAGES.bfloat16()).float(), LABELS).backward()

    def cast(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(IMAGES.float())
        F.cross_entropy(out.float(), LABELS).backward()

    for found in (stepped(half, lambda: Net().bfloat16()), stepped(cast, lambda: Net().float())):
        assert set(found.coverage().values()) == {"covered"}
        for name, factors in right.items():
            for factor, value in factors.items():
                error = (found.factors()[name][factor] - value).norm() / value.norm()
                assert float(error) < 0.1, (name, factor)


@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of is not ours
def test_compiled_kinds_equal_eager_without_a_graph_break() -> None:
    gc.collect()  # what other tests still record with would be seen by the compiler
    eager, compiled = Net(), Net()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    runs = []
    for model, called in (
        (eager, eager),
        (compiled, torch.compile(compiled, backend=backend, fullgraph=True)),
    ):
        kfac = KFAC(called, kl_clip=None, factor_update_steps=2)
        for _ in range(4):
            model.zero_grad()
            F.cross_entropy(called(IMAGES), LABELS).backward()
            kfac.step()
        kfac.close()
        runs.append(kfac)
    assert_same_factors(*runs)
    assert len(graphs) == 2  # with statistics and without


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)
        self.head = nn.Conv2d(2, 2, 1)
        self.size: list[int] | None = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.up(x, output_size=self.size)))
        return out


@pytest.mark.parametrize("first", [[5, 5], [6, 5]])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_call_with_another_output_size_leaves_the_layer_out_by_name(
    first: list[int], checkpoint: bool
) -> None:
    """At its first statistics or later, whatever was kept of its input."""
    model = Upsampled()
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    x = torch.randn(N, 2, 3, 3, generator=seeded(1)).double()
    with pytest.warns(UserWarning, match=r"up \((its output has|its gradient)") as said:
        for size in (first, [6, 6]):
            model.zero_grad()
            model.size = size
            out = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
                if checkpoint
                else model(x)
            )
            loss_of(out).backward()
            plain = model.up.weight.grad.clone()  # type: ignore[union-attr]
            kfac.step()
            assert torch.equal(plain, model.up.weight.grad) == (size != [5, 5])  # type: ignore[arg-type]
    assert len(said) == 1 and kfac.coverage()["head"] == "covered"


class Queries(nn.Module):
    """Parameters `[k, 4]` that every sample is compared with."""

    def __init__(self, k: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(k, 4))
        self.project, self.embed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.embed(x)) @ self.project(self.queries).t()
        return out


@pytest.mark.parametrize("k", [N - 1, N, 4 * N])
def test_a_parameter_as_input_is_shared_by_all_samples(k: int) -> None:
    model = Queries(k)
    with pytest.warns(UserWarning, match="Queries"):
        kfac = KFAC(model, kl_clip=None)
    loss_of(model(torch.randn(N, 4, generator=seeded(1)).double())).backward()
    with pytest.warns(UserWarning, match=rf"project \(its input of {k} rows is shared by all"):
        kfac.step()
    assert kfac.coverage()["embed"] == "covered" and "project" not in kfac.factors()


def test_parameters_that_are_samples_count_where_their_number_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    codes = nn.Parameter(torch.randn(N, 4, generator=seeded(1)).double())
    kfacs = []
    for inputs in (codes, codes.detach()):
        kfac = KFAC(model, kl_clip=None)
        model.zero_grad()
        with kfac.micro_batch(N):
            loss_of(model(inputs)).backward()
        kfac.step()
        kfacs.append(kfac)
    assert_same_factors(*kfacs)
