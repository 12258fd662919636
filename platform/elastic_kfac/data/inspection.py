"""Checking and describing finished shard sets."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_kfac.data.decode import UndecodableImage, decode_rgb
from elastic_kfac.data.manifest import ShardInfo, ShardSet, schema_sha256, splits_of
from elastic_kfac.data.sources import check_class_labels
from elastic_kfac.data.storage import Location, join_uri
from elastic_kfac.errors import DataError


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_shards` read and found in order."""

    uri: str
    deep: bool
    splits: dict[str, dict[str, int]]
    """Per split: samples, shards, bytes."""
    seconds: float

    @property
    def num_samples(self) -> int:
        return sum(split["samples"] for split in self.splits.values())

    def line(self) -> str:
        """The outcome as one line."""
        shards = sum(split["shards"] for split in self.splits.values())
        size = sum(split["bytes"] for split in self.splits.values()) / 2**20
        checked = "every byte and image" if self.deep else "presence and sizes"
        return (
            f"{self.uri}: {self.num_samples} samples in {shards} shards ({size:.1f} MiB, "
            f"{', '.join(self.splits)}) are whole; checked {checked} in {self.seconds:.1f} s"
        )


def verify_shards(uri: str | Path, deep: bool = True) -> VerifyReport:
    """Checks a shard set, or all splits below a root, against the manifest.

    Quick: every shard is there and has its size. Deep: also every byte (sha256), the schema, the
    row counts, the labels, and that every encoded image decodes.

    Raises:
        DataError: On the first thing that is wrong; it names the file, what was expected and found.
    """
    began = time.monotonic()
    splits = {}
    for shard_set in _open_all(uri):
        for shard in shard_set.shards:
            _check_size(shard_set, shard)
        if deep:
            counts = np.zeros(shard_set.num_classes, dtype=np.int64)
            for shard in shard_set.shards:
                counts += _check_content(shard_set, shard)
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
    """Counts, class balance, image sizes, constants and hashes, read from the manifests alone.

    Raises:
        DataError: If there is no finished shard set.
    """
    splits = {}
    for shard_set in _open_all(uri):
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


def read_shard_table(path: Path, shard_set: ShardSet, shard: ShardInfo) -> pa.Table:
    """A shard's table from a local Parquet file, checked against the manifest's rows and schema.

    Raises:
        DataError: If the file is not Parquet, or has other columns or another number of rows.
    """
    where = join_uri(shard_set.uri, shard.file)
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError("unreadable shard", given=where, change=str(error)) from None
    if schema_sha256(table.schema) != shard.schema_sha256:
        raise DataError(
            f"wrong schema in {where}",
            given=schema_sha256(table.schema)[:16],
            allowed=shard.schema_sha256[:16],
        )
    if table.num_rows != shard.rows:
        raise DataError(
            f"wrong number of rows in {where}", given=table.num_rows, allowed=shard.rows
        )
    return table


def _open_all(uri: str | Path) -> Iterator[ShardSet]:
    root = Location.parse(uri)
    for name in splits_of(uri):
        yield ShardSet.open(root.child(name).uri if name else root.uri)


def _check_size(shard_set: ShardSet, shard: ShardInfo) -> None:
    where = join_uri(shard_set.uri, shard.file)
    size = shard_set.location.size(shard.file)
    if size is None:
        raise DataError("shard is missing", given=where, change="copy or make the set again")
    if size != shard.bytes:
        raise DataError(
            f"shard {where} has the wrong size",
            given=f"{size} bytes",
            allowed=f"{shard.bytes} bytes",
            change="copy or make the set again",
        )


class CorruptShard(DataError):
    """A shard whose bytes are not those that were written."""


def corrupt(where: str, found: str, expected: str) -> CorruptShard:
    """The error that names the shard and both hashes."""
    return CorruptShard(
        f"corrupt shard {where}",
        given=f"sha256 {found}",
        allowed=f"sha256 {expected}",
        change="copy or make the set again",
    )


def _check_content(shard_set: ShardSet, shard: ShardInfo) -> np.ndarray[Any, Any]:
    where = join_uri(shard_set.uri, shard.file)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        location = shard_set.location
        if location.is_local:
            path = Path(location.path) / shard.file
            found = location.sha256(shard.file)
        else:
            path = Path(folder) / shard.file
            found = location.fetch(shard.file, path)
        if found != shard.sha256:
            raise corrupt(where, found, shard.sha256)
        table = read_shard_table(path, shard_set, shard)
        labels = table.column("label").to_numpy().astype(np.int64)
        check_class_labels(labels, shard_set.num_classes, where)
        if shard_set.encoding == "encoded":
            keys = table.column("key")
            for row, problem in _undecodable(table.column("image")):
                raise DataError(
                    f"undecodable image in {where}, row {row}",
                    given=str(keys[row].as_py()),
                    change=problem,
                )
    return np.bincount(labels, minlength=shard_set.num_classes)


def _undecodable(images: Iterable[Any]) -> Iterator[tuple[int, str]]:
    def check(value: Any) -> str | None:
        try:
            decode_rgb(value.as_py())
        except UndecodableImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, problem in enumerate(pool.map(check, images)):
            if problem is not None:
                yield row, problem
