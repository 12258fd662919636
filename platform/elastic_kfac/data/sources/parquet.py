"""Parquet files with an image and a label column, as plain files or in Hugging Face's layouts."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elastic_kfac.data.columns import Column, check_class_labels, image_columns
from elastic_kfac.data.manifest import MANIFEST_NAME, fixed_size_rows
from elastic_kfac.data.sources.source import BATCH_ROWS, Images, Records, Source, is_hidden
from elastic_kfac.errors import DataError
from elastic_kfac.json_text import parsed

_WORDS = "train|training|test|testing|eval|evaluation|validation|valid|val|dev"
_FILE_NAME = re.compile(
    rf"(?:(?:(?P<prefix>.*)[-_. ])?(?P<split>{_WORDS})(?:[-_.]\d+)?|(?P<own>\w+)-\d+(?=-of-))"
    r"(?:-of-(?P<parts>\d+))?(?:-[0-9a-f]{6,})?\.parquet"
)
_FOLDER_NAME = re.compile(rf"(?:partial-)?(?P<split>{_WORDS})")
_PART = re.compile(r"-(\d+)-of-\d+")
_DEPTH: Final = 2
"""Folders below the named one that may hold the files: `data/`, or a configuration's `default/train/`."""
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_MANY_CLASSES: Final = 1000
"""More classes than this must have names, or samples for at least a tenth of them."""

Splits = dict[str, list[Path]]


def parquet(path: Path, split: str | None) -> Source:
    """A file, a prefix (`NAME` of `NAME_train.parquet`) or a folder of files.

    The split comes from the file's name (`test-00000-of-00002.parquet`) or its folder's
    (`train/0000.parquet`); files that name none are `split`, or `train`.

    Raises:
        DataError: If there are no such files, some of a split's parts are missing, or the folder holds
            several data sets.
    """
    if path.is_file():
        match = _FILE_NAME.fullmatch(path.name)
        splits = {split or (match and match["split"]) or "train": [path]}
    elif path.is_dir():
        splits = _splits_in(path, split, _DEPTH)
    else:
        splits = _one_set(path, {path.name: _named(path.parent).get(path.name, {})})
    if not splits:
        raise DataError(
            "no Parquet files for this source",
            given=str(path),
            allowed="a file, or a prefix or folder with *_train.parquet, train-00000-of-00001.parquet "
            "or train/*.parquet",
        )
    everything = tuple(file for files in splits.values() for file in files)
    return Source(
        f"parquet:{path.name}",
        {name: partial(ParquetSplit, tuple(some), everything) for name, some in splits.items()},
    )


def _splits_in(folder: Path, split: str | None, depth: int) -> Splits:
    if named := _named(folder):
        return _one_set(folder, named)
    found: Splits = {}
    for child in _visible(folder):
        if child.is_dir() and (match := _FOLDER_NAME.fullmatch(child.name)):
            found.setdefault(match["split"], []).extend(_files(child))
    if plain := _files(folder):
        found = found or {split or "train": plain}
    if any(found.values()):
        return {name: files for name, files in found.items() if files}
    if depth == 0:
        return {}
    below = {str(c): _splits_in(c, split, depth - 1) for c in _visible(folder) if c.is_dir()}
    return _one_set(folder, {name: splits for name, splits in below.items() if splits})


def _named(folder: Path) -> dict[str, Splits]:
    """Files whose names hold their split: data set -> split -> files."""
    found: dict[str, Splits] = {}
    for file in _files(folder):
        if match := _FILE_NAME.fullmatch(file.name):
            splits = found.setdefault(match["prefix"] or "", {})
            splits.setdefault(match["split"] or match["own"], []).append(file)
    for splits in found.values():
        for name, files in splits.items():
            _check_parts(name, files)
    return found


def _check_parts(split: str, files: Sequence[Path]) -> None:
    numbers: dict[int, set[int]] = defaultdict(set)
    for file in files:
        if (match := _FILE_NAME.fullmatch(file.name)) and match["parts"]:
            numbers[int(match["parts"])].add(int(_PART.search(file.name)[1]))  # type: ignore[index]
    for count, parts in numbers.items():
        # Some writers count from 1.
        wanted = set(range(min(parts), min(parts) + count)) if min(parts) < 2 else set(range(count))
        if missing := sorted(wanted - parts):
            raise DataError(
                f"parts of the split {split} are missing",
                given=f"{len(parts)} of {count} in {files[0].parent}",
                change=f"download part {', '.join(map(str, missing[:5]))} too",
            )


