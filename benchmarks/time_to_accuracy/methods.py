"""What competes: each method with its space of settings, and the repositories that some come from."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.quasirandom import SobolEngine

from elastic_kfac import KFAC

Setting = Mapping[str, float]
Built = tuple[list[torch.optim.Optimizer], Any]
"""Optimizers, and what has to step before them, if anything."""


@dataclass(frozen=True)
class Range:
    low: float
    high: float

    def at(self, share: float) -> float:
        """Log-uniform."""
        value = self.low * (self.high / self.low) ** share
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class Repository:
    url: str
    commit: str
    is_package: bool = False
    """It must be installed, because it reads its own metadata."""


PEERS = {
    "soap": Repository(
        "https://github.com/nikhilvyas/SOAP", "a1e553530fde97d0e6b307d7c82ac6d38b072340"
    ),
    "distributed_shampoo": Repository(
        "https://github.com/facebookresearch/optimizers",
        "f60660661194de26d3ee78bae6d15820ff8e583d",
    ),
    "kfac.preconditioner": Repository(
        "https://github.com/gpauloski/kfac-pytorch",
        "869cf110334e5a6e9ea054bafdc4558313a821e8",
        is_package=True,
    ),
}


@dataclass(frozen=True)
class Method:
    build: Callable[[nn.Module, Setting], Built]
    space: Mapping[str, Range]
    peer: str = ""
    sets_target: bool = False
    """A first-order method whose best results are the target."""

    def points(self, count: int, study: int) -> list[dict[str, float]]:
        """Quasi-random settings of a study; without a space, one point with no settings."""
        if not self.space:
            return [{}]
        draws = SobolEngine(len(self.space), scramble=True, seed=study).draw(count).tolist()
        return [
            {name: r.at(u) for (name, r), u in zip(self.space.items(), draw, strict=True)}
            for draw in draws
        ]


LR_SHARE = {"warmup": Range(0.02, 0.2)}
"""Share of the budget that the rate rises in."""
MEMORY = Range(0.02, 0.3)
"""1 − momentum, or 1 − β₁."""


def _sgd(model: nn.Module, at: Setting) -> Built:
    settings = {"momentum": 1 - at["forgets"], "nesterov": True, "weight_decay": at["decay"]}
    return [torch.optim.SGD(model.parameters(), lr=at["lr"], **settings)], None


def _adamw(model: nn.Module, at: Setting) -> Built:
    betas = (1 - at["forgets"], 0.999)
    rules = {"lr": at["lr"], "betas": betas, "weight_decay": at["decay"]}
    return [torch.optim.AdamW(model.parameters(), **rules)], None


class FlatMuon(torch.optim.Muon):
    """Muon on matrices [out, everything else], which share the memory of the weights."""

    def __init__(self, weights: list[nn.Parameter], **settings: Any) -> None:
        self.weights = weights
        self.flat = [nn.Parameter(w.data.view(len(w), -1)) for w in weights]
        super().__init__(self.flat, **settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight, flat in zip(self.weights, self.flat, strict=True):
            flat.grad = None if weight.grad is None else weight.grad.reshape_as(flat)
        super().step(closure)


def _orthogonal(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Muon's iteration in the matrix's own type: torch's is in bfloat16, which a CPU without units for it
    emulates, at five times the cost of a whole step."""
    a, b, c = coefficients
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


torch.optim._muon._zeropower_via_newtonschulz = _orthogonal


def _muon(model: nn.Module, at: Setting) -> Built:
    """Hidden matrices by Muon; embeddings, the last layer and vectors by AdamW, as its authors do."""
    modules = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    outside = {id(p) for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()}
    outside |= {id(p) for p in modules[-1].parameters()}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in outside]
    rest = [p for p in model.parameters() if p.ndim < 2 or id(p) in outside]
    muon = FlatMuon(matrices, lr=at["lr"], momentum=1 - at["forgets"], weight_decay=0.0)
    return [muon, torch.optim.AdamW(rest, lr=at["lr_rest"], weight_decay=0.0)], None


def _soap(model: nn.Module, at: Setting) -> Built:
    rules = {"lr": at["lr"], "betas": (1 - at["forgets"], 0.95), "weight_decay": at["decay"]}
    return [_peer("soap").SOAP(model.parameters(), precondition_frequency=10, **rules)], None


def _shampoo(model: nn.Module, at: Setting) -> Built:
    peer = _peer("distributed_shampoo")
    optimizer = peer.DistributedShampoo(
        model.parameters(),
        lr=at["lr"],
        betas=(1 - at["forgets"], 0.99),
        weight_decay=at["decay"],
        precondition_frequency=10,
        start_preconditioning_step=10,
        grafting_config=peer.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8),
    )
    return [optimizer], None


