"""Batches as the model takes them: on its device, in its type, normalised."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elastic_kfac.data.dataset import Dataset
from elastic_kfac.data.stream import Batch


class Preprocessor:
    """Moves and normalises the batches of a dataset."""

    def __init__(self, dataset: Dataset, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._shape = dataset.image_shape
        self._normalization: tuple[Tensor, Tensor] | None = None
        if dataset.normalization is not None:
            mean, std = (
                value.to(device, dtype).view(1, -1, 1, 1) for value in dataset.normalization
            )
            self._normalization = (mean, std)

    def __call__(self, batch: Batch) -> Batch:
        """The good records of a batch."""
        images, labels, ids, weights = batch.images, batch.labels, batch.ids, batch.weights
        good = batch.good
        if len(good) < len(batch):
            kept = torch.from_numpy(good)
            images, labels, ids, weights = images[kept], labels[kept], ids[good], weights[kept]
        images = images.to(self._device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = self._scaled(images.to(self._dtype))
        labels = labels.to(self._device, non_blocking=True)
        return Batch(images.to(self._dtype), labels, ids, weights)

    def empty(self) -> Batch:
        """A batch of no samples with images of the right shape."""
        images = torch.zeros(0, *self._shape, dtype=self._dtype, device=self._device)
        labels = torch.zeros(0, dtype=torch.int64, device=self._device)
        return Batch(images, labels, np.zeros(0, np.uint64), torch.zeros(0))

    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """The inputs of pixel values 0 and 255 [channels, 1, 1]."""
        ends = torch.tensor([0.0, 255.0], dtype=self._dtype, device=self._device)
        low, high = self._scaled(ends.view(2, 1, 1, 1).repeat(1, self._shape[0], 1, 1))
        return low, high

    def _scaled(self, images: Tensor) -> Tensor:
        images = images.div_(255)
        if self._normalization is not None:
            mean, std = self._normalization
            images = images.sub_(mean).div_(std)
        return images