def _one_set(where: Path, sets: Mapping[str, Splits]) -> Splits:
    if len(sets) > 1:
        choices = ", ".join(f"parquet:{where / name}" for name in sorted(sets))
        raise DataError("the folder holds several data sets", given=str(where), allowed=choices)
    return next(iter(sets.values()), {})


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def _files(folder: Path) -> list[Path]:
    found = [path for path in _visible(folder) if path.suffix == ".parquet"]
    if found and (folder / MANIFEST_NAME).exists():
        raise DataError(
            "this is a finished shard set, not a source",
            given=str(folder),
            change="train on it with data.shards, or name the files that it was made from",
        )
    return found


class _Columns(NamedTuple):
    """What a file holds that must agree in all files of a split."""

    image: str
    label: str
    raw_bytes: int | None
    """Bytes of a raw image; None where images are encoded."""
    text_labels: bool


class ParquetSplit:
    """Rows of Parquet files with an image and a label column.

    The image column is `fixed_size_binary` (raw uint8; the shape comes from the file's metadata or the
    length), binary (an encoded image), or a struct with a `bytes` field, as Hugging Face writes it.
    Labels are integers, or text whose distinct values are the classes. Class names come from the
    metadata `class_names` (a JSON list), or Hugging Face's `ClassLabel`.

    Args:
        files: Files of the split.
        everything: Files of all splits of the source, which share one numbering of the classes.

    Raises:
        DataError: If a file is unreadable, columns are missing or of another kind, or labels do not
            fit the classes.
    """

    def __init__(self, files: Sequence[Path], everything: Sequence[Path] = ()) -> None:
        self._files = tuple(files)
        self._open = lru_cache(maxsize=4)(_open_parquet)
        # (file, row group, first sample) of every row group, in order.
        self._groups: list[tuple[int, int, int]] = []
        self.num_samples = total = 0
        first: _Columns | None = None
        digest = hashlib.sha256()
        for index, file in enumerate(self._files):
            with _open_parquet(file) as part:
                columns = _columns(part.schema_arrow, file)
                first = first or columns
                if columns != first:
                    raise DataError(
                        "Parquet files of one split have different image or label columns",
                        given=f"{self._files[0].name}, {file.name}",
                    )
                if index == 0:
                    self._has_key = "key" in part.schema_arrow.names
                    texts = _Texts(part.schema_arrow, file)
                    self.raw_shape = (
                        None if columns.raw_bytes is None else _raw_shape(columns.raw_bytes, texts)
                    )
                    self._planar = (texts.get("layout") or "HWC").upper() == "CHW"
                self._has_key &= part.schema_arrow.names.count("key") == 1
                for group in range(part.metadata.num_row_groups):
                    info = part.metadata.row_group(group)
                    self._groups.append((index, group, self.num_samples))
                    self.num_samples += info.num_rows
                    total += info.total_byte_size
            digest.update(_footer(file))
        assert first is not None
        self._columns = first
        raw = math.prod(self.raw_shape) if self.raw_shape else None
        self.bytes_per_sample = float(raw or total / max(self.num_samples, 1))
        parts = [_labels(file, first.label) for file in self._files]
        self.class_names = _classes(self._files, [*everything], parts)
        self._values = pa.array(self.class_names, pa.string())
        for file, part in zip(self._files, parts, strict=True):
            labels = self._numbers(part, file)
            check_class_labels(labels, len(self.class_names), file.name)
            digest.update(labels.tobytes())
        self.quick_fingerprint = digest.hexdigest()

    @property
    def columns(self) -> tuple[Column, ...]:
        return image_columns(self.raw_shape, self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the labels and of every byte of the files."""
        digest = hashlib.sha256(self.quick_fingerprint.encode())
        for path in self._files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Records]:
        names = [self._columns.image, self._columns.label, *(["key"] if self._has_key else [])]
        for position, (file, group, first) in enumerate(self._groups):
            following = self._groups[position + 1 :]
            last = following[0][2] if following else self.num_samples
            if last <= start or first >= stop:
                continue
            path = self._files[file]
            try:
                table = self._open(path).read_row_group(group, columns=names)
                low, high = max(start - first, 0), min(stop, last) - first
                pieces = [
                    table.slice(at, min(BATCH_ROWS, high - at)).combine_chunks()
                    for at in range(low, high, BATCH_ROWS)
                ]
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, error) from None
            for index, piece in enumerate(pieces):
                yield self._records(piece, path, first + low + index * BATCH_ROWS)

    def _records(self, piece: pa.Table, file: Path, first: int) -> Records:
        column = piece.column(self._columns.image).combine_chunks()
        if pa.types.is_struct(column.type):
            paths = column.field("path") if column.type.get_field_index("path") >= 0 else None
            column = column.field("bytes")
            if paths is not None and len(column) and column.null_count == len(column):
                raise DataError(
                    f"{file.name} holds the paths of images, not the images",
                    given=str(paths[0]),
                    change="write it again with the images embedded, or use imagefolder:PATH",
                )
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
        labels = self._numbers(piece.column(self._columns.label), file)
        if self._has_key:
            keys = [str(key) for key in piece.column("key").to_pylist()]
        else:
            keys = [f"{file.stem}/{first + row}" for row in range(piece.num_rows)]
        return Records({"image": images, "label": labels}, keys)

    def _numbers(self, column: pa.ChunkedArray, file: Path) -> NDArray[np.int64]:
        """Class numbers of labels."""
        if self._columns.text_labels:
            text = column.cast(pa.string())
            column = pc.index_in(text, value_set=self._values)
            if column.null_count:
                unknown = pc.drop_null(pc.unique(text.filter(pc.is_null(column))))
                raise DataError(
                    f"a label of {file.name} is not a class",
                    given=unknown[0].as_py(),
                    allowed=f"{', '.join(self.class_names[:10])} …",
                )
        return np.asarray(column.to_numpy(), dtype=np.int64)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError, UnicodeEncodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError("not a readable Parquet file", given=ascii(str(path))[1:-1], change=str(error))


class _Texts:
    """The text metadata of a file."""

    def __init__(self, schema: pa.Schema, file: Path) -> None:
        self._values = schema.metadata or {}
        self.file = file

    def get(self, key: str) -> str | None:
        """The value of a key.

        Raises:
            DataError: If it is not UTF-8.
        """
        value = self._values.get(key.encode())
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError as error:
            raise self._bad(key, str(error)) from None

    def json(self, key: str) -> Any:
        """The value of a key that holds JSON; None without the key."""
        text = self.get(key)
        try:
            return None if text is None else parsed(text)
        except ValueError as error:
            raise self._bad(key, str(error)) from None

    def integer(self, key: str, default: int | None = None) -> int:
        text = self.get(key) or str(default)
        if not text.isdecimal():
            raise self._bad(key, f"{text!r} is not a whole number")
        return int(text)

    def features(self) -> dict[str, Any]:
        """Hugging Face's description of each column."""
        found = self.json("huggingface")
        for key in ("info", "features"):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def class_names(self, label: str) -> list[str] | None:
        """The names of the classes, where the file has them."""
        names, key = self.json("class_names"), "class_names"
        if names is None:
            feature = self.features().get(label)
            names, key = feature.get("names") if isinstance(feature, dict) else None, "huggingface"
        if names is None:
            return None
        if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise self._bad(key, "the class names are not a list of text")
        return names

    def _bad(self, key: str, problem: str) -> DataError:
        return DataError(f"unusable metadata {key} in {self.file.name}", change=problem)


def _columns(schema: pa.Schema, file: Path) -> _Columns:
    features = _Texts(schema, file).features()
    image = _column(schema, _IMAGE_COLUMNS, "Image", features, file)
    label = _column(schema, _LABEL_COLUMNS, "ClassLabel", features, file)
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and (at := kind.get_field_index("bytes")) >= 0:
        kind = kind.field(at).type
    if not _is_binary(kind) and not pa.types.is_fixed_size_binary(kind):
        raise DataError(
            f"column {image} of {file.name} holds no images",
            given=_short(schema.field(image).type),
            allowed="encoded images (binary), raw pixels (fixed_size_binary), or a struct with bytes",
        )
    values = schema.field(label).type
    if pa.types.is_dictionary(values):
        values = values.value_type
    text = pa.types.is_string(values) or pa.types.is_large_string(values)
    text = text or pa.types.is_string_view(values)
    if not (text or pa.types.is_integer(values) or pa.types.is_boolean(values)):
        raise DataError(
            f"column {label} of {file.name} holds no classes",
            given=_short(schema.field(label).type),
            allowed="integers from 0, or text",
        )
    raw = kind.byte_width if pa.types.is_fixed_size_binary(kind) else None
    return _Columns(image, label, raw, text)


def _column(
    schema: pa.Schema, names: Sequence[str], kind: str, features: Mapping[str, Any], file: Path
) -> str:
    """A column by its usual names, or the only one of its kind in Hugging Face's description."""
    described = [
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind
    ]
    for name in (*names, *(described if len(described) == 1 else ())):
        if name in schema.names:
            if schema.names.count(name) > 1:
                raise DataError(f"{file.name} has several columns {name}")
            return name
    raise DataError(
        f"{file.name} has no {names[0]} column",
        given=", ".join(schema.names),
        allowed=" or ".join(names),
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:80]} …"


