"""Models by name, and their initial weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from elastic_kfac.config import ModelConfig
from elastic_kfac.data.batch import Fields, Value
from elastic_kfac.data.columns import Column
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.imports import is_reference, load_reference, made_by
from elastic_kfac.zoo import MODELS
from elastic_kfac.zoo.torchvision_models import from_library

ImageShape = tuple[int, int, int]
"""(channels, height, width)."""


def create_model(
    name: str,
    num_outputs: int,
    input_shape: tuple[int, ...],
    *,
    columns: Sequence[Column] = (),
    **arguments: Any,
) -> nn.Module:
    """Builds a zoo model, or a user's model from `package.module:factory`.

    A factory is called as `factory(num_outputs, input_shape, **arguments)`; one that has a parameter
    `columns` also gets the columns of the data by name.

    Raises:
        ConfigError: If the name is unknown, the arguments do not fit, or the factory returns no module.
    """
    if name.startswith(("torchvision:", "timm:")):
        arguments = {"name": name, **arguments}
        factory = from_library
    elif is_reference(name):
        factory = load_reference(name, key="model.name")
    else:
        if name not in MODELS:
            raise ConfigError(
                "unknown model.name",
                given=name,
                allowed=", ".join(sorted(MODELS))
                + ", torchvision:NAME, timm:NAME or package.module:factory",
            )
        factory = MODELS[name].factory
    if "columns" in _parameters(factory):
        arguments = {"columns": {column.name: column for column in columns}, **arguments}
    model = made_by(
        *(factory, num_outputs, input_shape),
        key="model.name",
        given=name,
        options=arguments,
        options_key="model.arguments",
    )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model.name: the factory returned no torch.nn.Module",
            given=f"{name} -> {type(model).__name__}",
        )
    return model


def _parameters(factory: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):  # Callables that are written in C may tell nothing.
        return ()


def build_model(
    config: ModelConfig,
    *,
    num_outputs: int,
    input_shape: tuple[int, ...],
    columns: Sequence[Column] = (),
    seed: int,
) -> nn.Module:
    """The configured model with its initial weights, created on the CPU from `seed` alone.

    The global random state is unchanged on return.

    Raises:
        ConfigError: If the model or its initial weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(
            config.name, num_outputs, input_shape, columns=columns, **config.arguments
        )
    if config.initial_weights is not None:
        load_weights(model, config.initial_weights)
    return model


def call_model(model: nn.Module, inputs: Value) -> Any:
    """The outputs for inputs of one tensor, or of several by name: `model(**inputs)`."""
    return model(**inputs) if isinstance(inputs, Fields) else model(inputs)


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