def _behind(model: nn.Module, at: Setting) -> torch.optim.Optimizer:
    rate, momentum = at.get("lr", 0.1), 1 - at.get("forgets", 0.3)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def _kfac_pytorch(model: nn.Module, at: Setting) -> Built:
    optimizer = _behind(model, at)
    preconditioner = _peer("kfac.preconditioner").KFACPreconditioner(
        model,
        lr=lambda step: optimizer.param_groups[0]["lr"],
        damping=at["damping"],
        kl_clip=at["kl_clip"],
        factor_update_steps=round(at["every"]),
        inv_update_steps=2 * round(at["every"]),
        skip_layers=["out_proj"],  # of nn.MultiheadAttention, whose forward it never sees
    )
    return [optimizer], preconditioner


def _ours(model: nn.Module, at: Setting) -> Built:
    optimizer = _behind(model, at)
    options: dict[str, Any] = {}
    if "trust_radius" in at:
        radius = at["trust_radius"]
        options = {"trust_radius": radius, "damping": at["damping_over_radius_squared"] * radius**2}
    reduction = "positions" if getattr(model, "causal", False) else "mean"
    return [optimizer], KFAC(model, lr=optimizer, loss_reduction=reduction, **options)


EVERY = {"every": Range(1, 10)}
"""Steps between factors, half of those between decompositions."""
CLIPPED = {
    "lr": Range(0.02, 1.0),
    "forgets": Range(0.05, 0.5),
    "damping": Range(1e-3, 1e-1),
    "kl_clip": Range(1e-4, 1e-2),
    **EVERY,
}
ADAPTIVE = {
    "trust_radius": Range(0.5, 4.0),
    "damping_over_radius_squared": Range(3e-4, 6e-3),
    **LR_SHARE,
}
"""Of the rate only its course counts; longer steps want more damping."""
DECAY = {"decay": Range(1e-6, 1e-3)}
DECOUPLED = {"decay": Range(1e-3, 1e-1)}

METHODS = {
    "SGD": Method(
        _sgd, {"lr": Range(0.01, 2.0), "forgets": MEMORY, **DECAY, **LR_SHARE}, sets_target=True
    ),
    "AdamW": Method(
        _adamw,
        {"lr": Range(5e-4, 3e-2), "forgets": MEMORY, **DECOUPLED, **LR_SHARE},
        sets_target=True,
    ),
    "Muon": Method(
        _muon,
        {"lr": Range(3e-3, 0.2), "lr_rest": Range(1e-3, 2e-2), "forgets": MEMORY, **LR_SHARE},
    ),
    "SOAP": Method(
        _soap, {"lr": Range(1e-3, 3e-2), "forgets": MEMORY, **DECOUPLED, **LR_SHARE}, "soap"
    ),
    "Distributed Shampoo": Method(
        _shampoo,
        {"lr": Range(1e-3, 3e-2), "forgets": MEMORY, **DECOUPLED, **LR_SHARE},
        "distributed_shampoo",
    ),
    "kfac-pytorch": Method(_kfac_pytorch, CLIPPED, "kfac.preconditioner"),
    "ours, default": Method(_ours, {}),
    "ours, tuned": Method(_ours, ADAPTIVE),
}


# -- the repositories -----------------------------------------------------------------------------


class Peers:
    """Where repositories are kept, set by the command line."""

    folder = Path.home() / ".cache" / "elastic-kfac" / "peers"

    @classmethod
    def fetch(cls, name: str) -> str:
        """Fetches a repository at its commit, once; the reason if it cannot be had."""
        peer = PEERS[name]
        target = cls.path(peer)
        if target.exists():
            return ""
        part = target.with_suffix(".part")
        commands = [
            ["git", "clone", "--quiet", peer.url, str(part)],
            ["git", "-C", str(part), "checkout", "--quiet", peer.commit],
        ]
        if peer.is_package:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            commands.append([*pip, "--target", str(part / "installed"), str(part)])
        subprocess.run(["rm", "-rf", str(part)], check=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}"
        part.rename(target)
        return ""

    @classmethod
    def path(cls, peer: Repository) -> Path:
        return cls.folder / f"{peer.url.rsplit('/', 1)[-1]}-{peer.commit[:10]}"


@cache
def _peer(name: str) -> Any:
    peer = PEERS[name]
    sys.path.insert(0, str(Peers.path(peer) / ("installed" if peer.is_package else ".")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def rate_at(share: float, warmup: float) -> float:
    """Factor on the rate at a share of the budget: a linear rise, then a cosine to 0."""
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
