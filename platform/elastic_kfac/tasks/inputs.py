"""Samples as the model sees them: on the device, in its type, normalised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic_kfac.data.feeds import Feed, Samples


@dataclass(frozen=True)
class Inputs:
    """The good samples of what was read."""

    images: Tensor
    """[n, channels, height, width]."""
    labels: Tensor
    """[n] classes, or [n, classes] probabilities once they are mixed."""
    ids: npt.NDArray[np.uint64]
    """[n]."""
    places: npt.NDArray[np.int64]
    """[n]: where they stood in what was read."""


class InputMaker:
    """Turns what a feed returns into inputs."""

    def __init__(self, feed: Feed, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._shape = feed.image_shape
        self._normalization: tuple[Tensor, Tensor] | None = None
        if feed.normalization is not None:
            mean, std = (value.to(device, dtype).view(1, -1, 1, 1) for value in feed.normalization)
            self._normalization = (mean, std)

    def __call__(self, samples: Samples) -> Inputs:
        """A bad record keeps its place in the order but is no input."""
        images, labels, ids = samples.images, samples.labels, samples.ids
        places = np.arange(len(ids))
        good = samples.weights > 0
        if not bool(good.all()):
            images, labels = images[good], labels[good]
            ids, places = ids[good.numpy()], places[good.numpy()]
        images = images.to(self._device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = self._scaled(images.to(self._dtype))
        return Inputs(
            images.to(self._dtype), labels.to(self._device, non_blocking=True), ids, places
        )

    def none(self) -> Inputs:
        """No inputs, in the shape of some."""
        images = torch.zeros(0, *self._shape, dtype=self._dtype, device=self._device)
        labels = torch.zeros(0, dtype=torch.int64, device=self._device)
        return Inputs(images, labels, np.zeros(0, np.uint64), np.zeros(0, np.int64))

    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """The inputs that pixels 0 and 255 become [channels, 1, 1]."""
        ends = torch.tensor([0.0, 255.0], dtype=self._dtype, device=self._device)
        low, high = self._scaled(ends.view(2, 1, 1, 1).repeat(1, self._shape[0], 1, 1))
        return low, high

    def _scaled(self, images: Tensor) -> Tensor:
        images = images.div_(255)
        if self._normalization is not None:
            mean, std = self._normalization
            images = images.sub_(mean).div_(std)
        return images
