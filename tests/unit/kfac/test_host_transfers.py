"""On a device, a step must not have the host wait: nothing in it reads a tensor's value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_kfac import KFAC
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature import factors
from elastic_kfac.curvature.kronecker import LinearLayer
from elastic_kfac.curvature.layer import LayerState
from elastic_kfac.kfac import statistics, trust_region
from elastic_kfac.kfac.trust_region import StepRates, TrustRegion

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount"}


class Waits(TorchDispatchMode):
    """Counts operations whose result, or its shape, has to come to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> Self:
        def counted(tensor: Tensor) -> Any:
            self.seen["tolist"] += 1  # reads memory, without an operation
            return self._tolist(tensor)

        self._tolist = Tensor.tolist
        Tensor.tolist = counted  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(16, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 6),
        nn.Linear(6, 6),
    )


@pytest.fixture(autouse=True)
def no_value_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has K-FAC treat this machine's tensors as those of a device."""
    monkeypatch.setattr(factors, "can_be_read", lambda tensor: False)
    monkeypatch.setattr(statistics, "can_be_read", lambda tensor: False)


def _clipped(model: nn.Module) -> None:
    for p in model.parameters():  # touches every gradient, as unscaling does
        assert p.grad is not None
        p.grad.mul_(0.5)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.attention = (
            nn.Embedding(9, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


@pytest.mark.parametrize(
    "options", [{}, {"method": "inverse"}, {"kl_clip": 1e-3}, {"overlap_reduction": True}]
)
@pytest.mark.parametrize("interval", [1, 100])
def test_a_step_of_a_language_model_reads_no_value(options: dict[str, Any], interval: int) -> None:
    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {**options, "factor_update_steps": interval, "inverse_update_steps": 100}
    kfac = KFAC(model, lr=optimizer, loss_reduction="positions", **options)
    tokens, waits = torch.arange(24).reshape(4, 6) % 9, Waits()
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        with waits if step == 4 else nullcontext():
            loss.backward()
            kfac.step()
        optimizer.step()
    assert not waits.seen


def test_statistics_that_are_not_finite_are_discarded_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(on_device: bool) -> KFAC:
        monkeypatch.setattr(factors, "can_be_read", lambda tensor: not on_device)
        monkeypatch.setattr(statistics, "can_be_read", lambda tensor: not on_device)
        model = network()
        kfac = KFAC(model, kl_clip=None, factor_decay=0.5, inverse_update_steps=2)
        x = torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(1))
        for step in range(5):
            model.zero_grad()
            (
                model(x * (step + 1)).square().mean() * (float("inf") if step in (2, 4) else 1.0)
            ).backward()
            kfac.step()
        return kfac

    device, host = trained(True), trained(False)
    # The host has not looked at the last ones yet.
    assert {s.factor_updates for s in device.states} == {4}
    ours, theirs = device.state_dict(), host.state_dict()
    assert theirs["counters"]["discarded_statistics"] == 2 * len(host.layers)
    assert ours["counters"] == theirs["counters"]
    for name, layer in theirs["layers"].items():
        assert ours["layers"][name]["factor_updates"] == layer["factor_updates"] == 3
        for factor, value in layer["factors"].items():
            assert value.isfinite().all() and ours["layers"][name]["factors"][factor].equal(value)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("touch", [lambda model: None, _clipped])
@pytest.mark.parametrize("interval", [1, 100])
def test_a_step_reads_no_value(
    touch: Callable[[nn.Module], None], interval: int, overlap: bool
) -> None:
    model = network()
    kfac = KFAC(
        model,
        factor_update_steps=interval,
        inverse_update_steps=100,
        overlap_reduction=overlap,
    )
    x: Tensor = torch.randn(8, 2, 2, 2)
    waits = Waits()
    for step in range(5):
        model.zero_grad()
        loss = model(x).square().mean()
        if step == 4:
            with waits:
                loss.backward()
                touch(model)
                kfac.step()
        else:
            loss.backward()
            kfac.step()
    # Gradients that somebody has touched may have been zeroed: one look at all of them together.
    looks = 1 if touch is _clipped and interval == 1 else 0
    assert waits.seen == Counter(tolist=looks)


def test_neither_a_step_that_leaves_statistics_nor_the_one_that_takes_them_reads_a_value() -> None:
    model = network()
    kfac = KFAC(
        model, factor_update_steps=3, inverse_update_steps=99, overlap_reduction=True, stagger=False
    )
    x: Tensor = torch.randn(8, 2, 2, 2)
    for step in range(8):
        model.zero_grad()
        waits = Waits()
        with waits:
            model(x).square().mean().backward()
            kfac.step()
        if step > 1:
            assert not waits.seen, step
    assert {s.factor_updates for s in kfac.states} == {3}


@pytest.fixture
def without_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none without a device; a fake one has plain memory in its place."""
    for name in ("tensor", "empty_like"):
        make = getattr(torch, name)

        def plain(*args: Any, make: Callable[..., Tensor] = make, **options: Any) -> Tensor:
            options.pop("pin_memory", None)
            return make(*args, **options)

        monkeypatch.setattr(torch, name, plain)


@pytest.mark.usefixtures("without_pinned_memory")
@pytest.mark.parametrize("indices", [[0, 1], [1]])
def test_the_bound_on_a_step_stays_on_a_device_that_refuses_to_be_read(indices: list[int]) -> None:
    sent: list[Tensor] = []

    def total(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return tensor

    with FakeTensorMode(), torch.device("cuda"):
        trust = TrustRegion(["one", "two"], torch.device("cuda"))
        for step in range(3):
            gradients = [torch.randn(3, 4) for _ in indices]
            results = [2 * gradient for gradient in gradients]
            rates = StepRates([0.1, 0.1 / (step + 1)], [0.9, 0.9])
            used: list[Tensor | None] = [None for _ in indices]
            trust.apply(indices, results, gradients, used, rates, is_linear=True, total=total)
        squared_lr = torch.full((1,), 0.01, dtype=torch.float64, device="cuda")
        trust_region.kl_clip(results, gradients, squared_lr, 1e-3, total)
        with pytest.raises(DataDependentOutputException):
            float(trust.growth)  # the control
    assert len(sent) == 4 and {tensor.device.type for tensor in sent} == {"cuda"}


@pytest.mark.usefixtures("without_pinned_memory")
def test_a_snapshot_takes_no_memory_of_the_device() -> None:
    class Made(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.devices: Counter[str] = Counter()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.devices[result.device.type] += 1
            return result

    module = nn.Linear(3, 2)
    layer = LinearLayer("", module, KfacOptions(), module.weight, module.bias)
    with FakeTensorMode(), torch.device("cuda"):
        parts = {"A": torch.zeros(4, 4), "G": torch.zeros(2, 2)}
        state = LayerState(parts, 1, {f"{name}_inverse": t for name, t in parts.items()})
        with Made() as made:
            saved = layer.saved(state)
    copies = [*saved["factors"].values(), *saved["second_order"].values()]
    assert len(copies) == 4 and {t.device.type for t in copies} == {"cpu"}
    assert made.devices["cuda"] == 0 < made.devices["cpu"]
