"""Tables of numbers: Parquet files, and NumPy's .npz files with one array per column."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elastic_kfac.data.columns import Column
from elastic_kfac.data.sources.options import (
    Options,
    content_hash,
    files_by_split,
    openers,
    share_of,
)
from elastic_kfac.data.sources.source import ColumnSplit, Source, fixed_shuffle
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

SUFFIXES = (".parquet", ".npz")
FEATURES = "features"
"""The input that all columns of single numbers are joined into."""


def table(rest: str, split: str | None) -> Source:
    """`PATH?targets=y[&inputs=a,b][&classes=y]`.

    Columns of single numbers are joined into one vector; a column of lists of equal length, or an array
    with more dimensions, is a tensor of its own. `classes` names targets whose values are classes, as
    are all targets of text.

    Raises:
        DataError: If files or columns are missing or hold no numbers, or the options contradict.
    """
    options = Options("table", rest, ("targets", "inputs", "classes"))
    splits = files_by_split(user_path(options.path), SUFFIXES, split)
    targets = options.names("targets")
    if not targets:
        raise DataError(
            "a table needs the names of its targets",
            given=f"table:{rest}",
            change="add ?targets=NAME to the source",
        )
    if both := sorted(set(targets) & set(options.names("inputs"))):
        raise DataError(
            "a column of a table is both input and target",
            given=", ".join(both),
            change="leave it out of inputs or of targets",
        )
    if others := sorted(set(options.names("classes")) - set(targets)):
        raise DataError(
            "classes of a table are targets",
            given=", ".join(others),
            allowed=", ".join(targets),
            change="name it in targets as well",
        )

    def make(name: str, begin: float, end: float) -> ColumnSplit:
        return _split(splits, name, options, begin, end)

    return Source(options.name, openers(splits, options.held_out, make))


def _split(
    splits: dict[str, list[Path]], name: str, options: Options, begin: float, end: float
) -> ColumnSplit:
    files = splits[name]
    arrays = _arrays(files)
    targets, inputs = options.names("targets"), options.names("inputs")
    missing = sorted({*targets, *inputs} - arrays.keys())
    if missing:
        raise DataError(
            "the table has no such column",
            given=", ".join(missing),
            allowed=", ".join(arrays),
        )
    if not inputs:
        others = [each for each in arrays if each not in targets]
        inputs = [each for each in others if arrays[each].dtype.kind in "biuf"]
        if left := [each for each in others if each not in inputs]:
            warnings.warn(
                f"{options.name}: left out of the inputs, because they hold no numbers: "
                f"{', '.join(left[:5])}{' …' if len(left) > 5 else ''}",
                stacklevel=3,
            )
    classes = {each for each in targets if arrays[each].dtype.kind in "OUS"}
    classes |= set(options.names("classes"))
    for each in classes:
        if arrays[each].ndim > 1 or _has_fractions(arrays[each]):
            raise DataError(
                "a target of classes has one whole number or text per row",
                given=f"{each}: {arrays[each].dtype} of shape {arrays[each].shape}",
                change="leave it out of classes",
            )
    columns: list[Column] = []
    values: dict[str, NDArray[Any]] = {}
    flat = [each for each in inputs if arrays[each].ndim == 1]
    if flat:
        stacked = np.stack([_numbers(arrays[each], each) for each in flat], axis=1)
        values[FEATURES] = stacked.astype(np.float32)
        columns.append(_tensor(FEATURES, values[FEATURES], "input"))
    for each in inputs:
        if each not in flat:
            values[each] = _numbers(arrays[each], each)
            columns.append(_tensor(each, values[each], "input"))
    for each in targets:
        if each in classes:
            known = sorted(
                {str(v) for part in splits for v in _arrays(splits[part])[each]}, key=_by_number
            )
            places = {value: place for place, value in enumerate(known)}
            values[each] = np.array([places[str(v)] for v in arrays[each]], dtype=np.int64)
            columns.append(Column(each, "class", "target", class_names=tuple(known)))
        else:
            found = _numbers(arrays[each], each).astype(np.float32)
            values[each] = found.reshape(len(found), -1) if found.ndim == 1 else found
            columns.append(_tensor(each, values[each], "target"))
    count = len(next(iter(values.values())))
    shuffled = fixed_shuffle(count)
    return ColumnSplit(
        columns=tuple(columns),
        load=lambda chosen: {each: part[chosen] for each, part in values.items()},
        key=lambda index: f"{name}/{index}",
        order=shuffled[share_of(count, begin, end)],
        bytes_per_sample=float(sum(part[:1].nbytes for part in values.values()) or 1),
        fingerprint=content_hash(files, (options.name, begin, end)),
    )


def _has_fractions(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "f" and bool((values != np.floor(values)).any())


def _by_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _tensor(name: str, values: NDArray[Any], role: Any) -> Column:
    return Column(name, "tensor", role, dtype=values.dtype.name, shape=values.shape[1:])


def _numbers(values: NDArray[Any], name: str) -> NDArray[Any]:
    if values.dtype.kind not in "biuf":
        raise DataError(
            "a column of a table holds no numbers",
            given=f"{name}: {values.dtype}",
            change="leave it out of inputs, or name it in classes if it is a target",
        )
    with np.errstate(over="ignore"):  # Writing the shard names the record.
        return values.astype(np.float32) if values.dtype.kind == "f" else values


def _arrays(files: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """All columns of the files of a split, samples first."""
    parts = [_read(file) for file in files]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise DataError("files of one split have different columns", given=files[0].name)
    try:
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:  # A single number, or rows of another shape in another file.
        raise DataError(
            "arrays of a table have no common rows", given=files[0].name, change=str(error)
        ) from None
    counts = {name: len(values) for name, values in joined.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise DataError("columns of a table have different lengths", given=listed)
    if not any(counts.values()):
        raise DataError("a table without rows", given=", ".join(file.name for file in files))
    return joined


def _read(file: Path) -> dict[str, NDArray[Any]]:
    if file.suffix.lower() not in SUFFIXES:
        raise DataError(
            "a table of an unknown kind", given=str(file), allowed=f"*{', *'.join(SUFFIXES)}"
        )
    return _npz(file) if file.suffix.lower() == ".npz" else _parquet(file)


def _npz(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError("not a readable .npz file", given=str(file), change=str(error)) from None


def _parquet(file: Path) -> dict[str, NDArray[Any]]:
    try:
        read = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError("not a readable Parquet file", given=str(file), change=str(error)) from None
    found = {}
    for name in read.column_names:
        column = read.column(name)
        if column.null_count:
            raise DataError(
                "a column of a table has missing values",
                given=f"{name} in {file.name}: {column.null_count}",
                change="fill them in, or leave the rows out",
            )
        if pa.types.is_decimal(column.type):
            column = column.cast(pa.float64())
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            rows = column.to_pylist()
            if len({len(row) for row in rows}) > 1:
                raise DataError(
                    "lists of a column have different lengths", given=name, change="pad them"
                )
            found[name] = np.asarray(rows)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found[name] = np.asarray(column.to_pylist(), dtype=object)
        else:
            found[name] = column.to_numpy()
    return found
