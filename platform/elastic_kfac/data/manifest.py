"""The manifest of a shard set. It is written last: a set with a manifest is complete.

A root URI holds one shard set per split: `<root>/train/manifest.json`, `<root>/test/manifest.json`.
It contains no time, path or machine: the same source gives the same manifest, whose sha256 identifies
the data of a run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elastic_kfac.data.columns import Column, Kind
from elastic_kfac.data.order import SampleOrder
from elastic_kfac.data.storage import Storage, join_uri
from elastic_kfac.errors import DataError
from elastic_kfac.json_text import parsed

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_HASH: Final = "manifest.sha256"
"""Hash of the manifest, written before it; sets of earlier versions have none."""
MAKING: Final = "making"
"""Folder of the records of an unfinished set."""
FORMAT: Final = "elastic-kfac-shards"
VERSIONS: Final = (1, 2)
"""1: images and their classes; 2: any columns."""
_CLASSIFICATION: Final = [("image", "image"), ("label", "class")]
_OF_IMAGE: Final = {
    "encoding": "encoding",
    "image_shape": "shape",
    "smallest_image": "smallest",
    "largest_image": "largest",
}
_OF_LABEL: Final = ("class_names", "class_counts")


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet shard at the time it was made."""

    file: str
    rows: int
    bytes: int
    sha256: str
    schema_sha256: str


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set of one split: an immutable, small, picklable value.

    `shuffle_window` is None when an epoch is one full permutation (see `SampleOrder`).
    """

    uri: str
    split: str
    source: str
    source_sha256: str
    columns: tuple[Column, ...]
    shuffle_window: int | None
    shards: tuple[ShardInfo, ...]
    manifest_sha256: str = field(compare=False)

    @classmethod
    def open(cls, uri: str | Path) -> ShardSet:
        """Reads the manifest of one split.

        Raises:
            DataError: If there is no finished set, or its manifest is damaged.
        """
        storage = Storage(uri)
        try:
            content = storage.read(MANIFEST_NAME)
        except FileNotFoundError:
            raise _no_manifest(storage) from None
        try:
            if storage.exists(MANIFEST_HASH):
                written = storage.read(MANIFEST_HASH).decode().strip()
                if written != hashlib.sha256(content).hexdigest():
                    raise ValueError(f"its hash is not that of {MANIFEST_HASH}")
            return cls._parse(storage.uri, content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "damaged manifest",
                given=f"{join_uri(storage.uri, MANIFEST_NAME)} ({type(error).__name__}: {error})",
                change="make the shards again in an empty folder",
            ) from None

    @classmethod
    def _parse(cls, uri: str, content: bytes) -> ShardSet:
        values: dict[str, Any] = parsed(content)
        if not isinstance(values, dict) or values.pop("format") != FORMAT:
            raise ValueError("not a shard manifest")
        if (version := values.pop("version")) not in VERSIONS:
            raise ValueError(f"version {version}; this release reads {VERSIONS[-1]} and older")
        num_samples = values.pop("num_samples")
        shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
        if version == 1:
            columns = _of_version_1(values)
        else:
            columns = tuple(Column.from_json(each) for each in values.pop("columns"))
        result = cls(
            uri=uri,
            columns=columns,
            shards=shards,
            manifest_sha256=hashlib.sha256(content).hexdigest(),
            **values,
        )
        if result.num_samples != num_samples:
            raise ValueError("sample counts do not add up")
        for column in columns:
            if len(column.class_counts) != column.num_classes:
                raise ValueError("class names and counts differ in number")
            if column.kind == "class" and sum(column.class_counts) != num_samples:
                raise ValueError("sample counts do not add up")
        if any(Path(shard.file).name != shard.file for shard in shards):
            raise ValueError("a shard file lies outside the set")
        return result

    def to_json(self) -> bytes:
        """The bytes of the manifest; equal for equal content.

        Sets of images and their classes are written as version 1, which every release reads.
        """
        origin = {name: getattr(self, name) for name in ("split", "source", "source_sha256")}
        rest = {
            "shuffle_window": self.shuffle_window,
            "shards": [asdict(shard) for shard in self.shards],
        }
        if [(column.name, column.kind) for column in self.columns] == _CLASSIFICATION:
            image, label = self.columns
            measured = {name: getattr(image, own) for name, own in _OF_IMAGE.items()}
            classes = {name: getattr(label, name) for name in _OF_LABEL}
            constants = {"mean": image.mean, "std": image.std}
            head = {"format": FORMAT, "version": 1, "num_samples": self.num_samples}
            values = head | origin | measured | classes | constants | rest
        else:
            head = {"format": FORMAT, "version": 2, "num_samples": self.num_samples}
            values = head | origin | {"columns": [c.to_json() for c in self.columns]} | rest
        return (json.dumps(values, indent=1) + "\n").encode()

    def column(self, kind: Kind) -> Column | None:
        """The first column of a kind."""
        return next((column for column in self.columns if column.kind == kind), None)

    @property
    def image(self) -> Column | None:
        return self.column("image")

    @property
    def classes(self) -> Column | None:
        """The first column with classes: of samples, pixels or boxes."""
        return next((column for column in self.columns if column.class_names), None)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes.class_names if self.classes else ()

    @property
    def class_counts(self) -> tuple[int, ...]:
        return self.classes.class_counts if self.classes else ()

    @property
    def storage(self) -> Storage:
        return Storage(self.uri)

    @property
    def num_samples(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        return tuple(shard.rows for shard in self.shards)

    def order(self, seed: int, epoch: int, *, shuffle: bool = True) -> SampleOrder:
        """The order of an epoch: a pure function of (manifest, seed, epoch)."""
        return SampleOrder(
            self.num_samples,
            seed,
            epoch,
            shard_rows=self.shard_rows,
            window=self.shuffle_window,
            shuffle=shuffle,
        )

    def locate(self, ids: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard index, row in the shard) of sample ids; an id is prefix sum + row."""
        first = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        shard = np.searchsorted(first, ids, side="right") - 1
        return shard.astype(np.int64), (np.asarray(ids) - first[shard]).astype(np.int64)


