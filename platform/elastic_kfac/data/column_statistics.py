"""What `shards make` measures of a column: exact sums per shard that add up to the split's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.columns import BOX, IGNORED, Column

MOST_FEATURES: Final = 65_536
"""Longer vectors are normalised by one mean and deviation."""


class Measured:
    """Sums over the samples of one shard for one column; `record` is plain JSON."""

    def __init__(self, column: Column) -> None:
        self.column = column
        channels = 3
        if column.kind == "image" and column.encoding == "raw":
            assert column.shape is not None
            channels = column.shape[0]
        self.record: dict[str, Any] = {
            "count": 0,
            "sums": [0] * channels if column.kind == "image" else [],
            "squares": [0] * channels if column.kind == "image" else [],
            "smallest": [1 << 30] * 2,
            "largest": [0, 0],
            "shortest": 1 << 60,
            "longest": 0,
            "class_counts": [0] * column.num_classes,
        }

    def add(self, values: Any, rows: Sequence[int]) -> None:
        """Adds rows of a source's values; of images and masks see `add_pixels`."""
        column = self.column
        if column.kind == "class":
            self.count_classes(np.asarray(values)[list(rows)])
        elif column.kind in ("tokens", "boxes"):
            for row in rows:
                self._add_sequence(np.asarray(values[row]))
        elif column.kind == "image" and column.encoding == "raw":
            assert column.shape is not None
            channels, height, width = column.shape
            self.add_size(height, width)
            self.add_pixels(np.asarray(values).reshape(-1, channels, height * width), 1)
        elif column.kind == "mask" and column.encoding == "raw":
            assert column.shape is not None
            self.add_size(column.shape[0], column.shape[1])
            self.add_mask(np.asarray(values)[list(rows)])
        elif column.is_float:
            self._add_floats(np.asarray(values, dtype=np.float64)[list(rows)])

    def _add_sequence(self, values: NDArray[Any]) -> None:
        count = len(values)
        self.record["shortest"] = min(self.record["shortest"], count)
        self.record["longest"] = max(self.record["longest"], count)
        self.record["count"] += count
        if self.column.kind == "boxes" and count:
            self.count_classes(values.reshape(-1, BOX)[:, -1].astype(np.int64))

    def _add_floats(self, values: NDArray[np.float64]) -> None:
        wide = values.ndim == 2 and values.shape[1] <= MOST_FEATURES
        features = values if wide else values.reshape(-1, 1)
        self.record["count"] += len(features)
        for name, power in (("sums", features), ("squares", features**2)):
            total = np.asarray(self.record[name] or np.zeros(features.shape[1]))
            self.record[name] = (total + power.sum(axis=0)).tolist()

    def count_classes(self, labels: NDArray[np.integer]) -> None:
        """Adds labels to the counts of classes."""
        known = self.record["class_counts"]
        found = np.bincount(labels.reshape(-1), minlength=len(known))
        self.record["class_counts"] = (np.asarray(known) + found).tolist()

    def add_mask(self, pixels: NDArray[np.uint8]) -> None:
        """Counts the pixels of each class."""
        self.count_classes(pixels[pixels != IGNORED].astype(np.int64))

    def add_pixels(self, pixels: NDArray[np.uint8], channel_axis: int) -> None:
        """Adds pixels to the integer sums per channel."""
        record = self.record
        counts = [
            np.bincount(np.take(pixels, c, axis=channel_axis).ravel(), minlength=256)
            for c in range(len(record["sums"]))
        ]
        values = np.arange(256, dtype=np.int64)
        for channel, count in enumerate(counts):
            record["sums"][channel] += int(count @ values)
            record["squares"][channel] += int(count @ values**2)
        record["count"] += int(counts[0].sum())

    def add_size(self, height: int, width: int) -> None:
        """Adds the size of an image or mask."""
        small, large = self.record["smallest"], self.record["largest"]
        self.record["smallest"] = [min(small[0], height), min(small[1], width)]
        self.record["largest"] = [max(large[0], height), max(large[1], width)]


def summarised(column: Column, records: Sequence[dict[str, Any]]) -> Column:
    """The column with the measures of all shards of a split."""
    changes: dict[str, Any] = {}
    if column.num_classes:
        counts = np.sum([record["class_counts"] for record in records], axis=0)
        changes["class_counts"] = tuple(counts.tolist())
    if column.kind in ("tokens", "boxes"):
        changes["shortest"] = min(record["shortest"] for record in records)
        changes["longest"] = max(record["longest"] for record in records)
    if column.kind in ("image", "mask"):
        smallest = tuple(min(record["smallest"][i] for record in records) for i in (0, 1))
        largest = tuple(max(record["largest"][i] for record in records) for i in (0, 1))
        changes |= {"smallest": smallest, "largest": largest}
        if column.shape is None and smallest == largest:
            changes["shape"] = (3, *smallest) if column.kind == "image" else smallest
    if column.kind == "image":
        # Exact integers until here, so the constants do not depend on how the split was cut.
        count = sum(record["count"] for record in records)
        sums = np.sum([record["sums"] for record in records], axis=0, dtype=object)
        squares = np.sum([record["squares"] for record in records], axis=0, dtype=object)
        mean = [float(s) / count / 255 for s in sums]
        std = [
            math.sqrt(max(float(q) / count / 255**2 - m * m, 0.0))
            for q, m in zip(squares, mean, strict=True)
        ]
        changes["mean"] = tuple(round(m, 6) for m in mean)
        changes["std"] = tuple(round(s, 6) for s in std)
    if column.is_float:
        count = sum(record["count"] for record in records)
        sums, squares = (
            [math.fsum(parts) for parts in zip(*(r[name] for r in records), strict=True)]
            for name in ("sums", "squares")
        )
        means = [s / count for s in sums]
        changes["mean"] = tuple(means)
        changes["std"] = tuple(
            math.sqrt(max(q / count - m * m, 0.0)) for q, m in zip(squares, means, strict=True)
        )
    return replace(column, **changes)
