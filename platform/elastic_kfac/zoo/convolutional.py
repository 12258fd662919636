"""Networks of plain convolutions and linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError
from elastic_kfac.zoo.torchvision_models import from_torchvision


def small_cnn(num_classes: int, image_shape: tuple[int, int, int], *, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions without normalisation and one linear layer; 8x8 to 64x64 pixels."""
    channels, height, side = image_shape
    layers: list[nn.Module] = []
    sizes = (width, 2 * width, 2 * width)
    for index, size in enumerate(sizes):
        layers += [nn.Conv2d(channels, size, 3, padding=1), nn.ReLU()]
        channels = size
        if index < 2:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            height, side = (height + 1) // 2, (side + 1) // 2
    while height * side > 64:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        height, side = (height + 1) // 2, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * side, num_classes))


def mlp(
    num_outputs: int,
    input_shape: tuple[int, ...],
    *,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """Fully connected layers on flattened inputs; `activation` is relu or tanh."""
    features = math.prod(input_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        layers.append(nn.Linear(features, size))
        if batch_norm:
            layers.append(nn.BatchNorm1d(size))
        layers.append(nn.Tanh() if activation == "tanh" else nn.ReLU())
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        features = size
    return nn.Sequential(*layers, nn.Linear(features, num_outputs))


def lenet(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Two 5x5 convolutions and three linear layers (LeCun et al. 1998), for 16x16 pixels and up."""
    channels, height, width = _at_least(16, "lenet", image_shape)
    rows, columns = ((size // 2 - 4) // 2 for size in (height, width))
    convolutions = _convolutions(channels, nn.ReLU, (6, 5, 1, 2), 2, (16, 5, 1, 0), 2)
    return nn.Sequential(*convolutions, *_head(16 * rows * columns, (120, 84), num_classes))


def c1(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """C1 of Yao et al. (2018, arXiv:1810.01021), a small AlexNet; 1,756,682 parameters for CIFAR-10."""
    channels, height, width = image_shape
    rows, columns = ((size + 3) // 4 for size in (height, width))
    layers: list[nn.Module] = []
    for size in (channels, 64):
        layers += [nn.Conv2d(size, 64, 5, padding=2), nn.ReLU(), nn.BatchNorm2d(64)]
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers, *_head(64 * rows * columns, (384, 192), num_classes))


def c2(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """C2 of Yao et al. (2018, arXiv:1810.01021); 1,148,746 parameters for CIFAR-10."""
    channels, height, width = _at_least(16, "c2", image_shape)
    rows, columns = (((size - 4) // 2 - 4) // 2 for size in (height, width))
    layers: list[nn.Module] = []
    for size in (64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, size, 3), nn.ReLU(), nn.BatchNorm2d(size)]
            channels = size
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_head(128 * rows * columns, (256, 256), num_classes))


def _convolutions(
    channels: int, activation: type[nn.Module], *layers: tuple[int, int, int, int] | int
) -> list[nn.Module]:
    """Convolutions (channels, kernel, stride, padding) with activation, and max pooling by a factor."""
    modules: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, int):
            modules.append(nn.MaxPool2d(layer))
        else:
            modules += [nn.Conv2d(channels, *layer), activation()]
            channels = layer[0]
    return modules


def _head(
    features: int,
    hidden: tuple[int, ...],
    num_classes: int,
    activation: type[nn.Module] = nn.ReLU,
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        layers += [nn.Linear(features, size), activation()]
        features = size
    return [*layers, nn.Linear(features, num_classes)]


def distnewton_cnn(
    num_classes: int, image_shape: tuple[int, int, int], *, activation: str = "tanh"
) -> nn.Module:
    """Five layers and about 16,000 parameters (MNIST 15,594, CIFAR-10 15,994), `tanh` or `relu`.

    DistNewton's experiment gives the number of layers and parameters; kernels and widths are ours.
    """
    if activation not in ("tanh", "relu"):
        raise ConfigError("distnewton_cnn: activation", given=activation, allowed="tanh, relu")
    act = nn.Tanh if activation == "tanh" else nn.ReLU
    channels = image_shape[0]
    layers = _convolutions(channels, act, (8, 5, 1, 2), 2, (16, 3, 1, 1), 2, (32, 3, 1, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), *_head(288, (32,), num_classes, act))


def alexnet(num_classes: int, image_shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
    """torchvision's AlexNet, 61.1 M parameters (Krizhevsky 2014); below 63 pixels its five convolutions
    with a stem of stride 4 and one linear layer, 2.5 M (32x32, as on SVHN and CIFAR)."""
    if min(image_shape[1:]) >= 63:
        return from_torchvision("alexnet", num_classes, image_shape, arguments)
    channels, height, width = _at_least(29, "alexnet", image_shape)
    rows, columns = (((size - 1) // 4 + 1) // 8 for size in (height, width))
    convolutions = _convolutions(
        channels,
        nn.ReLU,
        *((64, 11, 4, 5), 2, (192, 5, 1, 2), 2),
        *((384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), 2),
    )
    return nn.Sequential(*convolutions, *_head(256 * rows * columns, (), num_classes))


def googlenet(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's GoogLeNet without auxiliary classifiers, 6.6 M parameters (Szegedy et al. 2015)."""
    arguments = {"aux_logits": False, "init_weights": False}
    return from_torchvision("googlenet", num_classes, image_shape, arguments)


class _SqueezeNextBlock(nn.Module):
    """Two squeezes, a separable 3x3 convolution, and an expansion (Gholami et al. 2018, figure 1)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # Blocks that change the resolution do not squeeze; those that only narrow squeeze twice as much.
        squeezed = inputs if stride == 2 else inputs // (4 if inputs > outputs else 2)
        self.body = nn.Sequential(
            _unit(inputs, squeezed, (1, 1), stride),
            _unit(squeezed, squeezed // 2, (1, 1)),
            _unit(squeezed // 2, squeezed, (3, 1)),
            _unit(squeezed, squeezed, (1, 3)),
            _unit(squeezed, outputs, (1, 1)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _unit(inputs, outputs, (1, 1), stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _unit(inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def squeezenext(
    num_classes: int, image_shape: tuple[int, int, int], *, width: float = 1.0
) -> nn.Module:
    """1.0-SqNxt-23, 717,280 parameters for ImageNet (Gholami et al. 2018, and their Caffe definition);
    images below 64 pixels get a 3x3 stem of stride 1 in place of 7x7, stride 2, and pooling."""
    inputs = round(64 * width)
    if min(image_shape[1:]) >= 64:
        conv = nn.Conv2d(image_shape[0], inputs, 7, stride=2, bias=False)
        stem = [conv, nn.BatchNorm2d(inputs), nn.ReLU(), nn.MaxPool2d(3, stride=2, ceil_mode=True)]
    else:
        stem = [_unit(image_shape[0], inputs, (3, 3))]
    blocks: list[nn.Module] = []
    for stage, count in enumerate((6, 6, 8, 1)):
        for block in range(count):
            outputs = round(32 * 2**stage * width)
            blocks.append(_SqueezeNextBlock(inputs, outputs, 2 if stage and block == 0 else 1))
            inputs = outputs
    final = round(128 * width)
    head = [_unit(inputs, final, (1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(final, num_classes, bias=False))


def _at_least(pixels: int, name: str, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if min(image_shape[1:]) < pixels:
        raise ConfigError(
            f"{name} needs images of {pixels}x{pixels} pixels or more", given=image_shape
        )
    return image_shape
