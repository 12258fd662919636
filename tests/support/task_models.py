"""Small models for every task, and a person's own task and dataset."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from elastic_kfac.tasks.regression import Regression


class NextToken(nn.Module):
    """An embedding, a causal mean over earlier tokens, and a linear layer."""

    def __init__(self, num_outputs: int, input_shape: tuple[int, ...], width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_outputs + 1, width)
        self.hidden = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor, tokens_mask: Tensor | None = None) -> Tensor:
        found = self.embedding(tokens)
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        before = found.cumsum(dim=1) / places[:, None]
        return self.head(torch.tanh(self.hidden(torch.cat([found, before], dim=2))))


def next_token64(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return NextToken(num_outputs, input_shape).double()


class BagOfTokens(nn.Module):
    """The mean embedding of the real tokens, and a linear layer."""

    def __init__(
        self, num_outputs: int, input_shape: tuple[int, ...], *, columns: dict[str, Any]
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(columns["tokens"].vocabulary, 16)
        self.head = nn.Linear(16, num_outputs)

    def forward(self, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
        weight = tokens_mask.to(self.head.weight.dtype).unsqueeze(2)
        mean = (self.embedding(tokens) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return self.head(mean)


def pixel_network(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, num_outputs, 3, padding=1),
    )


def autoencoder(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    channels = input_shape[0]
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, stride=4), nn.ReLU(), nn.ConvTranspose2d(8, channels, 4, stride=4)
    )


class Anchors(nn.Module):
    """Three convolutions to a grid of 4 pixels with one anchor of 10 pixels per cell."""

    def __init__(self, num_outputs: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(input_shape[0], 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 24, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(24, 4 + 1 + num_outputs, 3, padding=1),
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.body(images)
        rows, columns = found.shape[2:]
        found = found.permute(0, 2, 3, 1).flatten(1, 2)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = torch.stack([x, y], dim=2).reshape(-1, 2).to(found) * 4 + 2
        moved = centre + 4 * found[..., :2]
        half = 5 * found[..., 2:4].clamp(-2, 2).exp()
        return {
            "boxes": torch.cat([moved - half, moved + half], dim=2),
            "scores": found[..., 4:],
            "anchors": torch.cat([centre - 5, centre + 5], dim=1),
        }


class TwoStage(nn.Module):
    """What torchvision's two-stage detectors return in evaluation mode."""

    def __init__(self, num_outputs: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = nn.Conv2d(input_shape[0], 4, 3)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        found = self.body(images).mean(dim=(2, 3))
        return [{"boxes": one[None], "scores": one[:1], "labels": one[:1]} for one in found]


class AbsoluteError(Regression):
    """A person's own task: the absolute error, and how often it is below one half."""

    metrics: ClassVar = {"close": "max"}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._standardised(outputs, targets).abs().sum()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        close = self._standardised(outputs, targets).abs() < 0.5
        return close.sum().double().view(1)

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        return {"close": float(sums[0]) / terms}


class Waves:
    """A person's own dataset: two inputs and one target."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self._where = draw.uniform(-1, 1, (96, 3)).astype(np.float32)
        self._scale = draw.uniform(0, 1, (96, 2)).astype(np.float32)

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where, scale = self._where[index], self._scale[index]
        return {"where": where, "scale": scale, "y": np.sin(where).sum() + scale.sum()}


def waves() -> dict[str, Waves]:
    return {"train": Waves(0), "test": Waves(1)}


class TwoInputs(nn.Module):
    def __init__(self, num_outputs: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(2, 8)
        self.head = nn.Linear(8, num_outputs)

    def forward(self, where: Tensor, scale: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(where) + self.second(scale)))


class Mixed:
    """A person's own dataset with a value of every kind."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 255, (20, 3, 6, 5), dtype=np.uint8)
        self.tokens = [draw.integers(0, 9, int(n)) for n in draw.integers(1, 7, 20)]
        self.boxes = [
            np.array([[0, 0, 2, 3, i % 2]] * (i % 3), dtype=np.float32) for i in range(20)
        ]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "picture": torch.from_numpy(self.images[index]),
            "words": self.tokens[index],
            "depth": float(index),
            "label": index % 4,
            "mask": (self.images[index, 0] > 127).astype(np.int64),
            "boxes": self.boxes[index].reshape(-1, 5),
        }


def _double(build: Any) -> Any:
    """The same model in float64, for comparisons between numbers of ranks."""

    def factory(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
        model: nn.Module = build(num_outputs, input_shape)
        return model.double()

    return factory


def bag64(num_outputs: int, input_shape: tuple[int, ...], *, columns: dict[str, Any]) -> nn.Module:
    return BagOfTokens(num_outputs, input_shape, columns=columns).double()


def regressor(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.Tanh(), nn.Linear(8, num_outputs))


def classifier(num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, num_outputs))


classifier64, regressor64 = _double(classifier), _double(regressor)
pixels64, anchors64 = _double(pixel_network), _double(Anchors)
autoencoder64, two_inputs64 = _double(autoencoder), _double(TwoInputs)
