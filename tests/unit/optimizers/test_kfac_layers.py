"""Every kind of layer, module uses, wrappers: nothing is skipped silently, everything is exact."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_kfac import KFAC
from elastic_kfac.errors import ConfigError

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def factors_of(kfac: KFAC) -> dict[str, Tensor]:
    return {f"{name}.{n}": t for name, f in kfac.factors().items() for n, t in f.items()}


def run(model: nn.Module, *inputs: Tensor, **options) -> KFAC:
    """One step on `mean over samples of Σ output²`."""
    kfac = KFAC(model, kl_clip=None, loss_reduction="mean", **options)
    model.zero_grad()
    output = model(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    (output.square().sum() / len(inputs[0])).backward()
    kfac.step()
    return kfac


def test_grouped_convolution_equals_one_convolution_per_group() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    parts = [nn.Conv2d(2, 3, 3, padding=1).double() for _ in range(2)]
    for index, part in enumerate(parts):
        part.weight.data.copy_(grouped.weight.data[3 * index : 3 * index + 3])
        part.bias.data.copy_(grouped.bias.data[3 * index : 3 * index + 3])
    x = torch.randn(5, 4, 6, 6, dtype=torch.double)
    run(grouped, x, method="inverse")
    for index, part in enumerate(parts):
        run(part, x[:, 2 * index : 2 * index + 2], method="inverse")
        rows = slice(3 * index, 3 * index + 3)
        torch.testing.assert_close(grouped.weight.grad[rows], part.weight.grad, **TOLERANCE)
        torch.testing.assert_close(grouped.bias.grad[rows], part.bias.grad, **TOLERANCE)


def test_pointwise_convolution_on_one_pixel_equals_linear() -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(4, 3, 1).double(), nn.Linear(4, 3).double()
    linear.weight.data.copy_(conv.weight.data[..., 0, 0])
    linear.bias.data.copy_(conv.bias.data)
    x = torch.randn(6, 4, dtype=torch.double)
    run(conv, x[..., None, None])
    run(linear, x)
    torch.testing.assert_close(conv.weight.grad[..., 0, 0], linear.weight.grad, **TOLERANCE)


class _Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, padding_idx=0).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def test_embedding_equals_linear_over_one_hot_rows() -> None:
    torch.manual_seed(0)
    model = _Embedded()
    tokens = torch.tensor([[1, 2, 2], [3, 6, 0]])
    linear = nn.Linear(7, 3, bias=False).double()
    linear.weight.data.copy_(model.table.weight.data.t())
    kfac = run(model, tokens)
    one_hot = F.one_hot(tokens, 7).double()
    one_hot[tokens == 0] = 0
    other = run(linear, one_hot)
    torch.testing.assert_close(kfac.states[0].factors["A"], other.states[0].factors["A"].diagonal())
    torch.testing.assert_close(kfac.states[0].factors["G"], other.states[0].factors["G"])
    torch.testing.assert_close(model.table.weight.grad, linear.weight.grad.t(), **TOLERANCE)


@pytest.mark.parametrize(
    ("method", "precompute"), [("eigen", False), ("eigen", True), ("inverse", False)]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_embedding_rows_that_come_and_go_equal_linear_over_one_hot_rows(
    method: str, precompute: bool, weight_decay: float
) -> None:
    torch.manual_seed(0)
    table, linear = nn.Embedding(30, 3).double(), nn.Linear(30, 3, bias=False).double()
    linear.weight.data.copy_(table.weight.data.t())
    options = {"method": method, "precompute": precompute, "weight_decay": weight_decay}
    kfacs = [
        KFAC(x, **options, inverse_update_steps=2, factor_decay=0.6, loss_reduction="mean")
        for x in (table, linear)
    ]
    # Rows are used in some steps, in all, in none: their averages decay meanwhile.
    for tokens in ([1, 2, 2], [2, 3, 9], [7, 7, 7], [1, 8, 2], [29, 0, 1]):
        index, sign = torch.tensor(tokens), torch.tensor([[1.0], [-2.0], [0.5]]).double()
        for model, x in ((table, index), (linear, F.one_hot(index, 30).double())):
            model.zero_grad()
            (model(x).exp() * sign).sum().div(3).backward()
        for kfac in kfacs:
            kfac.step()
        a, dense = (kfac.states[0].factors["A"] for kfac in kfacs)
        torch.testing.assert_close(a, dense.diagonal(), **TOLERANCE)
        assert 0 < a.count_nonzero() < 30
        torch.testing.assert_close(table.weight.grad, linear.weight.grad.t(), **TOLERANCE)
        assert bool(table.weight.grad[index].any(1).all())
        if not weight_decay:
            assert not table.weight.grad[10:29].any()


def test_embedding_rows_under_the_trust_region_equal_linear_over_one_hot_rows() -> None:
    """Rows without a gradient have a part in the step, and in what the brake takes out of it."""
    torch.manual_seed(0)
    table, linear = nn.Embedding(30, 3).double(), nn.Linear(30, 3, bias=False).double()
    linear.weight.data.copy_(table.weight.data.t())
    sgds = [torch.optim.SGD(x.parameters(), lr=0.1, momentum=0.9) for x in (table, linear)]
    kfacs = [
        KFAC(x, lr=sgd, loss_reduction="mean") for x, sgd in zip((table, linear), sgds, strict=True)
    ]
    braked = []
    for number, tokens in enumerate(
        ([1, 2, 2], [2, 3, 9], [7, 7, 7], [1, 8, 2], [1, 8, 2], [1, 8, 2], [29, 0, 1])
    ):
        index, sign = torch.tensor(tokens), -1.0 if number in (4, 5) else 1.0
        for model, x in ((table, index), (linear, F.one_hot(index, 30).double())):
            model.zero_grad()
            (sign * model(x).sum(1)).exp().mean().backward()
        unused = sorted(set(range(30)) - set(tokens))
        for kfac, sgd in zip(kfacs, sgds, strict=True):
            kfac.step()
            sgd.step()
        braked.append(bool(table.weight.grad[unused].any()))
        torch.testing.assert_close(table.weight.grad, linear.weight.grad.t(), **TOLERANCE)
        torch.testing.assert_close(table.weight, linear.weight.t(), **TOLERANCE)
    assert True in braked and False in braked[1:]


class _Attention(nn.Module):
    """Attention with explicit projections, for comparison."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        size = source.embed_dim
        self.heads = source.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(size, size).double() for _ in range(4)
        )
        for index, layer in enumerate((self.q_proj, self.k_proj, self.v_proj)):
            layer.weight.data.copy_(source.in_proj_weight.data[index * size : (index + 1) * size])
            layer.bias.data.copy_(source.in_proj_bias.data[index * size : (index + 1) * size])
        self.out_proj.load_state_dict(source.out_proj.state_dict())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        parts = split(self.q_proj(q)), split(self.k_proj(k)), split(self.v_proj(v))
        mixed = F.scaled_dot_product_attention(*parts)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "encoder-decoder", "all different"])
