"""Exported curvature solves like the dense matrices it stands for, and like the KFAC it came from."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.checkpoints import load_curvature, read_tree, save_curvature, write_tree
from elastic_kfac.curvature.discovery import find_layers
from elastic_kfac.errors import ConfigError, StateError

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "influence.py"
GAMMA = 0.03


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.conv(self.words(tokens).transpose(1, 2)).transpose(1, 2))
        return self.head((h + self.attention(h, h, h)[0]).mean(1))


def loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (9, 5), generator=generator)
    return F.cross_entropy(model(tokens), torch.randint(3, (9,), generator=generator))


def trained(**options: Any) -> tuple[nn.Module, KFAC]:
    model = Network().double()
    options = {"inverse_update_steps": 1, "factor_update_steps": 1, **options}
    kfac = KFAC(model, lr=0.0, damping=GAMMA, trust_region="none", **options)
    for seed in range(3):
        model.zero_grad()
        loss(model, seed).backward()
        kfac.step()
    return model, kfac


def dense_solution(factors: dict[str, Tensor], gradient: Tensor) -> Tensor:
    """`(A ⊗ G + γI)⁻¹ vec D`, by the matrix itself; for each group."""
    a, g = factors["A"], factors["G"]
    if a.dim() == 1:
        a = a.diag()
    if a.dim() == 3:
        groups = [{"A": a[i], "G": g[i]} for i in range(len(a))]
        return torch.stack([dense_solution(f, d) for f, d in zip(groups, gradient, strict=True)])
    block = torch.kron(g, a)
    block = block + GAMMA * torch.eye(len(block)).double()
    return torch.linalg.solve(block, gradient.reshape(-1)).reshape(gradient.shape)


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_file_solves_like_the_dense_blocks(method: str, tmp_path: Path) -> None:
    model, kfac = trained(method=method)
    save_curvature(tmp_path / "c.safetensors", model, kfac)
    curvature = load_curvature(tmp_path / "c.safetensors", model)
    kfac.close()
    model.zero_grad()
    loss(model, 9).backward()
    layers = {x.name: x for x in find_layers(model, kfac.options).layers}
    before = {name: layer.gradient().clone() for name, layer in layers.items()}
    curvature.precondition(GAMMA)
    assert set(curvature.layers) == set(layers) and len(layers) == 8
    for name, layer in layers.items():
        factors = curvature.layers[name]["factors"]
        if "F" not in factors:
            right = dense_solution(factors, before[name])
            torch.testing.assert_close(layer.gradient(), right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"method": "ekfac"}, {"max_factor_dim": 3}, {"bn_fisher": "full"}]
)
def test_file_solves_like_the_preconditioner(options: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "factors wider than")
        model, kfac = trained(**options, factor_decay=0.5)
    save_curvature(tmp_path / "c.safetensors", model, kfac)
    gradients = []
    for use_file in (False, True):
        model.zero_grad()
        kfac.load_state_dict(state := kfac.state_dict())
        with torch.no_grad():
            for number, p in enumerate(model.parameters()):
                p.grad = torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(number)
                ).double()
            if use_file:
                load_curvature(tmp_path / "c.safetensors", model).precondition(GAMMA)
            else:
                for layer in kfac.layers:
                    held = layer.restored(state["layers"][layer.name]).decomposition
                    layer.set_gradient(layer.precondition(held, layer.gradient(), GAMMA))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


def test_layout_is_that_of_the_page(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, kfac = trained(method="ekfac")
    save_curvature(tmp_path / "c.safetensors", model, kfac)
    with safe_open(tmp_path / "c.safetensors", framework="pt") as opened:
        shapes = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
    assert {n: s for n, s in shapes.items() if "/head/" in n} == {
        "layers/head/factors/A": (5, 5),
        "layers/head/factors/G": (3, 3),
        "layers/head/basis/A_vectors": (5, 5),
        "layers/head/basis/G_vectors": (3, 3),
        "layers/head/eigenvalues": (3, 5),
    }
    assert shapes["layers/words/factors/A"] == (7,) and "layers/norm/factors/F" in shapes
    tree = read_tree(tmp_path / "c.safetensors")
    assert tree["step"] == 3 and tree["method"] == "ekfac"
    q = tree["layers"]["attention.q_proj"]
    assert q["parameters"] == ["attention.in_proj_weight", "attention.in_proj_bias"]
    assert (q["rows"], q["shape"]) == ([0, 4], [4, 5])


def test_what_has_no_curvature_or_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one_sided covers"):
        model, kfac = trained(method="one_sided")
    with pytest.raises(ConfigError, match="one_sided"):
        save_curvature(tmp_path / "c.safetensors", model, kfac)
    other = nn.Sequential(nn.Linear(2, 2)).double()
    with pytest.raises(StateError, match="no factors yet"):
        save_curvature(tmp_path / "c.safetensors", other, KFAC(other, lr=0.1))
    write_tree(tmp_path / "c.safetensors", {"layers": {}})
    with pytest.raises(StateError, match="not an exported curvature"):
        load_curvature(tmp_path / "c.safetensors", other)
    model, kfac = trained()
    save_curvature(tmp_path / "c.safetensors", model, kfac)
    with pytest.raises(StateError, match="another model"):
        load_curvature(tmp_path / "c.safetensors", other)


@pytest.mark.slow
def test_example_finds_influences_close_to_the_exact_ones() -> None:
    spec = importlib.util.spec_from_file_location("influence", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main()
    assert found["accuracy"] > 0.8
    assert found["kfac"] > 0.8 and found["kfac"] > found["plain"] + 0.1
