"""`method: ekfac` and `method: one_sided` on layers and loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.errors import ConfigError, UsageError

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (6, 5)),
    "positions": (nn.Linear(5, 4), (6, 3, 5)),
    "convolution": (nn.Conv2d(2, 3, 3, padding=1), (5, 2, 4, 4)),
    "groups": (nn.Conv1d(4, 6, 3, groups=2), (5, 4, 7)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, stride=2), (5, 2, 3, 3)),
    "table": (nn.Embedding(7, 4), (6, 3)),
    "attention": (nn.MultiheadAttention(4, 2, batch_first=True), (5, 3, 4)),
}


def run(module: nn.Module, shape: tuple[int, ...], steps: int, **options: object) -> list[Tensor]:
    """Gradients after some steps, on inputs that follow from the number of the step."""
    torch.manual_seed(0)
    module = copy.deepcopy(module).double()
    is_table = isinstance(module, nn.Embedding)
    kfac = KFAC(module, lr=0.1, loss_reduction="mean", kl_clip=None, damping=0.05, **options)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(*shape, generator=generator).double()
        x = (x > 0).long() + 2 if is_table else x
        module.zero_grad()
        output = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)
        (output.sin() ** 2).sum().div(len(x)).backward()
        d = [layer.gradient().clone() for layer in kfac.layers]
        kfac.step()
    if options["method"] == "one_sided":
        for layer, state, gradient in zip(kfac.layers, kfac.states, d, strict=True):
            assert set(state.factors) == {"A"}
            a = state.factors["A"]
            a = a.diag() if isinstance(module, nn.Embedding) else a
            eye = torch.eye(a.shape[-1]).double()
            expected = torch.linalg.solve((a + 0.05 * eye).mT, gradient.mT).mT
            torch.testing.assert_close(layer.gradient(), expected, **TOLERANCE)
    kfac.close()
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_one_sided_layer_equals_dense_algebra(kind: str) -> None:
    run(*KINDS[kind], steps=2, method="one_sided", inverse_update_steps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_ekfac_starts_as_kfac_and_then_leaves_it(kind: str) -> None:
    module, shape = KINDS[kind]
    for steps, equal in ((1, True), (2, False)):
        both = [
            run(module, shape, steps, method=m, factor_update_steps=1) for m in ("eigen", "ekfac")
        ]
        close = [torch.allclose(p, q, rtol=1e-9, atol=1e-11) for p, q in zip(*both, strict=True)]
        assert all(close) == equal
    assert all(p.isfinite().all() for p in both[1])


def loop(options: dict[str, object], factor: float) -> float:
    """The last of 60 losses, times `factor` where it is differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning) if options["method"] == "one_sided" else _nothing():
        kfac = KFAC(model, lr=optimizer, loss_reduction="mean", **options)
    x = torch.randn(256, 8)
    y = (x[:, :3] + 0.5 * x[:, 3:6].sin()).argmax(1)
    for step in range(60):
        part = slice(64 * (step % 4), 64 * (step % 4) + 64)
        optimizer.zero_grad()
        (F.cross_entropy(model(x[part]), y[part]) * factor).backward()
        kfac.step()
        optimizer.step()
    kfac.close()
    return F.cross_entropy(model(x), y).item()


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("method", ["ekfac", "one_sided"])
def test_variant_trains_whatever_the_units_of_the_loss(method: str) -> None:
    losses = [loop({"method": method, "inverse_update_steps": 5}, f) for f in (1.0, 1e3, 1e-3)]
    assert max(losses) < 0.35
    assert max(losses) - min(losses) < 0.05


def test_one_sided_keeps_and_counts_nothing_of_output_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    kfac = KFAC(model, method="one_sided", loss_reduction="mean")
    model(torch.randn(8, 6)).square().sum(1).mean().backward()
    assert kfac.memory_usage()["pending"] == 4 * (7**2 + 21**2)
    kfac.step()
    usage = kfac.memory_usage()
    assert usage["factors"] == usage["second_order"] == 4 * (7**2 + 21**2)
    budget = usage["factors"] + usage["second_order"]
    twin = copy.deepcopy(model)
    KFAC(twin, method="one_sided", memory_budget_bytes=budget)
    with pytest.raises(ConfigError, match=f"at least {budget} bytes"):
        KFAC(twin, method="one_sided", memory_budget_bytes=budget - 1)


def test_one_sided_names_the_layers_without_inputs_to_decompose() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="1 .BatchNorm1d: method=one_sided covers"):
        kfac = KFAC(model, method="one_sided")
    assert [layer.name for layer in kfac.layers] == ["0"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "ekfac", "colocate": False}, "colocate=true"),
        ({"method": "ekfac", "fisher": "1mc"}, "fisher=empirical"),
        ({"method": "one_sided", "fisher": "exact"}, "fisher=empirical"),
        ({"method": "ekfac", "factor_scale": "kaisa"}, "factor_scale=per_sample"),
        ({"method": "ekfac", "loss_reduction": "sum"}, "gradient of a mean"),
        ({"method": "ekfac", "factor_rank": 8}, "method=eigen"),
        ({"method": "one_sided", "precompute": True}, "method=eigen"),
    ],
)
def test_what_a_variant_cannot_do_is_refused_in_one_line(
    options: dict[str, object], line: str
) -> None:
    with pytest.raises((ConfigError, UsageError), match=line) as caught:
        KFAC(nn.Linear(3, 2), **options)
    assert "\n" not in str(caught.value)
