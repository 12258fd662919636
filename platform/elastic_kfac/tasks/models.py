"""The model zoo: small networks for tests and digits, the CIFAR and ImageNet residual networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.config import ModelConfig
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.imports import is_reference, load_reference

ImageShape = tuple[int, int, int]
"""(channels, height, width)."""


def small_cnn(num_classes: int, image_shape: ImageShape, *, width: int = 16) -> nn.Module:
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
    num_classes: int,
    image_shape: ImageShape,
    *,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """Fully connected layers on flattened images; `activation` is relu or tanh."""
    features = image_shape[0] * image_shape[1] * image_shape[2]
    layers: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        layers.append(nn.Linear(features, size))
        if batch_norm:
            layers.append(nn.BatchNorm1d(size))
        layers.append(nn.Tanh() if activation == "tanh" else nn.ReLU())
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        features = size
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def lenet(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """Two 5x5 convolutions and three linear layers (LeCun et al. 1998), for 16x16 pixels and up."""
    channels, height, width = image_shape
    if min(height, width) < 16:
        raise ConfigError("lenet needs images of 16x16 pixels or more", given=image_shape)
    rows, columns = ((size // 2 - 4) // 2 for size in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


def resnet20(num_classes: int, image_shape: ImageShape, *, width: int = 16) -> nn.Module:
    """The 20-layer CIFAR residual network."""
    return _CifarResNet(3, num_classes, image_shape[0], width)


def resnet32(num_classes: int, image_shape: ImageShape, *, width: int = 16) -> nn.Module:
    """The 32-layer CIFAR residual network."""
    return _CifarResNet(5, num_classes, image_shape[0], width)


def resnet18(num_classes: int, image_shape: ImageShape, **arguments: Any) -> nn.Module:
    """torchvision's ResNet-18 for 3-channel images."""
    return _torchvision("resnet18", num_classes, image_shape, arguments)


def resnet50(num_classes: int, image_shape: ImageShape, **arguments: Any) -> nn.Module:
    """torchvision's ResNet-50 for 3-channel images."""
    return _torchvision("resnet50", num_classes, image_shape, arguments)


def _torchvision(
    name: str, num_classes: int, image_shape: ImageShape, arguments: dict[str, Any]
) -> nn.Module:
    if image_shape[0] != 3:
        raise ConfigError(f"{name} needs images of 3 channels", given=image_shape)
    try:
        import torchvision
    except ImportError:
        raise ConfigError(f"model.name={name} needs torchvision", change="install it") from None
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **arguments
    )
    return model


def zoo() -> dict[str, Callable[..., nn.Module]]:
    """Every built-in model by name."""
    factories = (small_cnn, mlp, lenet, resnet20, resnet32, resnet18, resnet50)
    return {factory.__name__: factory for factory in factories}


def create_model(
    name: str, num_classes: int, image_shape: ImageShape, **arguments: Any
) -> nn.Module:
    """Builds a zoo model, or a user's model from `package.module:factory`.

    A factory is called as `factory(num_classes, image_shape, **arguments)`.

    Raises:
        ConfigError: If the name is unknown, the arguments do not fit, or the factory returns no module.
    """
    if is_reference(name):
        factory = load_reference(name, key="model.name")
    else:
        factories = zoo()
        if name not in factories:
            raise ConfigError(
                "unknown model.name",
                given=name,
                allowed=", ".join(sorted(factories)) + ", or package.module:factory",
            )
        factory = factories[name]
    try:
        model = factory(num_classes, image_shape, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"model.arguments do not fit: {error}", given=f"{name} with {arguments}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model.name: the factory returned no torch.nn.Module",
            given=f"{name} -> {type(model).__name__}",
        )
    return model


def build_model(
    config: ModelConfig, *, num_classes: int, image_shape: ImageShape, seed: int
) -> nn.Module:
    """The configured model with its initial weights, created on the CPU from `seed` alone.

    The global random state is unchanged on return.

    Raises:
        ConfigError: If the model or its initial weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(config.name, num_classes, image_shape, **config.arguments)
    if config.initial_weights is not None:
        load_weights(model, config.initial_weights)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode; on exit every module is back in its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a safetensors file as written by `elastic-kfac export`.

    Raises:
        ConfigError: If the file is missing, damaged, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read model.initial_weights: {error}", given=path) from None
    expected = model.state_dict()
    wrong = sorted(set(tensors) ^ set(expected)) or sorted(
        name for name, tensor in tensors.items() if tensor.shape != expected[name].shape
    )
    if wrong:
        raise ConfigError(
            f"model.initial_weights does not fit the model: {', '.join(wrong[:3])}",
            given=path,
            change="use the weights of the same architecture, classes and image shape",
        )
    model.load_state_dict(tensors)
