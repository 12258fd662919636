"""A small training run that kfac-pytorch and ours can both do, and the recorder of its weights.

    python tests/support/kfac_pytorch_reference.py FOLDER_WITH_KFAC_PYTORCH_INSTALLED

writes tests/unit/optimizers/kfac_pytorch_reference.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 5
LR = 0.05
DAMPING = 0.003
REFERENCE = Path(__file__).parents[1] / "unit" / "optimizers" / "kfac_pytorch_reference.json"
METHODS = ("eigen", "inverse")


def waves(*shape: int, phase: float) -> Tensor:
    """Numbers that no random generator has a say in."""
    count = torch.Size(shape).numel()
    index = torch.arange(count, dtype=torch.double)
    return (torch.sin(1.7 * index + phase) + torch.cos(0.31 * index * phase)).reshape(shape)


def network() -> nn.Sequential:
    """Two convolutions, one with a stride, and two Linear layers, in float64."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 7),
        nn.Tanh(),
        nn.Linear(7, 4),
    ).double()
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.3 * waves(*parameter.shape, phase=0.7 + index))
    return model


def train(build: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> dict[str, list[float]]:
    """Weights after a few steps with momentum."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    preconditioner = build(model, optimizer)
    for step in range(STEPS):
        x = waves(6, 2, 4, 4, phase=1.1 + step)
        y = torch.arange(6).mul(step + 1).remainder(4)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        optimizer.step()
    return {name: p.detach().reshape(-1).tolist() for name, p in model.named_parameters()}


def train_peer(method: str) -> dict[str, list[float]]:
    """The run with kfac-pytorch, which must be importable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kfac.preconditioner import KFACPreconditioner  # type: ignore[import-not-found]

        return train(
            lambda model, optimizer: KFACPreconditioner(
                model,
                lr=LR,
                damping=DAMPING,
                factor_update_steps=1,
                inv_update_steps=2,
                factor_decay=0.95,
                kl_clip=0.001,
                compute_method=method,
                inv_dtype=torch.float64,
            )
        )


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    reference = {
        "package": "kfac-pytorch",
        "commit": sys.argv[2] if len(sys.argv) > 2 else "unknown",
        "command": "python tests/support/kfac_pytorch_reference.py FOLDER COMMIT",
        "torch": torch.__version__,
        "weights": {method: train_peer(method) for method in METHODS},
    }
    REFERENCE.write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
