"""Training-time augmentation whose randomness is a function of (seed, epoch, sample id).

A sample is augmented the same way in an epoch at any world size, batch and position. Pixels stay uint8;
normalisation happens on the device with `SampleStream.normalization`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.order import AUGMENTATION, stream_key, uniforms
from elastic_kfac.errors import DataError

AUGMENTATIONS: Final = ("none", "crop_flip", "random_resized_crop")

# Share of the short side that evaluation keeps (224 of 256).
CENTER_SHARE: Final = 0.875
_CROP_ATTEMPTS: Final = 10


def augmentation_key(seed: int, epoch: int) -> int:
    """The key of all draws of an epoch."""
    return stream_key(seed, epoch, AUGMENTATION)


def check_augmentation(name: str) -> None:
    """Raises a DataError for an unknown augmentation."""
    if name not in AUGMENTATIONS:
        raise DataError("unknown augmentation", given=name, allowed=", ".join(AUGMENTATIONS))


@dataclass(frozen=True)
class Shifts:
    """Where `crop_flip` moves each of n images."""

    down: list[int]
    across: list[int]
    flip: list[bool]
    """Mirrored left and right after the shift."""

    @classmethod
    def draw(cls, height: int, width: int, key: int, ids: NDArray[np.integer]) -> Shifts:
        """Random shifts by up to an eighth of the size, and a flip half of the time."""
        border = max(1, max(height, width) // 8)
        draws = uniforms(key, ids, 3)
        return cls(
            ((draws[:, 0] * (2 * border + 1)).astype(np.int64) - border).tolist(),
            ((draws[:, 1] * (2 * border + 1)).astype(np.int64) - border).tolist(),
            (draws[:, 2] < 0.5).tolist(),
        )

    def apply(self, images: NDArray[np.uint8], fill: int = 0) -> NDArray[np.uint8]:
        """Moved images [n, channels, height, width]; `fill` is the border."""
        height, width = images.shape[2:]
        out = np.full_like(images, fill)  # Keeps the memory layout, channels first or last.
        for i in range(len(images)):
            rows, source_rows = _overlap(self.down[i], height)
            columns, source_columns = _overlap(self.across[i], width)
            target = out[i, :, :, ::-1] if self.flip[i] else out[i]
            target[:, rows, columns] = images[i, :, source_rows, source_columns]
        return out


def crop_flip(images: NDArray[np.uint8], key: int, ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Random shift within a zero border of an eighth of the size, then a flip half of the time.

    Args:
        images: [n, channels, height, width].
        key: From `augmentation_key`.
        ids: Sample ids [n].
    """
    return Shifts.draw(images.shape[2], images.shape[3], key, ids).apply(images)


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """(target, source) of a window shifted by `shift` over `size` pixels."""
    return slice(max(-shift, 0), size - max(shift, 0)), slice(max(shift, 0), size - max(-shift, 0))


def resized_crop_boxes(
    sizes: NDArray[np.int64],
    key: int,
    ids: NDArray[np.integer],
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes of the random resized crop (Szegedy et al. 2015, section 6) and whether to flip.

    The first of ten draws that fits; otherwise the largest centred box with an allowed aspect.

    Args:
        sizes: (height, width) per sample, [n, 2].
        key: From `augmentation_key`.
        ids: Sample ids [n].
        area: Range of the box's share of the image, uniform.
        aspect: Range of width / height, uniform in the logarithm.

    Returns:
        Boxes (left, top, right, bottom), [n, 4], and flips, [n].
    """
    draws = uniforms(key, ids, 2 * _CROP_ATTEMPTS + 3)
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    shares = area[0] + (area[1] - area[0]) * draws[:, :_CROP_ATTEMPTS]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratios = np.exp(low + (high - low) * draws[:, _CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS])
    target = shares * (height * width)[:, None]
    widths = np.rint(np.sqrt(target * ratios))
    heights = np.rint(np.sqrt(target / ratios))
    fits = (widths <= width[:, None]) & (heights <= height[:, None])
    fits &= (widths >= 1) & (heights >= 1)
    chosen = fits.argmax(axis=1)
    rows = np.arange(len(sizes))
    box_width, box_height = widths[rows, chosen], heights[rows, chosen]
    left = np.floor(draws[:, -3] * (width - box_width + 1))
    top = np.floor(draws[:, -2] * (height - box_height + 1))
    none = ~fits.any(axis=1)
    if none.any():
        ratio = np.clip(width / height, aspect[0], aspect[1])
        fallback_width = np.minimum(width, np.maximum(1, np.rint(height * ratio)))
        fallback_height = np.minimum(height, np.maximum(1, np.rint(width / ratio)))
        box_width = np.where(none, fallback_width, box_width)
        box_height = np.where(none, fallback_height, box_height)
        left = np.where(none, np.floor((width - box_width) / 2), left)
        top = np.where(none, np.floor((height - box_height) / 2), top)
    boxes = np.stack([left, top, left + box_width, top + box_height], axis=1)
    return boxes, draws[:, -1] < 0.5


def center_boxes(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The centred square of 7/8 of the short side, (left, top, right, bottom), [n, 4]."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    side = np.minimum(height, width) * CENTER_SHARE
    left, top = (width - side) / 2, (height - side) / 2
    return np.stack([left, top, left + side, top + side], axis=1)
