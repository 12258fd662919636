"""Looking at finished shard sets: verification, description, a picture of their samples."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from elastic_kfac.data.cache import OpenShard, ShardCache
from elastic_kfac.data.decode import MAX_PIXELS, UndecodableImage, decode_rgb, resize_box
from elastic_kfac.data.manifest import (
    ShardInfo,
    ShardSet,
    check_class_labels,
    corrupt_shard,
    open_splits,
    read_shard_table,
)
from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key
from elastic_kfac.data.storage import join_uri
from elastic_kfac.errors import DataError

_MOST_CLASSES: Final = 32
"""Rows of a contact sheet."""
_GAP: Final = 2


@dataclass(frozen=True)
class VerifyReport:
    """The size of a verified shard set and the time that took."""

    uri: str
    deep: bool
    splits: dict[str, dict[str, int]]
    """Per split: samples, shards, bytes."""
    seconds: float

    @property
    def num_samples(self) -> int:
        return sum(split["samples"] for split in self.splits.values())

    def line(self) -> str:
        """One line for people."""
        shards = sum(split["shards"] for split in self.splits.values())
        size = sum(split["bytes"] for split in self.splits.values()) / 2**20
        checked = "every byte and image" if self.deep else "presence and sizes"
        return (
            f"{self.uri}: {self.num_samples} samples in {shards} shards ({size:.1f} MiB, "
            f"{', '.join(self.splits)}) are whole; checked {checked} in {self.seconds:.1f} s"
        )


def verify_shards(
    uri: str | Path, deep: bool = True, *, max_pixels: int = MAX_PIXELS
) -> VerifyReport:
    """Checks a shard set, or all splits below a root, against the manifest.

    Quick: presence and size of every shard. Deep: also every byte (sha256), the schema, the row counts,
    the labels, and that every encoded image decodes.

    Raises:
        DataError: On the first mismatch; it names the file, what was expected and what was found.
    """
    began = time.monotonic()
    splits = {}
    for shard_set in open_splits(uri):
        for shard in shard_set.shards:
            _check_size(shard_set, shard)
        if deep:
            counts = np.zeros(shard_set.num_classes, dtype=np.int64)
            for shard in shard_set.shards:
                counts += _check_content(shard_set, shard, max_pixels)
            if tuple(counts.tolist()) != shard_set.class_counts:
                raise DataError(
                    f"labels of {shard_set.uri} are not those the manifest counted",
                    given=counts.tolist(),
                    allowed=list(shard_set.class_counts),
                )
        splits[shard_set.split] = {
            "samples": shard_set.num_samples,
            "shards": len(shard_set.shards),
            "bytes": shard_set.num_bytes,
        }
    return VerifyReport(str(uri), deep, splits, time.monotonic() - began)


def describe_shards(uri: str | Path) -> dict[str, Any]:
    """Counts, class balance, image sizes, constants and hashes, from the manifests alone.

    Raises:
        DataError: If there is no finished shard set.
    """
    splits = {}
    for shard_set in open_splits(uri):
        counts = np.asarray(shard_set.class_counts)
        splits[shard_set.split] = {
            "source": shard_set.source,
            "samples": shard_set.num_samples,
            "shards": len(shard_set.shards),
            "bytes": shard_set.num_bytes,
            "bytes_per_sample": round(shard_set.num_bytes / shard_set.num_samples, 1),
            "encoding": shard_set.encoding,
            "image_shape": shard_set.image_shape,
            "smallest_image": shard_set.smallest_image,
            "largest_image": shard_set.largest_image,
            "classes": shard_set.num_classes,
            "class_counts": dict(zip(shard_set.class_names, counts.tolist(), strict=True)),
            "balance": {"smallest_class": int(counts.min()), "largest_class": int(counts.max())},
            "mean": shard_set.mean,
            "std": shard_set.std,
            "shuffle": "full permutation"
            if shard_set.shuffle_window is None
            else f"blocks of {shard_set.shuffle_window} samples",
            "manifest_sha256": shard_set.manifest_sha256,
        }
    return {"uri": str(uri), "splits": splits}


def contact_sheet(
    shard_set: ShardSet,
    target: str | Path,
    *,
    per_class: int = 10,
    cell: int = 48,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Writes a PNG with a row of `per_class` samples for each of the first classes.

    The samples come from as few shards as possible and are the same every time.

    Args:
        shard_set: One split.
        target: The PNG to write.
        per_class: Samples per row.
        cell: Height and width of a sample, pixels.
        max_pixels: Bound on the pixels of one image.

    Returns:
        The number of samples on the sheet.

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
                image = resize_box(_pixels(shard_set, shard, row, max_pixels), (cell, cell))
                sheet[top : top + cell, left : left + cell] = image
                placed[label] += 1
        cache.close()
    Image.fromarray(sheet).save(target, "PNG")
    return int(placed.sum())


def _check_size(shard_set: ShardSet, shard: ShardInfo) -> None:
    where = join_uri(shard_set.uri, shard.file)
    size = shard_set.storage.size(shard.file)
    if size is None:
        raise DataError("shard is missing", given=where, change="copy or make the set again")
    if size != shard.bytes:
        raise DataError(
            f"shard {where} has the wrong size",
            given=f"{size} bytes",
            allowed=f"{shard.bytes} bytes",
            change="copy or make the set again",
        )


def _check_content(shard_set: ShardSet, shard: ShardInfo, max_pixels: int) -> np.ndarray[Any, Any]:
    where = join_uri(shard_set.uri, shard.file)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        storage = shard_set.storage
        copy = None if storage.is_local else Path(folder) / shard.file
        path = copy or Path(storage.path(shard.file))
        found = storage.sha256(shard.file, copy_to=copy)
        if found != shard.sha256:
            raise corrupt_shard(where, found, shard.sha256)
        table = read_shard_table(path, shard_set, shard)
        labels = table.column("label").to_numpy().astype(np.int64)
        check_class_labels(labels, shard_set.num_classes, where)
        if shard_set.encoding == "encoded":
            keys = table.column("key")
            for row, problem in _undecodable(table.column("image"), max_pixels):
                raise DataError(
                    f"undecodable image in {where}, row {row}",
                    given=str(keys[row].as_py()),
                    change=problem,
                )
    return np.bincount(labels, minlength=shard_set.num_classes)


def _undecodable(images: Iterable[Any], max_pixels: int) -> Iterator[tuple[int, str]]:
    def check(value: Any) -> str | None:
        try:
            decode_rgb(value.as_py(), max_pixels=max_pixels)
        except UndecodableImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, problem in enumerate(pool.map(check, images)):
            if problem is not None:
                yield row, problem


def _pixels(shard_set: ShardSet, shard: OpenShard, row: int, max_pixels: int) -> NDArray[np.uint8]:
    """RGB, [height, width, 3]; other channel counts show their first channel as grey."""
    if shard.pixels is None:
        try:
            return decode_rgb(shard.encoded(row), max_pixels=max_pixels)
        except UndecodableImage as error:
            where = f"{join_uri(shard_set.uri, shard_set.split)}, {shard.key(row)}"
            raise DataError("undecodable image", given=where, change=str(error)) from None
    assert shard_set.image_shape is not None
    planes = shard.pixels[row].reshape(shard_set.image_shape)
    rgb = planes if len(planes) == 3 else planes[:1].repeat(3, axis=0)
    return np.ascontiguousarray(rgb.transpose(1, 2, 0))