def _labels(file: Path, name: str) -> pa.ChunkedArray:
    """A file's label column as integers or text.

    Raises:
        DataError: If it cannot be read or holds nulls.
    """
    try:
        with _open_parquet(file) as part:
            column = part.read(columns=[name]).column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from None
    if column.null_count:
        raise DataError(
            f"column {name} of {file.name} must have no nulls", given=f"{column.null_count} nulls"
        )
    return column


def _raw_shape(width: int, texts: _Texts) -> tuple[int, int, int]:
    if texts.get("height") and texts.get("width"):
        shape = (texts.integer("channels", 1), texts.integer("height"), texts.integer("width"))
        if math.prod(shape) == width:
            return shape
    else:
        for channels in (1, 3):
            side = math.isqrt(width // channels)
            if channels * side * side == width:
                return channels, side, side
    raise DataError(
        f"unknown image shape in {texts.file.name}",
        given=f"{width} bytes per image",
        allowed="metadata height, width, channels whose product is the size, or square images",
    )


def _classes(
    files: Sequence[Path], everything: Sequence[Path], labels: Sequence[pa.ChunkedArray]
) -> tuple[str, ...]:
    """Names of the classes of a source: those of the metadata, or the labels of all its splits."""
    named: tuple[list[str], Path] | None = None
    found = [pc.unique(column) for column in labels]
    for file in dict.fromkeys((*files, *everything)):
        try:
            with _open_parquet(file) as part:
                label = _columns(part.schema_arrow, file).label
                names = _Texts(part.schema_arrow, file).class_names(label)
            if file not in files and names is None:
                found.append(pc.unique(_labels(file, label)))
        except DataError:
            if file in files:
                raise
            continue  # Another split, which may be unlabelled.
        if names and named and names != named[0]:
            raise DataError(
                "files of one source name their classes differently",
                given=f"{named[1].name}, {file.name}",
            )
        named = (names, file) if names else named
    if named:
        return tuple(named[0])
    distinct = {value for values in found for value in values.to_pylist()}
    text = {value for value in distinct if isinstance(value, str)}
    if text and len(text) < len(distinct):
        raise DataError("some files of one source label with text, others with integers")
    if text:
        numeric = all(value.isdecimal() for value in text)
        return tuple(sorted(text, key=(lambda name: (int(name), name)) if numeric else None))
    count = max(map(int, distinct), default=-1) + 1
    if count > _MANY_CLASSES and 10 * len(distinct) < count:
        raise DataError(
            f"the labels of {files[0].name} look like ids, not classes",
            given=f"{len(distinct):,} distinct labels up to {count - 1:,}",
            allowed="integers from 0 to the number of classes - 1, or text",
        )
    return tuple(map(str, range(count)))


def _footer(path: Path) -> bytes:
    # It describes every page (sizes, statistics), and reading it does not cost the file.
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - (256 << 10)))
        return hashlib.sha256(str(size).encode() + file.read()).digest()
