"""Batches as the model and the loss take them: on their device, in their type, normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from elastic_kfac.data.batch import PADDED_TARGET, Batch, Fields, Value, example, mask_name
from elastic_kfac.data.columns import Column, Role

Prepare = Callable[[Batch, int], Batch]
"""What a task makes of a batch of an epoch."""


def _trimmed(value: Value, columns: Iterable[Column]) -> Value:
    """Padded columns without what is padding in every sample: not in the reader, whose batches are cut
    further, and the shapes of a pass must depend on its own samples alone."""
    for column in columns:
        if not column.is_padded:
            continue
        if not isinstance(value, Fields):
            return _cut(value, value != PADDED_TARGET)
        name, mask = column.name, mask_name(column.name)
        real = value[mask] if mask in value else value[name] != PADDED_TARGET
        own = {each: _cut(value[each], real) for each in (name, mask) if each in value}
        value = Fields({**{each: value[each] for each in value}, **own})
    return value


def _cut(tensor: Tensor, real: Tensor) -> Tensor:
    return tensor[:, : max(1, int(real.any(dim=0).sum()))]


class Form(Protocol):
    """What samples look like; every dataset is one."""

    @property
    def columns(self) -> tuple[Column, ...]: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def normalization(self) -> tuple[Tensor, Tensor] | None: ...


class Preprocessor:
    """Moves, normalises and prepares the batches of a dataset."""

    def __init__(
        self,
        dataset: Form,
        dtype: torch.dtype,
        device: torch.device,
        prepare: Prepare = lambda batch, epoch: batch,
    ) -> None:
        self._dtype, self._device, self._prepare = dtype, device, prepare
        self._columns = {
            role: {column.name: column for column in dataset.columns if column.role == role}
            for role in ("input", "target")
        }
        self._no_samples = example(dataset.columns, dataset.input_shape, 0)
        self._channels = dataset.input_shape[0] if dataset.input_shape else 1
        self._normalization: tuple[Tensor, Tensor] | None = None
        if dataset.normalization is not None:
            mean, std = (
                value.to(device, dtype).view(1, -1, 1, 1) for value in dataset.normalization
            )
            self._normalization = (mean, std)

    def __call__(self, batch: Batch, epoch: int = 0) -> Batch:
        """The good records of a batch; `epoch` is part of the randomness of a task."""
        inputs, targets, ids, weights = batch.inputs, batch.targets, batch.ids, batch.weights
        good = batch.good
        if len(good) < len(batch):
            kept = torch.from_numpy(good)
            inputs, targets, ids, weights = inputs[kept], targets[kept], ids[good], weights[kept]
        inputs = self._converted(inputs, "input")
        targets = self._converted(targets, "target") if self._columns["target"] else inputs
        return self._prepare(Batch(inputs, targets, ids, weights), epoch)

    def empty(self) -> Batch:
        """A batch of no samples in the right shapes."""
        return self(self._no_samples)

    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """The inputs of pixel values 0 and 255 [channels, 1, 1]."""
        ends = torch.tensor([0.0, 255.0], dtype=self._dtype, device=self._device)
        low, high = self._scaled(ends.view(2, 1, 1, 1).repeat(1, self._channels, 1, 1))
        return low, high

    def _converted(self, value: Value, role: Role) -> Value:
        columns = self._columns[role]
        value = _trimmed(value, columns.values())
        if not isinstance(value, Fields):
            return self._tensor(value, next(iter(columns.values())))
        return Fields({name: self._tensor(value[name], columns.get(name)) for name in value})

    def _tensor(self, tensor: Tensor, column: Column | None) -> Tensor:
        """One column on the device; None is the mask of a padded one."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # or the host would wait for the copy
        tensor = tensor.to(self._device, non_blocking=True)
        if column is None or column.kind in ("class", "mask", "tokens"):
            return tensor
        if column.kind == "image":
            if tensor.dtype == torch.uint8:
                tensor = self._scaled(tensor.to(self._dtype))
            return tensor.to(self._dtype)
        if not column.is_float and column.kind == "tensor":
            return tensor.long()
        if column.role == "input" and column.mean:
            mean = torch.tensor(column.mean, dtype=torch.float64, device=self._device)
            # A constant feature has std 0; dividing by 1 keeps it finite.
            std = torch.tensor([s or 1.0 for s in column.std], dtype=torch.float64).to(mean)
            tensor = (tensor.double() - mean) / std
        return tensor.to(self._dtype)

    def _scaled(self, images: Tensor) -> Tensor:
        images = images.div_(255)
        if self._normalization is not None:
            mean, std = self._normalization
            images = images.sub_(mean).div_(std)
        return images