def test_multihead_attention_equals_explicit_projections(batch_first: bool, kind: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    nn.init.normal_(attention.in_proj_bias)
    explicit = _Attention(attention)
    q, k, v = torch.randn(3, 5, 6, 8, dtype=torch.double).unbind(0)
    if kind == "self":
        k = v = q
    elif kind == "encoder-decoder":
        v = k
    expected = run(explicit, q, k, v)
    ordered = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    if kind == "self":
        ordered = [ordered[0]] * 3
    elif kind == "encoder-decoder":
        ordered[2] = ordered[1]
    kfac = KFAC(attention, kl_clip=None, loss_reduction="mean")
    output, _ = attention(*ordered)
    (output.square().sum() / 5).backward()
    kfac.step()
    ours, theirs = factors_of(kfac), factors_of(expected)
    assert set(ours) == {"." + name for name in theirs}
    for name, value in theirs.items():
        torch.testing.assert_close(ours["." + name], value, **TOLERANCE)
    grad = attention.in_proj_weight.grad
    torch.testing.assert_close(grad[:8], explicit.q_proj.weight.grad, **TOLERANCE)
    torch.testing.assert_close(grad[16:], explicit.v_proj.weight.grad, **TOLERANCE)
    torch.testing.assert_close(
        attention.out_proj.weight.grad, explicit.out_proj.weight.grad, **TOLERANCE
    )


def test_attention_with_other_key_and_value_sizes_covers_every_parameter() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True).double()
    q, k, v = (torch.randn(4, 6, size, dtype=torch.double) for size in (8, 5, 3))
    kfac = KFAC(attention, kl_clip=None, loss_reduction="mean")
    output, _ = attention(q, k, v)
    (output.square().sum() / 4).backward()
    plain = attention.v_proj_weight.grad.clone()
    kfac.step()
    assert [x.name for x in kfac.layers] == [".q_proj", ".k_proj", ".v_proj", ".out_proj"]
    rows = torch.cat((v.flatten(0, 1), torch.ones(24, 1, dtype=torch.double)), 1)
    torch.testing.assert_close(kfac.factors()[".v_proj"]["A"], rows.t() @ rows / 4, **TOLERANCE)
    assert not torch.allclose(attention.v_proj_weight.grad, plain)


def test_layers_that_count_different_samples_are_named_in_one_warning() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)])
    kfac = KFAC(model, loss_reduction="mean")
    for attempt in range(2):
        model[1](model[0](torch.randn(4, 3)).repeat(2, 1)).sum().backward()
        if attempt == 0:
            with pytest.warns(UserWarning, match="4 in 0, 8 in 1"):
                kfac.step()
        else:
            kfac.step()  # once is enough


