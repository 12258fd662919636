"""Residual networks: for CIFAR, wide ones, and ImageNet's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError
from elastic_kfac.zoo.torchvision_models import from_torchvision


def _conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _he_normal(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class _CifarResNet(nn.Module):
    """Depth 6n+2 for 32x32 images (He et al. 2016, section 4.2), projection shortcuts."""

    def __init__(self, blocks: int, num_classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        in_channels = width
        for stage in range(3):
            size = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_BasicBlock(in_channels, size, stride))
                in_channels = size
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(in_channels, num_classes)
        _he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


def resnet20(num_classes: int, image_shape: tuple[int, int, int], *, width: int = 16) -> nn.Module:
    """CIFAR residual network of 20 layers, 0.27 M parameters (He et al. 2016, table 6)."""
    return _CifarResNet(3, num_classes, image_shape[0], width)


def resnet32(num_classes: int, image_shape: tuple[int, int, int], *, width: int = 16) -> nn.Module:
    """CIFAR residual network of 32 layers, 0.46 M parameters (He et al. 2016, table 6)."""
    return _CifarResNet(5, num_classes, image_shape[0], width)


class _WideBlock(nn.Module):
    """Normalisation and ReLU before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.project = None
        if inputs != outputs or stride != 1:
            self.project = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        out = self.dropout(torch.relu(self.bn2(self.conv1(active))))
        # A block that changes the shape shares its first activation with the shortcut.
        return self.conv2(out) + (x if self.project is None else self.project(active))


def wide_resnet(
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    depth: int = 16,
    widen: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """WideResNet-16-4 by default, 2.7 M parameters; 28-10 has 36.5 M (Zagoruyko & Komodakis 2016)."""
    if depth < 10 or (depth - 4) % 6:
        raise ConfigError(
            "wide_resnet: impossible depth", given=depth, allowed="10, 16, 22, 28, ..."
        )
    layers: list[nn.Module] = [_conv3(image_shape[0], 16)]
    inputs = 16
    for stage in range(3):
        for block in range((depth - 4) // 6):
            outputs = 16 * 2**stage * widen
            layers.append(_WideBlock(inputs, outputs, 2 if stage and block == 0 else 1, dropout))
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(inputs, num_classes))
    _he_normal(model)
    return model


def resnet18(num_classes: int, image_shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
    """torchvision's ResNet-18, 11.7 M parameters."""
    return from_torchvision("resnet18", num_classes, image_shape, arguments)


def resnet50(num_classes: int, image_shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
    """torchvision's ResNet-50, 25.6 M parameters."""
    return from_torchvision("resnet50", num_classes, image_shape, arguments)


def resnet50d(num_classes: int, image_shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
    """ResNet-50-D: a stem of three 3x3 convolutions, averaging shortcuts (He et al. 2019, figure 2);
    25,576,264 parameters, as timm's model of this name."""
    model: Any = from_torchvision("resnet50", num_classes, image_shape, arguments)
    model.conv1 = nn.Sequential(
        _conv3(3, 32, 2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        _conv3(32, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        _conv3(32, 64),
    )
    _he_normal(model.conv1)
    for stage in (model.layer2, model.layer3, model.layer4):
        conv, norm = stage[0].downsample
        flat = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
        _he_normal(flat)
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        stage[0].downsample = nn.Sequential(pool, flat, norm)
    return model
