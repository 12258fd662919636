"""Writing one shard: a range of a source's samples to a Parquet file, with exact pixel statistics."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_kfac.data.decode import UndecodableImage, decode_rgb, image_size
from elastic_kfac.data.manifest import ShardInfo, schema_sha256
from elastic_kfac.data.sources import Records, SourceSplit, check_class_labels, open_source
from elastic_kfac.data.storage import Location
from elastic_kfac.errors import DataError

ROW_GROUP_ROWS: Final = 512
MAKING: Final = "making"


@dataclass(frozen=True)
class ShardTask:
    """One shard to make: samples [start, stop) of a split. Picklable; running it twice is harmless.

    `content` is the fingerprint of the split that the shards were planned from: another machine may
    find another file under the same path.
    """

    source: str
    split: str
    content: str
    out: str
    index: int
    start: int
    stop: int
    statistics_stride: int

    @property
    def file(self) -> str:
        return f"shard-{self.index:05d}.parquet"

    @property
    def record(self) -> str:
        return f"{MAKING}/shard-{self.index:05d}.json"

    def open(self) -> SourceSplit:
        """The split that the samples come from."""
        return open_source(self.source, split=self.split).split(self.split)

    def run(self, opened: SourceSplit | None = None) -> dict[str, Any]:
        """Writes the shard, then the record that it is finished; returns the record.

        Raises:
            DataError: If a record of the source is bad (it names the record), or the source is not
                the one that was planned for.
        """
        data = opened or self.open()
        if data.fingerprint != self.content:
            raise DataError(
                f"the source differs from machine to machine ({platform.node()} has another one)",
                given=f"{self.source}, split {self.split}",
                change="put the same files at the same place on every node",
            )
        location = Location.parse(self.out)
        scratch = Path(location.path) / MAKING if location.is_local else None
        with tempfile.TemporaryDirectory(prefix="shard-", dir=scratch) as folder:
            path = Path(folder) / self.file
            result = _write_parquet(self, data, path)
            location.put(path, self.file)
        location.write(self.record, json.dumps(result).encode())
        return result


@dataclass
class _Statistics:
    """Exact integer sums over pixels; `sums` and `squares` are per channel."""

    pixels: int
    sums: list[int]
    squares: list[int]
    smallest: list[int]
    largest: list[int]

    def add_pixels(self, pixels: np.ndarray[Any, Any], channel_axis: int) -> None:
        counts = [
            np.bincount(np.take(pixels, c, axis=channel_axis).ravel(), minlength=256)
            for c in range(len(self.sums))
        ]
        values = np.arange(256, dtype=np.int64)
        for channel, count in enumerate(counts):
            self.sums[channel] += int(count @ values)
            self.squares[channel] += int(count @ values**2)
        self.pixels += int(counts[0].sum())

    def add_size(self, height: int, width: int) -> None:
        self.smallest = [min(self.smallest[0], height), min(self.smallest[1], width)]
        self.largest = [max(self.largest[0], height), max(self.largest[1], width)]


def shard_schema(raw_shape: tuple[int, int, int] | None) -> pa.Schema:
    """Columns of a shard: image (raw [C, H, W] or encoded bytes), label, key (where it came from)."""
    image = pa.binary() if raw_shape is None else pa.binary(math.prod(raw_shape))
    return pa.schema(
        [
            pa.field("image", image, nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
        ]
    )


def _write_parquet(task: ShardTask, data: SourceSplit, path: Path) -> dict[str, Any]:
    schema = shard_schema(data.raw_shape)
    channels = data.raw_shape[0] if data.raw_shape else 3
    statistics = _Statistics(0, [0] * channels, [0] * channels, [1 << 30] * 2, [0] * 2)
    class_counts = np.zeros(len(data.class_names), dtype=np.int64)
    at = task.start
    with pq.ParquetWriter(
        path, schema, compression="NONE", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for table in _row_groups(_tables(data, task, schema, statistics, class_counts)):
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            at += table.num_rows
    if at != task.stop:
        raise DataError(
            "the source ended early", given=f"sample {at}", allowed=f"{task.stop} samples"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = task.stop - task.start
    shard = ShardInfo(task.file, rows, size, digest, schema_sha256(schema))
    return {
        "index": task.index,
        "rows": rows,
        "bytes": size,
        "shard": asdict(shard),
        "class_counts": class_counts.tolist(),
        **asdict(statistics),
    }


def _tables(
    data: SourceSplit,
    task: ShardTask,
    schema: pa.Schema,
    statistics: _Statistics,
    class_counts: np.ndarray[Any, Any],
) -> Iterator[pa.Table]:
    at = task.start
    for records in data.read(task.start, task.stop):
        check_class_labels(records.labels, len(class_counts), f"split {task.split}", first=at)
        class_counts += np.bincount(records.labels, minlength=len(class_counts))
        _measure(records, data.raw_shape, statistics, at, task.statistics_stride)
        if data.raw_shape is not None:
            pixels = np.ascontiguousarray(records.images)
            image = pa.FixedSizeBinaryArray.from_buffers(
                schema.field("image").type, len(records.labels), [None, pa.py_buffer(pixels)]
            )
        else:
            image = pa.array(records.images, type=pa.binary())
        labels = pa.array(records.labels.astype(np.int32), type=pa.int32())
        yield pa.table([image, labels, pa.array(records.keys, type=pa.string())], schema=schema)
        at += len(records.labels)


def _measure(
    records: Records,
    raw_shape: tuple[int, int, int] | None,
    statistics: _Statistics,
    first: int,
    stride: int,
) -> None:
    if raw_shape is not None:
        statistics.add_size(raw_shape[1], raw_shape[2])
        pixels = np.asarray(records.images).reshape(-1, raw_shape[0], raw_shape[1] * raw_shape[2])
        statistics.add_pixels(pixels, channel_axis=1)
        return
    for row, data in enumerate(records.images):
        try:
            statistics.add_size(*image_size(data))
            if (first + row) % stride == 0:
                statistics.add_pixels(decode_rgb(data), channel_axis=2)
        except UndecodableImage as error:
            raise DataError(
                f"undecodable image at record {first + row}",
                given=f"{records.keys[row]}, {len(data)} bytes",
                change=str(error),
            ) from None


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins and cuts tables to ROW_GROUP_ROWS rows each (the last one may be smaller)."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= ROW_GROUP_ROWS:
            joined = pa.concat_tables(held)
            yield joined.slice(0, ROW_GROUP_ROWS).combine_chunks()
            held, rows = [joined.slice(ROW_GROUP_ROWS)], rows - ROW_GROUP_ROWS
    if rows:
        yield pa.concat_tables(held).combine_chunks()
