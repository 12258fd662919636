"""Models of torchvision, with random weights; nothing is downloaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from elastic_kfac.errors import ConfigError


def from_torchvision(
    name: str, num_classes: int, image_shape: tuple[int, ...], arguments: dict[str, Any]
) -> nn.Module:
    """A model of torchvision for images of 3 channels.

    Raises:
        ConfigError: If torchvision is not installed, or the images have other channels.
    """
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
