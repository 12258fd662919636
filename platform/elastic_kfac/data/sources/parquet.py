"""Parquet files with an image and a label column."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elastic_kfac.data.manifest import check_class_labels, fixed_size_rows
from elastic_kfac.data.sources.source import BATCH_ROWS, Images, Records, Source
from elastic_kfac.errors import DataError

_SPLIT_NAME = re.compile(
    r"(?:(?P<prefix>.*)[_-])?(?P<split>train|test|validation|valid|val)(?:-\d+-of-\d+)?\.parquet$"
)
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


def parquet(path: Path, split: str | None) -> Source:
    """A file, or a prefix or folder of files such as `NAME_train.parquet`, `test-00000-of-00002.parquet`.

    Raises:
        DataError: If there are no such files, or files of several data sets.
    """
    if path.is_file():
        match = _SPLIT_NAME.match(path.name)
        name = split or (match["split"] if match else "train")
        return Source(f"parquet:{path.name}", {name: partial(ParquetSplit, (path,))})
    folder, prefix = (path, None) if path.is_dir() else (path.parent, path.name)
    found: dict[str | None, dict[str, list[Path]]] = {}
    for file in sorted(folder.glob("*.parquet")):
        match = _SPLIT_NAME.match(file.name)
        if match and (prefix is None or match["prefix"] == prefix):
            found.setdefault(match["prefix"], {}).setdefault(match["split"], []).append(file)
    if not found:
        raise DataError(
            "no Parquet files for this source",
            given=str(path),
            allowed="a file, or a prefix or folder with *_train.parquet / *_test.parquet",
        )
    if len(found) > 1:
        choices = ", ".join(f"parquet:{folder / str(name)}" for name in sorted(map(str, found)))
        raise DataError("the folder holds several data sets", given=str(path), allowed=choices)
    files = next(iter(found.values()))
    return Source(
        f"parquet:{path.name}",
        {name: partial(ParquetSplit, tuple(some)) for name, some in files.items()},
    )


class ParquetSplit:
    """Rows of Parquet files with an image and an integer label column.

    The image column is `fixed_size_binary` (raw uint8; the shape comes from the file's metadata or the
    length), `binary` (an encoded image), or a struct with a `bytes` field.

    Raises:
        DataError: If a file is unreadable, columns are missing, or labels do not fit the classes.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._open = lru_cache(maxsize=4)(_open_parquet)
        parts = [_open_parquet(file) for file in self._files]
        first = parts[0]
        schema = first.schema_arrow
        self._image = _column(schema, _IMAGE_COLUMNS, self._files[0])
        self._label = _column(schema, _LABEL_COLUMNS, self._files[0])
        self._has_key = "key" in schema.names
        kind = schema.field(self._image).type
        metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
        self.raw_shape = (
            _raw_shape(kind.byte_width, metadata, self._files[0])
            if pa.types.is_fixed_size_binary(kind)
            else None
        )
        self._planar = metadata.get("layout", "HWC").upper() == "CHW"
        # (file, row group, first sample) of every row group, in order.
        self._groups: list[tuple[int, int, int]] = []
        self.num_samples = 0
        total = 0
        digest = hashlib.sha256()
        for index, part in enumerate(parts):
            if not part.schema_arrow.equals(schema):
                raise DataError(
                    "Parquet files of one split have different schemas",
                    given=f"{self._files[0].name}, {self._files[index].name}",
                )
            digest.update(_file_fingerprint(self._files[index]))
            for group in range(part.metadata.num_row_groups):
                info = part.metadata.row_group(group)
                self._groups.append((index, group, self.num_samples))
                self.num_samples += info.num_rows
                total += info.total_byte_size
        self.fingerprint = digest.hexdigest()
        raw = math.prod(self.raw_shape) if self.raw_shape else None
        self.bytes_per_sample = float(raw or total / max(self.num_samples, 1))
        labels = self._labels(parts)
        for part in parts:
            part.close()
        self.class_names = _class_names(metadata, labels, self._files[0])

    def read(self, start: int, stop: int) -> Iterator[Records]:
        columns = [self._image, self._label, *(["key"] if self._has_key else [])]
        for position, (file, group, first) in enumerate(self._groups):
            following = self._groups[position + 1 :]
            last = following[0][2] if following else self.num_samples
            if last <= start or first >= stop:
                continue
            try:
                table = self._open(self._files[file]).read_row_group(group, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(self._files[file], error) from None
            low, high = max(start - first, 0), min(stop, last) - first
            for at in range(low, high, BATCH_ROWS):
                piece = table.slice(at, min(BATCH_ROWS, high - at)).combine_chunks()
                yield self._records(piece, self._files[file].stem, first + at)

    def _records(self, piece: pa.Table, stem: str, first: int) -> Records:
        column = piece.column(self._image).combine_chunks()
        if pa.types.is_struct(column.type):
            column = column.field("bytes")
        images: Images
        if self.raw_shape is not None:
            images = fixed_size_rows(column)
            channels, height, width = self.raw_shape
            if channels > 1 and not self._planar:
                pixels = images.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
                images = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
        else:
            # A null image is kept as zero bytes: writing the shard then names the record.
            images = [value or b"" for value in column.to_pylist()]
        labels = piece.column(self._label).to_numpy().astype(np.int64)
        if self._has_key:
            keys = [str(key) for key in piece.column("key").to_pylist()]
        else:
            keys = [f"{stem}/{first + row}" for row in range(piece.num_rows)]
        return Records(images, labels, keys)

    def _labels(self, parts: Sequence[pq.ParquetFile]) -> NDArray[np.int64]:
        columns = []
        for file, part in zip(self._files, parts, strict=True):
            try:
                column = part.read(columns=[self._label]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(file, error) from None
            if not pa.types.is_integer(column.type) or column.null_count:
                raise DataError(
                    f"column {self._label} must hold integers without nulls",
                    given=f"{column.type} with {column.null_count} nulls in {file.name}",
                )
            columns.append(column.to_numpy().astype(np.int64))
        return np.concatenate(columns)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError("not a readable Parquet file", given=str(path), change=str(error))


def _column(schema: pa.Schema, names: Sequence[str], file: Path) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise DataError(
        f"{file.name} has no {names[0]} column",
        given=", ".join(schema.names),
        allowed=" or ".join(names),
    )


def _raw_shape(width: int, metadata: dict[str, str], file: Path) -> tuple[int, int, int]:
    if {"height", "width"} <= metadata.keys():
        shape = (
            int(metadata.get("channels", "1")),
            int(metadata["height"]),
            int(metadata["width"]),
        )
        if math.prod(shape) == width:
            return shape
    else:
        for channels in (1, 3):
            side = math.isqrt(width // channels)
            if channels * side * side == width:
                return channels, side, side
    raise DataError(
        f"unknown image shape in {file.name}",
        given=f"{width} bytes per image",
        allowed="metadata height, width, channels whose product is the size, or square images",
    )


def _class_names(
    metadata: dict[str, str], labels: NDArray[np.int64], file: Path
) -> tuple[str, ...]:
    names: Any = json.loads(metadata["class_names"]) if "class_names" in metadata else None
    count = int(labels.max(initial=-1)) + 1
    result = tuple(map(str, names)) if names else tuple(str(label) for label in range(count))
    check_class_labels(labels, len(result), file.name)
    return result


def _file_fingerprint(path: Path) -> bytes:
    # The footer describes every page (sizes, statistics), so it changes with the content, and
    # reading it does not cost the file.
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - (256 << 10)))
        return hashlib.sha256(str(size).encode() + file.read()).digest()