def test_attention_is_torchs_own_while_it_is_seen_into() -> None:
    attention = nn.MultiheadAttention(8, 2)
    before = set(vars(attention))
    kfac = KFAC(attention, loss_reduction="mean")
    attention(*[torch.randn(3, 2, 8)] * 3)[0].square().mean().backward()
    kfac.step()
    assert set(vars(attention)) == before and not attention._forward_hooks


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        # Two independent uses: the calls see different inputs and have different gradients.
        return torch.cat((self.layer(x[:, 0]), 3 * self.layer(x[:, 1])), 1)


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat((y[:, 0], 3 * y[:, 1]), 1)


def test_module_called_twice_equals_one_call_on_more_positions() -> None:
    twice, positions = _Twice(), _Positions()
    positions.load_state_dict(twice.state_dict())
    x = torch.randn(6, 2, 4, dtype=torch.double)
    one, other = run(twice, x), run(positions, x)
    for name, value in factors_of(one).items():
        torch.testing.assert_close(value, factors_of(other)[name], **TOLERANCE)
    assert one.states[0].factor_updates == 1


def test_reduce_equals_expand_without_positions_and_differs_with() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, dtype=torch.double)
    model = nn.Linear(4, 2).double()
    flat = [run(copy.deepcopy(model), x[:, 0], weight_sharing=w) for w in ("expand", "reduce")]
    for name, value in factors_of(flat[0]).items():
        torch.testing.assert_close(factors_of(flat[1])[name], value, rtol=0, atol=0)
    shared = [run(copy.deepcopy(model), x, weight_sharing=w) for w in ("expand", "reduce")]
    assert (shared[0].states[0].factors["G"] - shared[1].states[0].factors["G"]).abs().max() > 0.1
    # Reduce, by its definition.
    rows = torch.cat((x.mean(1), torch.ones(6, 1, dtype=torch.double)), 1)
    torch.testing.assert_close(shared[1].states[0].factors["A"], rows.t() @ rows / 6, **TOLERANCE)


@pytest.mark.parametrize("mode", ["unit", "full", "diag"])
@pytest.mark.parametrize("kind", ["batch", "batch1d", "layer", "layer2d", "rms", "rms2d", "group"])
def test_normalisation_layers_equal_dense_fisher_of_their_parameters(mode: str, kind: str) -> None:
    torch.manual_seed(0)
    module, x = {
        "batch": (nn.BatchNorm2d(4), torch.randn(6, 4, 3, 3)),
        "batch1d": (nn.BatchNorm1d(4), torch.randn(6, 4)),
        "layer": (nn.LayerNorm(4), torch.randn(6, 5, 4)),
        "layer2d": (nn.LayerNorm((2, 2), bias=False), torch.randn(6, 5, 2, 2)),
        "rms": (nn.RMSNorm(4), torch.randn(6, 5, 4)),
        "rms2d": (nn.RMSNorm((2, 2), eps=0.1), torch.randn(6, 5, 2, 2)),
        "group": (nn.GroupNorm(2, 4), torch.randn(6, 4, 3, 3)),
    }[kind]
    module, x = module.double(), x.double()
    nn.init.normal_(module.weight)
    kfac = run(module, x, bn_fisher=mode, damping=0.1, bn_damping_multiplier=3.0)

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    preconditioned = gradient()
    # By definition: one gradient per sample, with batch statistics held fixed at those of the batch.
    module.zero_grad()
    kfac.close()
    rows = []
    for sample in range(6):
        output = module(x)
        output[sample].square().sum().backward()
        rows.append(gradient())
        module.zero_grad()
    stacked = torch.stack(rows)
    fisher = stacked.t() @ stacked / 6
    size = fisher.shape[0]
    index = torch.arange(size)
    if mode == "diag":
        fisher = fisher * torch.eye(size, dtype=torch.double)
    elif mode == "unit":
        fisher = fisher * (index[:, None] % 4 == index % 4)
    damping = 0.3 if kind.startswith("batch") else 0.1
    expected = torch.linalg.solve(
        fisher + damping * torch.eye(size, dtype=torch.double), stacked.mean(0)
    )
    torch.testing.assert_close(preconditioned, expected, **TOLERANCE)


