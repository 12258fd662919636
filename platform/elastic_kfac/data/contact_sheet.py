"""A picture of a shard set: a few samples of every class, one class per row."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from elastic_kfac.data.cache import OpenShard, ShardCache
from elastic_kfac.data.decode import decode_rgb, resize_box
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key

_MOST_CLASSES: Final = 32
_GAP: Final = 2


def contact_sheet(
    shard_set: ShardSet, target: str | Path, *, per_class: int = 10, cell: int = 48
) -> int:
    """Writes a PNG with `per_class` samples in a row for each of the first classes.

    Samples come from as few shards as hold enough of them, and are the same every time.

    Args:
        shard_set: One split.
        target: The PNG to write.
        per_class: Samples in a row.
        cell: Height and width of a sample, pixels.

    Returns:
        How many samples are on the sheet.

    Raises:
        DataError: If a shard is missing or corrupt.
    """
    classes = min(shard_set.num_classes, _MOST_CLASSES)
    wanted = np.minimum(np.array(shard_set.class_counts[:classes]), per_class)
    placed = np.zeros(classes, dtype=np.int64)
    side = cell + _GAP
    sheet = np.full((classes * side + _GAP, per_class * side + _GAP, 3), 255, dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="contact-sheet-") as folder:
        cache = ShardCache(folder, 1 << 50)
        for index in range(len(shard_set.shards)):
            if (placed >= wanted).all():
                break
            shard = cache.open(shard_set, index)
            key = stream_key(SOURCE_SHUFFLE, index)
            for row in permutation(key, np.arange(shard.num_rows, dtype=np.int64)).tolist():
                label = int(shard.labels[row])
                if label >= classes or placed[label] >= wanted[label]:
                    continue
                top, left = _GAP + label * side, _GAP + int(placed[label]) * side
                image = resize_box(_pixels(shard_set, shard, row), (cell, cell))
                sheet[top : top + cell, left : left + cell] = image
                placed[label] += 1
        cache.close()
    Image.fromarray(sheet).save(target, "PNG")
    return int(placed.sum())


def _pixels(shard_set: ShardSet, shard: OpenShard, row: int) -> NDArray[np.uint8]:
    """RGB, [height, width, 3]; other channel counts show their first channel as grey."""
    if shard.pixels is None:
        return decode_rgb(shard.encoded(row))
    assert shard_set.image_shape is not None
    planes = shard.pixels[row].reshape(shard_set.image_shape)
    rgb = planes if len(planes) == 3 else planes[:1].repeat(3, axis=0)
    return np.ascontiguousarray(rgb.transpose(1, 2, 0))
