"""Mixup, running mixup and random erasing, with randomness per sample.

Every draw is a function of (seed, epoch, sample id): a sample gets the same λ and the same erased box
in an epoch on every rank and after every resize. Only the partner in mixup is the last batch of this
rank; that buffer never leaves the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.data.order import stream_key, uniforms
from elastic_kfac.errors import ConfigError

Ids = npt.NDArray[np.integer]

# Purposes of counter-based draws; below 5 belong to the data room, 7 to random starts of attacks.
MIXUP: Final = 5
ERASING: Final = 6

_BETA_ATTEMPTS: Final = 64
_MAX_ALPHA: Final = 1.0


def mixing_weights(
    alpha: float, *, seed: int, epoch: int, ids: Ids, fold: bool = True
) -> npt.NDArray[np.float64]:
    """λ ~ Beta(α, α) for each sample [n]; `fold` returns max(λ, 1 − λ), as chainerkfac does.

    Jöhnk's rejection method on the logarithms of uniform numbers; it needs at most two attempts on
    average for α ≤ 1.

    Raises:
        ConfigError: If α is not in (0, 1], the range of the recipes.
    """
    check_alpha(alpha)
    draws = uniforms(stream_key(seed, epoch, MIXUP), ids, 2 * _BETA_ATTEMPTS)
    # 1 − u is in (0, 1]: its logarithm is finite.
    logs = np.log1p(-draws) / alpha
    first, second = logs[:, :_BETA_ATTEMPTS], logs[:, _BETA_ATTEMPTS:]
    accepted = np.logaddexp(first, second) <= 0
    rows, chosen = np.arange(len(logs)), accepted.argmax(axis=1)
    weights = 1 / (1 + np.exp(np.minimum(second - first, 700.0)[rows, chosen]))
    return np.maximum(weights, 1 - weights) if fold else weights


def check_alpha(alpha: float) -> None:
    """Raises a ConfigError for an α outside (0, 1]."""
    if not 0 < alpha <= _MAX_ALPHA:
        raise ConfigError("mixup alpha out of range", given=alpha, allowed="0 < alpha <= 1")


class Mixup:
    """Mixes each batch with the previous one on this rank.

    `running` mixes with the last MIXED batch, x̃_t = λx_t + (1 − λ)x̃_{t−1} (Osawa et al. 2019), so a batch
    mixes with all earlier ones; otherwise the partner is the last plain batch. Labels become
    probabilities [n, classes] and are mixed alike. The first batch is unmixed, and so is a batch
    whose size does not fit the buffer.

    Args:
        alpha: α of the Beta distribution.
        running: Mix with the last mixed batch instead of the last plain one.
        on_smaller: For a batch smaller than the buffer, `reset` leaves it unmixed and `subsample` uses
            the first part of the buffer.

    Raises:
        ConfigError: If α or `on_smaller` is not allowed.
    """

    def __init__(
        self,
        alpha: float,
        num_classes: int,
        *,
        seed: int,
        running: bool = True,
        on_smaller: Literal["reset", "subsample"] = "reset",
    ) -> None:
        check_alpha(alpha)
        if on_smaller not in ("reset", "subsample"):
            raise ConfigError(
                "unknown rule for a smaller batch", given=on_smaller, allowed="reset, subsample"
            )
        self.alpha = alpha
        self.num_classes = num_classes
        self.seed = seed
        self.running = running
        self.on_smaller = on_smaller
        self._buffer: tuple[Tensor, Tensor] | None = None

    def drop(self) -> None:
        """Clears the buffer, after a resize or a restore: the next batch is unmixed."""
        self._buffer = None

    def __call__(
        self, images: Tensor, labels: Tensor, ids: Ids, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Mixed images [n, ...] and label probabilities [n, classes].

        Args:
            images: [n, ...], floating point.
            labels: [n] classes, or [n, classes] probabilities.
            ids: Sample ids [n].
        """
        targets = labels.to(images.dtype)
        if labels.dim() == 1:
            targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        partner = self._partner(images)
        mixed = (images, targets)
        if partner is not None:
            weights = mixing_weights(self.alpha, seed=self.seed, epoch=epoch, ids=ids)
            share = torch.from_numpy(weights).to(images)
            mixed = (_blend(images, partner[0], share), _blend(targets, partner[1], share))
        kept = mixed if self.running else (images, targets)
        # A copy: the caller may change the returned tensors in place.
        self._buffer = (kept[0].detach().clone(), kept[1].detach().clone())
        return mixed

    def _partner(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._buffer is None or self._buffer[0].shape[1:] != images.shape[1:]:
            return None
        old, targets = self._buffer
        if len(old) == len(images):
            return old, targets
        if len(old) > len(images) and self.on_smaller == "subsample":
            return old[: len(images)], targets[: len(images)]
        return None


def _blend(new: Tensor, old: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, *[1] * (new.dim() - 1))
    return share * new + (1 - share) * old


@dataclass(frozen=True)
class RandomErasing:
    """Erases a box of some images (Zhong et al. 2020), after mixup.

    The erased share of the image is uniform in `area`; height / width is uniform in `aspect`, inverted
    half of the time.
    """

    seed: int
    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.25)
    aspect: tuple[float, float] = (0.3, 1.0)
    fill: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(
                "erasing probability out of range", given=self.probability, allowed="0 to 1"
            )
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError("erased area out of range", given=self.area, allowed="within (0, 1]")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ConfigError("erased aspect out of range", given=self.aspect, allowed="above 0")

    def boxes(self, height: int, width: int, ids: Ids, epoch: int) -> npt.NDArray[np.int64]:
        """(top, left, bottom, right) for each sample [n, 4]; an empty box erases nothing."""
        draws = uniforms(stream_key(self.seed, epoch, ERASING), ids, 6)
        area = (self.area[0] + (self.area[1] - self.area[0]) * draws[:, 1]) * height * width
        ratio = self.aspect[0] + (self.aspect[1] - self.aspect[0]) * draws[:, 2]
        ratio = np.where(draws[:, 3] < 0.5, ratio, 1 / ratio)
        rows = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
        columns = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
        top = np.floor(draws[:, 4] * (height - rows + 1))
        left = np.floor(draws[:, 5] * (width - columns + 1))
        boxes = np.stack([top, left, top + rows, left + columns], axis=1).astype(np.int64)
        boxes[draws[:, 0] >= self.probability] = 0
        return boxes

    def __call__(self, images: Tensor, ids: Ids, epoch: int) -> Tensor:
        """A copy of `images` [n, channels, height, width] with boxes erased."""
        height, width = images.shape[-2:]
        limits = torch.from_numpy(self.boxes(height, width, ids, epoch)).to(images.device)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        in_rows = (rows >= limits[:, :1]) & (rows < limits[:, 2:3])
        in_columns = (columns >= limits[:, 1:2]) & (columns < limits[:, 3:4])
        mask = in_rows[:, None, :, None] & in_columns[:, None, None, :]
        return images.masked_fill(mask, self.fill)
