"""The two workloads of the GPU benchmark, at full size and at a size for tests on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parents[1]))
from transformer import Block


@dataclass(frozen=True)
class Workload:
    """A model and one batch; `loss()` is a mean, over samples or over positions."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss_reduction: str
    skip_layers: tuple[str, ...] = ()

    def loss(self, model: nn.Module) -> Tensor:
        """In bfloat16 where autocast applies."""
        with torch.autocast(self.inputs.device.type, torch.bfloat16):
            outputs = model(self.inputs)
        return F.cross_entropy(outputs.float().flatten(0, -2), self.targets.flatten())


class GPT(nn.Module):
    """GPT-2's form: 124 M parameters at its smallest size, the head tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.01)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions))
        return F.linear(x, self.tokens.weight)


def workloads(device: torch.device, *, tiny: bool) -> list[Workload]:
    """ResNet-50 on 64 images of 224 pixels and GPT-2 small on 8 x 1,024 tokens, or toys of their kind."""
    images, pixels = (2, 32) if tiny else (64, 224)
    batch, length, vocabulary = (2, 16, 64) if tiny else (8, 1024, 50_304)
    gpt = (vocabulary, length, 16, 2, 2) if tiny else (vocabulary, length, 768, 12, 12)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    return [
        Workload(
            "resnet50",
            lambda: _narrow_resnet() if tiny else resnet50(),
            torch.randn(images, 3, pixels, pixels, generator=generator).to(device),
            torch.randint(10, (images,), generator=generator).to(device),
            "mean",
        ),
        Workload(
            "gpt",
            lambda: GPT(*gpt),
            tokens[:, :-1].contiguous().to(device),
            tokens[:, 1:].contiguous().to(device),
            "positions",
            # The table is the head as well, whose use K-FAC does not see.
            ("^tokens$",),
        ),
    ]


def _narrow_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