class _Deep(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.first = nn.Linear(4, 4).double()
        self.middle = nn.Sequential(
            nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.mode == "plain":
            return self.middle(x)
        return checkpoint(self.middle, x, use_reentrant=self.mode == "reentrant")


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_activation_checkpointing_counts_every_call_once(mode: str) -> None:
    x = torch.randn(6, 4, dtype=torch.double)
    plain, checkpointed = run(_Deep("plain"), x), run(_Deep(mode), x)
    for name, value in factors_of(plain).items():
        torch.testing.assert_close(factors_of(checkpointed)[name], value, **TOLERANCE)


@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of is not ours
def test_compiled_model_equals_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    twin = copy.deepcopy(model)
    x = torch.randn(6, 4, dtype=torch.double)
    eager = run(model, x)
    compiled = run(torch.compile(twin, backend="eager"), x)
    assert [x.name for x in compiled.layers] == ["0", "2"]
    for name, value in factors_of(eager).items():
        torch.testing.assert_close(factors_of(compiled)[name], value, **TOLERANCE)
    torch.testing.assert_close(twin[0].weight.grad, model[0].weight.grad, **TOLERANCE)


def test_evaluation_and_no_grad_passes_add_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(6, 4, dtype=torch.double)
    expected = factors_of(run(copy.deepcopy(model), x))
    kfac = KFAC(model, loss_reduction="mean")
    with torch.no_grad():
        model(10 * x)
    model.eval()
    model(10 * x).sum().backward()
    model.train()
    model(10 * x)  # never differentiated
    model.zero_grad()
    (model(x).square().sum() / 6).backward()
    kfac.step()
    for name, value in factors_of(kfac).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_frozen_layer_keeps_none_and_unused_layer_keeps_its_factors() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "frozen": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    kfac = KFAC(model, factor_update_steps=1, loss_reduction="mean")
    assert [x.name for x in kfac.layers] == ["a", "b"]
    x = torch.randn(4, 3)
    model["frozen"](model["b"](model["a"](x))).sum().backward()
    kfac.step()
    before = kfac.states[1].factors["A"].clone()
    model.zero_grad()
    model["a"](x).sum().backward()
    kfac.step()
    assert model["b"].weight.grad is None
    assert kfac.states[1].factor_updates == 1
    torch.testing.assert_close(kfac.states[1].factors["A"], before, rtol=0, atol=0)
    assert kfac.states[0].factor_updates == 2


def test_unsupported_kinds_are_named_in_one_warning_and_keep_their_gradient() -> None:
    torch.manual_seed(0)
    unsupported = nn.InstanceNorm1d(2, affine=True), nn.PReLU()
    model = nn.Sequential(*unsupported, nn.Flatten(), nn.Linear(8, 2)).double()
    with pytest.warns(UserWarning, match=r"0 \(InstanceNorm1d\), 1 \(PReLU\)") as caught:
        kfac = KFAC(model, kl_clip=None, loss_reduction="mean")
    assert len(caught) == 1
    x = torch.randn(5, 2, 4, dtype=torch.double)
    model(x).square().mean().backward()
    plain = model[0].weight.grad.clone()
    kfac.step()
    torch.testing.assert_close(model[0].weight.grad, plain, rtol=0, atol=0)


def test_supported_kinds_are_never_skipped_silently() -> None:
    model = nn.ModuleList(
        [
            nn.Linear(2, 2),
            nn.Conv2d(2, 2, 1),
            nn.Conv2d(2, 2, 1, groups=2),
            nn.Conv1d(2, 2, 1),
            nn.Conv3d(2, 2, 1),
            nn.ConvTranspose1d(2, 2, 1),
            nn.ConvTranspose2d(2, 2, 1),
            nn.ConvTranspose3d(2, 2, 1),
            nn.BatchNorm1d(2),
            nn.BatchNorm2d(2),
            nn.LayerNorm(2),
            nn.RMSNorm(2),
            nn.GroupNorm(1, 2),
            nn.Embedding(2, 2),
            nn.MultiheadAttention(2, 1),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac = KFAC(model, loss_reduction="mean")
    covered = {id(p) for layer in kfac.layers for p in layer.parameters}
    assert covered == {id(p) for p in model.parameters()}


def test_tied_weights_are_left_out_and_named() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "mix": nn.Linear(3, 3)})
    model["head"] = nn.Linear(3, 5, bias=False)
    model["head"].weight = model["table"].weight
    with pytest.warns(UserWarning, match="head \\(shares a weight with table\\)"):
        kfac = KFAC(model, loss_reduction="mean")
    assert [x.name for x in kfac.layers] == ["mix"]


def test_skip_layers_matches_names_and_refuses_bad_patterns() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert [x.name for x in KFAC(model, skip_layers=["^0$"]).layers] == ["1"]
    with pytest.raises(ConfigError, match="regular expression"):
        KFAC(model, skip_layers=["("])
    with pytest.raises(ConfigError, match="no layer that K-FAC covers"):
        KFAC(model, skip_layers=["."])


def test_deep_copy_of_the_model_feeds_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    kfac = KFAC(model, loss_reduction="mean")
    twin = copy.deepcopy(model)
    twin(torch.randn(4, 3)).sum().backward()
    assert kfac.captured_samples() == 0
    model(torch.randn(4, 3)).sum().backward()
    assert kfac.captured_samples() == 4
