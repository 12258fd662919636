"""Samples from the shards to the loss: one type for any number of columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic_kfac.data.columns import BOX, PADDING_CLASS, Column


class Fields:
    """Tensors of the same samples by name, samples first.

    `fields["name"]` is a tensor; `fields[a:b]` are some of the samples; `len` counts samples.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Tensor) -> Fields: ...
    def __getitem__(self, key: str | slice | Tensor) -> Tensor | Fields:
        if isinstance(key, str):
            return self._tensors[key]
        return self.map(lambda tensor: tensor[key])

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def keys(self) -> Iterable[str]:
        """Names; with `fields[name]` a mapping for `model(**fields)`."""
        return self._tensors.keys()

    def map(self, function: Callable[[Tensor], Tensor]) -> Fields:
        """The result of a function of every tensor."""
        return Fields({name: function(tensor) for name, tensor in self._tensors.items()})

    def clone(self) -> Fields:
        return self.map(torch.clone)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).device


Value = Any
"""A tensor [n, ...], or `Fields` where samples have several."""


def tensors_of(value: Value) -> list[Tensor]:
    """The tensors of a value, or of a model's outputs by name."""
    if isinstance(value, Fields | dict):
        return [value[name] for name in value]
    return [value]


def twice(value: Value, count: int) -> Value:
    """The same `count` samples once more behind themselves; tensors of other lengths belong to none."""
    return mapped(value, lambda t: torch.cat([t, t]) if len(t) == count else t)


def one_of(value: Value, index: int, count: int) -> Value:
    """One of `count` samples; tensors of other lengths belong to all."""
    return mapped(value, lambda t: t[index : index + 1] if len(t) == count else t)


def real_positions(inputs: Value) -> Tensor | None:
    """The mask [n, L] of inputs with one padded column; None for others."""
    if not isinstance(inputs, Fields):
        return None
    masks = [name for name in inputs if name.endswith(mask_name(""))]
    return inputs[masks[0]] if len(masks) == 1 else None


def mapped(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    """The result of a function of every tensor of a value, or of a model's outputs by name."""
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return value.map(function) if isinstance(value, Fields) else function(value)


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples in the order of their positions, from the shards to the loss.

    One input column is its tensor; several columns, and padded tokens with their mask, are `Fields`.
    The same holds for targets.
    """

    inputs: Value
    """An image: [n, channels, height, width], uint8 as read or floating point; encoded images come in
    channels_last memory. Other kinds of columns: see `data.columns`."""
    targets: Value
    """Classes: [n], int64; [n, classes] probabilities under mixup. The inputs where a set has no
    targets."""
    ids: NDArray[np.uint64]
    """[n]: global sample ids, for `id_hash`."""
    weights: Tensor
    """float32 [n]: 1, or 0 for a bad record that was skipped and keeps its position."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, where: slice) -> Batch:
        """Views of some of the samples."""
        return Batch(self.inputs[where], self.targets[where], self.ids[where], self.weights[where])

    @property
    def good(self) -> NDArray[np.int64]:
        """Indices of the records that are not bad."""
        return np.flatnonzero(self.weights.numpy() > 0)


PADDED_TARGET: Final = -100
"""Of tokens in targets, where `cross_entropy` ignores it."""


def mask_name(name: str) -> str:
    """Name of the mask of a padded column."""
    return f"{name}_mask"


def collate(
    columns: Sequence[Column],
    values: Mapping[str, NDArray[Any]],
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
) -> Batch:
    """A batch of loaded values; padded tokens are -1 in them."""
    parts: dict[str, dict[str, Tensor]] = {"input": {}, "target": {}}
    for column in columns:
        part, tensor = parts[column.role], torch.from_numpy(values[column.name])
        if column.is_padded:
            real = tensor >= 0
            if column.role == "input":
                part[mask_name(column.name)] = real
            filling = 0 if column.role == "input" else PADDED_TARGET
            tensor = tensor.masked_fill(~real, filling)
        part[column.name] = tensor
    inputs = _value(parts["input"])
    targets = _value(parts["target"]) if parts["target"] else inputs
    return Batch(inputs, targets, ids.astype(np.uint64), torch.from_numpy(weights))


def _value(tensors: dict[str, Tensor]) -> Value:
    return next(iter(tensors.values())) if len(tensors) == 1 else Fields(tensors)


def outputs_for(columns: Sequence[Column]) -> int:
    """How many numbers a model puts out for each thing it predicts: classes, elements of a tensor, or
    tokens of the vocabulary. Without a target column it predicts the first input."""
    chosen = [column for column in columns if column.role == "target"] or columns
    column = next((column for column in chosen if column.class_names), chosen[0])
    if column.class_names:
        return column.num_classes
    return column.vocabulary if column.kind == "tokens" else math.prod(column.shape or ())


def example(
    columns: Sequence[Column], image_shape: tuple[int, ...], count: int, seed: int = 0
) -> Batch:
    """Random values in the form of a set's samples, for shapes and costs.

    Args:
        columns: Of the set.
        image_shape: (channels, height, width) of the image as delivered, where there is one.
        count: Samples; 0 gives an empty batch.
        seed: Of the values.
    """
    random = np.random.default_rng(seed)
    values: dict[str, NDArray[Any]] = {}
    for column in columns:
        values[column.name] = _random_values(column, image_shape, count, random)
    return collate(columns, values, np.arange(count), np.ones(count, dtype=np.float32))


def _random_values(
    column: Column, image_shape: tuple[int, ...], count: int, random: np.random.Generator
) -> NDArray[Any]:
    if column.kind == "image":
        return random.integers(0, 256, (count, *image_shape), dtype=np.uint8)
    if column.kind == "class":
        return random.integers(0, column.num_classes, count)
    if column.kind == "mask":
        return random.integers(0, column.num_classes, (count, *image_shape[1:]))
    if column.kind == "tokens":
        return random.integers(0, column.vocabulary, (count, column.longest))
    if column.kind == "boxes":
        height, width = image_shape[1:]
        boxes = np.full((count, column.longest, BOX), PADDING_CLASS, dtype=np.float32)
        boxes[:, :1] = (width / 4, height / 4, width / 2, height / 2, 0)
        return boxes
    values = random.standard_normal((count, *(column.shape or ()))) * 10
    if column.is_float:
        # Of a shape without data neither is known.
        scale, centre = (float(np.mean(x)) if len(x) else 0.0 for x in (column.std, column.mean))
        values = values / 10 * (scale or 1.0) + centre
    return values.astype(column.dtype)
