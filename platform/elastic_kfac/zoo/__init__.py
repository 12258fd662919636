"""The built-in models by name, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from elastic_kfac.zoo import convolutional, dense, residual, transformers


class Model(NamedTuple):
    """A factory, called as `factory(num_outputs, input_shape, **arguments)`, and its published use."""

    factory: Callable[..., nn.Module]
    num_outputs: int
    """Classes, or the vocabulary."""
    input_shape: tuple[int, ...]
    """Of one sample."""
    arguments: dict[str, Any] = {}  # noqa: RUF012


def _listed() -> Iterator[Model]:
    digits, cifar, imagenet = (10, (1, 8, 8)), (10, (3, 32, 32)), (1000, (3, 224, 224))
    plain, coco = convolutional, (90, (3, 320, 320))
    yield from (Model(factory, *digits) for factory in (plain.small_cnn, plain.mlp))
    yield Model(plain.lenet, 10, (1, 28, 28))
    yield from (Model(factory, *cifar) for factory in (plain.c1, plain.c2, plain.distnewton_cnn))
    small = (residual.resnet20, residual.resnet32, residual.wide_resnet)
    yield from (Model(factory, *cifar) for factory in small)
    yield from (Model(factory, *imagenet) for factory in (residual.resnet18, residual.resnet50))
    yield from (Model(factory, *imagenet) for factory in (residual.resnet50d, plain.alexnet))
    yield from (Model(factory, *imagenet) for factory in (plain.googlenet, plain.squeezenext))
    yield Model(transformers.vit, *imagenet)
    yield Model(transformers.gpt, 50_257, (1024,))
    yield Model(transformers.bert, 30_522, (512,))
    yield Model(transformers.bert_classifier, 2, (512,), {"vocabulary": 30_522})
    yield Model(dense.unet, 2, (1, 572, 572))
    yield Model(dense.anchor_detector, 10, (1, 48, 48))
    yield from (Model(factory, *coco) for factory in (*dense.ONE_STAGE, *dense.TWO_STAGE))


MODELS = {model.factory.__name__: model for model in _listed()}
"""Every built-in model."""
