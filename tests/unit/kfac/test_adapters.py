"""Adapters (LoRA) beside a frozen base, against rows by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.layer_kinds import N, assert_rows
from support.training_loops import seeded


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
