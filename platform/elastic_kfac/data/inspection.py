"""Looking at finished shard sets: verification and description."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic_kfac.data.column_statistics import Measured
from elastic_kfac.data.columns import BOX, KEY, Column
from elastic_kfac.data.decode import (
    MAX_PIXELS,
    UndecodableImage,
    check_mask,
    decode_mask,
    decode_rgb,
)
from elastic_kfac.data.manifest import (
    ShardInfo,
    ShardSet,
    corrupt_shard,
    fixed_size_rows,
    open_splits,
    read_shard_table,
)
from elastic_kfac.data.storage import join_uri
from elastic_kfac.errors import DataError


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
