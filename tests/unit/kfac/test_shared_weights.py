"""Weights that several modules share, against rows by autograd."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.errors import ElasticKfacError
from support.layer_kinds import DAMPING, TOLERANCE, N, as_matrix, kronecker_rows, loss_of
from support.training_loops import seeded


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
    first: Any = model.uses[0]
    outputs = [use(x) for use, x in zip(model.uses, inputs, strict=True)]
    scaled = [(1 + i) * output.flatten(1) for i, output in enumerate(outputs)]
    gradients = torch.autograd.grad(N * loss_of(torch.cat(scaled, 1)), outputs, retain_graph=True)
    a, g, count = kronecker_rows(first, outputs, gradients, biases)
    a, g = a / N, g / count
    loss_of(model(inputs)).backward()
    gradient = as_matrix(first, first.weight.grad, [b.grad for b in biases], biases)
    kfac.step()
    (found,) = kfac.factors().values()
    torch.testing.assert_close(found["A"].view_as(a), a, **TOLERANCE)
    torch.testing.assert_close(found["G"].view_as(g), g, **TOLERANCE)
    result = as_matrix(first, first.weight.grad, [b.grad for b in biases], biases)
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
