"""Models of torchvision and timm, with random weights; nothing is downloaded."""

from __future__ import annotations

import difflib
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
        raise _missing(name, "torchvision") from None
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **arguments
    )
    return model


def from_library(
    num_outputs: int, input_shape: tuple[int, ...], *, name: str, **arguments: Any
) -> nn.Module:
    """An image classifier `torchvision:NAME` or `timm:NAME`, with random weights.

    Args:
        num_outputs: Classes.
        input_shape: (channels, height, width).
        name: With its library.
        arguments: Of the library's factory, for example `img_size` of timm's transformers.

    Raises:
        ConfigError: If the library is not installed or has no such model, or the data are no images.
    """
    library, _, model_name = name.partition(":")
    if len(input_shape) != 3:
        raise ConfigError(
            f"model.name={name} needs images", given=f"samples of shape {input_shape}"
        )
    if library == "torchvision":
        known = _torchvision_classifiers(name)
    else:
        known = _timm_models(name)
    if model_name not in known:
        close = difflib.get_close_matches(model_name, known, n=1)
        raise ConfigError(
            f"{library} has no image classifier {model_name}",
            given=f"model.name={name}",
            change=f"did you mean {library}:{close[0]}?" if close else f"see the list of {library}",
        )
    if library == "torchvision":
        if model_name in ("googlenet", "inception_v3"):
            # Their auxiliary outputs are no tensor, which a loss could take.
            arguments = {"aux_logits": False, **arguments}
        return from_torchvision(model_name, num_outputs, input_shape, arguments)
    import timm

    options = {"num_classes": num_outputs, "in_chans": input_shape[0], **arguments}
    model: nn.Module = timm.create_model(model_name, **options)
    return model


def _torchvision_classifiers(name: str) -> list[str]:
    try:
        import torchvision
    except ImportError:
        raise _missing(name, "torchvision") from None
    listed: list[str] = torchvision.models.list_models(module=torchvision.models)
    return listed


def _timm_models(name: str) -> list[str]:
    try:
        import timm
    except ImportError:
        raise _missing(name, "timm") from None
    listed: list[str] = timm.list_models()
    return listed


def _missing(name: str, library: str) -> ConfigError:
    return ConfigError(
        f"model.name={name} needs {library}, which is not installed",
        change="pip install 'elastic-kfac[vision]'",
    )
