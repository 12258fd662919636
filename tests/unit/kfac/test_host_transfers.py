"""On a device, a step must not have the host wait: nothing in it reads a tensor's value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_kfac import KFAC

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount"}


class Waits(TorchDispatchMode):
    """Counts operations whose result, or its shape, has to come to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

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


def _clipped(model: nn.Module) -> None:
    for p in model.parameters():  # touches every gradient, as unscaling does
        assert p.grad is not None
        p.grad.mul_(0.5)


@pytest.mark.parametrize("touch", [lambda model: None, _clipped])
@pytest.mark.parametrize("interval", [1, 100])
def test_a_step_reads_no_value(touch: Callable[[nn.Module], None], interval: int) -> None:
    model = network()
    kfac = KFAC(model, factor_update_steps=interval, inverse_update_steps=100)
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
    assert not waits.seen