def schema_sha256(schema: pa.Schema) -> str:
    """Fingerprint of column names, types and nullability (metadata excluded)."""
    text = "\n".join(f"{f.name}:{f.type}:{f.nullable}" for f in schema)
    return hashlib.sha256(text.encode()).hexdigest()


def open_splits(uri: str | Path) -> list[ShardSet]:
    """The finished shard sets below a root URI, or the one at the URI itself.

    Raises:
        DataError: If there is none, or a manifest is damaged.
    """
    root = Storage(uri)
    if root.exists(MANIFEST_NAME):
        return [ShardSet.open(uri)]
    found = _finished_splits(root)
    if not found:
        raise _no_manifest(root)
    for name in set(root.folders()) - set(found):
        if any(file.startswith("shard-") for file in root.files(name)):
            raise _no_manifest(root.child(name))
    return [ShardSet.open(root.child(name).uri) for name in found]


def has_splits(root: str) -> bool:
    """Whether there is a finished shard set below a root URI, or at it."""
    storage = Storage(root)
    return storage.exists(MANIFEST_NAME) or bool(_finished_splits(storage))


def open_named_split(root: str, split: str, key: str) -> ShardSet:
    """The split that a configuration names.

    Args:
        root: Root URI of the shard sets.
        split: Name of the split.
        key: Configuration key that names it, for errors.

    Raises:
        DataError: If there is no such split (it names those that exist), or its manifest is damaged.
    """
    try:
        return ShardSet.open(join_uri(root, split))
    except DataError:
        splits = _finished_splits(Storage(root))
        if not splits or split in splits:
            raise
        others = [name for name in splits if name != "train"] or splits
        raise DataError(
            f"no such split in {root}",
            given=f"{key}={split}",
            allowed=", ".join(splits),
            change=f"add --set {key}={others[0]}",
        ) from None


class CorruptShard(DataError):
    """A shard whose bytes differ from those that were written."""


def corrupt_shard(where: str, found: str, expected: str) -> CorruptShard:
    """The error for a shard with another sha256 than the manifest's."""
    return CorruptShard(
        f"corrupt shard {where}",
        given=f"sha256 {found}",
        allowed=f"sha256 {expected}",
        change="copy or make the set again",
    )


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


def fixed_size_rows(column: pa.Array) -> NDArray[np.uint8]:
    """A view of a fixed_size_binary array as uint8 [rows, byte_width]."""
    if column.null_count:
        raise DataError("raw values must not be null", given=f"{column.null_count} nulls")
    width = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return flat[column.offset * width : (column.offset + len(column)) * width].reshape(-1, width)


def _of_version_1(values: dict[str, Any]) -> tuple[Column, ...]:
    """The columns of a manifest of version 1; takes what it uses out of `values`."""
    # JSON has no tuples, and a frozen value should be hashable.
    frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    image = {own: frozen[name] for name, own in _OF_IMAGE.items()}
    image |= {name: frozen[name] for name in ("mean", "std")}
    label = {name: frozen[name] for name in _OF_LABEL}
    for name in (*_OF_IMAGE, *_OF_LABEL, "mean", "std"):
        del values[name]
    return Column("image", "image", "input", **image), Column("label", "class", "target", **label)


def _finished_splits(root: Storage) -> list[str]:
    return [name for name in root.folders() if root.exists(f"{name}/{MANIFEST_NAME}")]


def _no_manifest(storage: Storage) -> DataError:
    if splits := _finished_splits(storage):
        return DataError(
            "no such split in this shard set", given=storage.uri, allowed=", ".join(splits)
        )
    if MAKING in storage.folders():
        return DataError(
            "the shard set is unfinished (its `shards make` was interrupted)",
            given=storage.uri,
            change="run the same `elastic-kfac shards make` again; it continues",
        )
    if any(name.startswith("shard-") for name in storage.files()):
        return DataError(
            "the manifest of this shard set is missing",
            given=storage.uri,
            change="run the same `elastic-kfac shards make` again, or copy the set again",
        )
    return DataError(
        "no shard set here",
        given=storage.uri,
        change="make one with `elastic-kfac shards make --source SOURCE --out URI`",
    )
