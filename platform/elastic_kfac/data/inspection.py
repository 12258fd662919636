"""Looking at finished shard sets: verification, description, a picture of their samples."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from elastic_kfac.data.cache import OpenShard, ShardCache
from elastic_kfac.data.column_statistics import Measured
from elastic_kfac.data.columns import BOX, KEY, Column
from elastic_kfac.data.decode import (
    MAX_PIXELS,
    UndecodableImage,
    check_mask,
    decode_mask,
    decode_rgb,
    resize_box,
)
from elastic_kfac.data.manifest import (
    ShardInfo,
    ShardSet,
    corrupt_shard,
    fixed_size_rows,
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
            found = [_check_content(shard_set, shard, max_pixels) for shard in shard_set.shards]
            for column in shard_set.columns:
                counts = sum(part[column.name] for part in found)
                if np.asarray(counts).tolist() != list(column.class_counts):
                    raise DataError(
                        f"labels of {shard_set.uri} are not those the manifest counted",
                        given=np.asarray(counts).tolist(),
                        allowed=list(column.class_counts),
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
        splits[shard_set.split] = {
            "source": shard_set.source,
            "samples": shard_set.num_samples,
            "shards": len(shard_set.shards),
            "bytes": shard_set.num_bytes,
            "bytes_per_sample": round(shard_set.num_bytes / shard_set.num_samples, 1),
            **_described(shard_set),
            "shuffle": "full permutation"
            if shard_set.shuffle_window is None
            else f"blocks of {shard_set.shuffle_window} samples",
            "manifest_sha256": shard_set.manifest_sha256,
        }
    return {"uri": str(uri), "splits": splits}


def _described(shard_set: ShardSet) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (image := shard_set.image) is not None:
        found |= {
            "encoding": image.encoding,
            "image_shape": image.shape,
            "smallest_image": image.smallest,
            "largest_image": image.largest,
        }
    if shard_set.class_names:
        counts = shard_set.class_counts
        found |= {
            "classes": shard_set.num_classes,
            "class_counts": dict(zip(shard_set.class_names, counts, strict=True)),
            "balance": {"smallest_class": min(counts), "largest_class": max(counts)},
        }
    if image is not None:
        found |= {"mean": image.mean, "std": image.std}
    found["columns"] = [column.to_json() for column in shard_set.columns]
    return found


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
    of_class = shard_set.column("class")
    if shard_set.image is None or of_class is None:
        raise DataError(
            "a contact sheet shows images and their classes",
            given=", ".join(f"{column.name} ({column.kind})" for column in shard_set.columns),
        )
    classes = min(of_class.num_classes, _MOST_CLASSES)
    wanted = np.minimum(np.array(of_class.class_counts[:classes]), per_class)
    placed = np.zeros(classes, dtype=np.int64)
    side = cell + _GAP
    sheet = np.full((classes * side + _GAP, per_class * side + _GAP, 3), 255, dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="contact-sheet-") as folder:
        cache = ShardCache(folder, 1 << 50)
        for index in range(len(shard_set.shards)):
            if (placed >= wanted).all():
                break
            shard = cache.open(shard_set, index)
            labels = shard.values[of_class.name]
            key = stream_key(SOURCE_SHUFFLE, index)
            for row in permutation(key, np.arange(shard.num_rows, dtype=np.int64)).tolist():
                label = int(labels[row])
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


def _check_content(
    shard_set: ShardSet, shard: ShardInfo, max_pixels: int
) -> dict[str, NDArray[np.int64]]:
    """Counts of classes by column."""
    where = join_uri(shard_set.uri, shard.file)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        storage = shard_set.storage
        copy = None if storage.is_local else Path(folder) / shard.file
        path = copy or Path(storage.path(shard.file))
        found = storage.sha256(shard.file, copy_to=copy)
        if found != shard.sha256:
            raise corrupt_shard(where, found, shard.sha256)
        table = read_shard_table(path, shard_set, shard)
        counts = {}
        for column in shard_set.columns:
            measured = Measured(column)
            values = table.column(column.name)
            if column.encoding == "encoded":
                keys = table.column(KEY)
                for row, problem in _undecodable(values, measured, max_pixels):
                    raise DataError(
                        f"undecodable image in {where}, row {row}",
                        given=str(keys[row].as_py()),
                        change=problem,
                    )
            else:
                stored = _stored(column, values)
                column.check(stored, where, 0)
                if column.class_names:
                    measured.add(stored, range(len(stored)))
            counts[column.name] = np.asarray(measured.record["class_counts"], dtype=np.int64)
    return counts


def _stored(column: Column, values: pa.ChunkedArray) -> Any:
    """The values of a column without encoded images, as sources give them."""
    if column.kind == "class":
        return values.to_numpy().astype(np.int64)
    if column.kind in ("tokens", "boxes"):
        parts = [np.asarray(part) for part in values.to_pylist()]
        return [part.reshape(-1, BOX) for part in parts] if column.kind == "boxes" else parts
    rows = np.concatenate([fixed_size_rows(chunk) for chunk in values.chunks])
    if column.kind == "tensor":
        return rows.view(column.dtype).reshape(len(rows), *(column.shape or ()))
    return rows


def _undecodable(
    images: Iterable[Any], measured: Measured, max_pixels: int
) -> Iterator[tuple[int, str]]:
    """Rows that are no images, or no masks of the column's classes, which are counted."""
    is_mask, lock = measured.column.kind == "mask", threading.Lock()

    def check(value: Any) -> str | None:
        try:
            if not is_mask:
                decode_rgb(value.as_py(), max_pixels=max_pixels)
                return None
            pixels = decode_mask(value.as_py(), max_pixels=max_pixels)
            check_mask(pixels, measured.column.num_classes)
            with lock:
                measured.add_mask(pixels)
        except UndecodableImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, problem in enumerate(pool.map(check, images)):
            if problem is not None:
                yield row, problem


def _pixels(shard_set: ShardSet, shard: OpenShard, row: int, max_pixels: int) -> NDArray[np.uint8]:
    """RGB, [height, width, 3]; other channel counts show their first channel as grey."""
    image = shard_set.image
    assert image is not None
    if image.encoding == "encoded":
        try:
            return decode_rgb(shard.item(image.name, row), max_pixels=max_pixels)
        except UndecodableImage as error:
            where = f"{join_uri(shard_set.uri, shard_set.split)}, {shard.key(row)}"
            raise DataError("undecodable image", given=where, change=str(error)) from None
    assert image.shape is not None
    planes = shard.values[image.name][row].reshape(image.shape)
    rgb = planes if len(planes) == 3 else planes[:1].repeat(3, axis=0)
    return np.ascontiguousarray(rgb.transpose(1, 2, 0))
