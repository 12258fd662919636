"""A person's own map-style dataset: `python:package.module:factory`."""

from __future__ import annotations

import hashlib
import importlib
import io
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.columns import BOX, IGNORED, Column, Role
from elastic_kfac.data.decode import decode_mask
from elastic_kfac.data.sources.options import Options, openers, share_of
from elastic_kfac.data.sources.source import ColumnSplit, Source, fixed_shuffle
from elastic_kfac.errors import DataError

TARGET_NAMES: Final = ("target", "targets", "label", "labels", "y", "mask", "boxes")
_PROBES: Final = 256


def own_dataset(rest: str, split: str | None) -> Source:
    """`package.module:factory`, which returns a dataset, or a mapping of splits to datasets.

    A dataset has `len` and `[index]`; a sample is a mapping of names to values, or (input, target). Its
    attribute `columns`, a sequence of `Column`, describes the values; without it columns are read off
    some samples: images of PIL or bytes, numbers of NumPy or torch, `int` for classes, 1-D integers
    for tokens. `classes` names the classes, `vocabulary` is the number of different tokens.

    Raises:
        DataError: If it cannot be imported, its code fails, or its samples cannot be described.
    """
    options = Options("python", rest, ())
    module, _, name = options.path.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            "the dataset cannot be imported",
            given=rest,
            allowed="python:package.module:factory",
            change=f"{error}; put its folder on PYTHONPATH",
        ) from None
    try:
        made = factory()
    except Exception as error:
        raise DataError(
            "the factory of the dataset failed", given=rest, change=_place_of(error)
        ) from error
    splits = dict(made) if isinstance(made, Mapping) else {split or "train": made}
    if not splits:
        raise DataError("the factory returned no split", given=rest)
    for key, each in splits.items():
        if not (hasattr(each, "__len__") and hasattr(each, "__getitem__")):
            raise DataError(
                "the factory returned no map-style dataset",
                given=f"{type(each).__name__}{'' if each is made else f' as split {key}'}",
                allowed="an object with len and [index], or a mapping of splits to such objects",
            )

    def make(name: str, begin: float, end: float) -> ColumnSplit:
        return _split(splits[name], options.path, name, begin, end)

    return Source(options.name, openers(splits, options.held_out, make))


def _split(dataset: Any, origin: str, name: str, begin: float, end: float) -> ColumnSplit:
    count = len(dataset)
    if not count:
        raise DataError("the dataset has no samples", given=f"{origin}, split {name}")

    @lru_cache(maxsize=1024)
    def read(index: int) -> dict[str, Any]:
        try:
            sample = dataset[index]
        except Exception as error:
            raise DataError(
                "the dataset failed",
                given=f"sample {index} of {origin}, split {name}",
                change=_place_of(error),
            ) from error
        return _named(sample)

    # Spread evenly, so that a changed dataset is likely to be noticed.
    places = np.unique(np.linspace(0, count - 1, min(count, _PROBES)).astype(np.int64))
    probes = [read(index) for index in places.tolist()]
    for index, probe in zip(places.tolist(), probes, strict=True):
        if probe.keys() != probes[0].keys():
            raise DataError(
                "samples of a dataset have different values",
                given=f"sample {index}: {', '.join(probe)}",
                allowed=f"as in sample 0: {', '.join(probes[0])}",
            )
    columns = tuple(getattr(dataset, "columns", ())) or tuple(
        _column(key, dataset, [probe[key] for probe in probes], partial(_all, read, key, count))
        for key in probes[0]
    )
    digest = hashlib.sha256(repr((origin, name, count, columns, begin, end)).encode())
    for probe in probes:
        for value in probe.values():
            digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
    size = sum(
        len(value) if isinstance(value, bytes) else np.asarray(value).nbytes
        for probe in probes
        for value in probe.values()
    )

    def load(chosen: NDArray[np.int64]) -> dict[str, Any]:
        samples = [read(index) for index in chosen.tolist()]
        return {
            column.name: _stacked(column, [sample[column.name] for sample in samples])
            for column in columns
        }

    return ColumnSplit(
        columns=columns,
        load=load,
        key=lambda index: f"{name}/{index}",
        order=fixed_shuffle(count)[share_of(count, begin, end)],
        bytes_per_sample=max(1.0, size / len(probes)),
        fingerprint=digest.hexdigest(),
    )


def _all(read: Any, key: str, count: int) -> Sequence[Any]:
    return [read(index)[key] for index in range(count)]


def _named(sample: Any) -> dict[str, Any]:
    """The values of a sample by column, images as bytes."""
    if not isinstance(sample, Mapping):
        parts = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
        if len(parts) > 2:
            raise DataError(
                "a sample of more than two values needs their names",
                given=f"{len(parts)} values",
                allowed="(input, target), or a mapping of names to values",
            )
        sample = dict(zip(("input", "target"), parts, strict=False))
    return {str(name): _plain(value) for name, value in sample.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "save") and hasattr(value, "convert"):  # PIL's images.
        out = io.BytesIO()
        value.save(out, "PNG", compress_level=1)
        return out.getvalue()
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]  # A class as a tensor or an array is a class as well.
    return int(value) if isinstance(value, bool | np.bool_) else value


def _place_of(error: Exception) -> str:
    """What a person's own code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({frames[-1].filename}, line {frames[-1].lineno})"


def _column(name: str, dataset: Any, values: Sequence[Any], everything: Any) -> Column:
    role: Role = "target" if name in TARGET_NAMES else "input"
    first = values[0]
    if isinstance(first, bytes):
        if name == "mask":
            names = _classes(dataset, lambda: map(_largest, map(decode_mask, everything())))
            return Column(name, "mask", role, encoding="encoded", class_names=names)
        return Column(name, "image", role, encoding="encoded")
    if isinstance(first, int | np.integer):
        return Column(name, "class", role, class_names=_classes(dataset, everything))
    arrays = [np.asarray(value) for value in values]
    shape, dtype = arrays[0].shape, arrays[0].dtype
    if dtype == np.uint8 and len(shape) == 3 and role == "input":
        return Column(name, "image", role, shape=shape)
    if name == "mask" and len(shape) == 2 and dtype.kind in "iu":
        names = _classes(dataset, lambda: map(_largest, everything()))
        return Column(name, "mask", role, shape=shape, class_names=names)
    if name == "boxes" and shape[-1:] == (BOX,):
        names = _classes(dataset, lambda: (boxes[:, -1].max(initial=0) for boxes in everything()))
        return Column(name, "boxes", role, class_names=names)
    if dtype.kind in "iu" and len(shape) == 1:
        vocabulary = getattr(dataset, "vocabulary", None)
        if vocabulary is None:
            vocabulary = int(max(np.max(value) for value in everything())) + 1
        return Column(name, "tokens", role, vocabulary=int(vocabulary))
    if dtype.kind not in "biuf":
        raise DataError(
            "a value that no column holds",
            given=f"{name}: {type(first).__name__}",
            change="give the dataset an attribute `columns`",
        )
    kept = np.float32 if dtype.kind == "f" else dtype
    return Column(name, "tensor", role, dtype=np.dtype(kept).name, shape=shape or (1,))


def _classes(dataset: Any, largest: Callable[[], Iterable[Any]]) -> tuple[str, ...]:
    """The names that the dataset gives, or the numbers that occur."""
    names = getattr(dataset, "classes", None)
    return tuple(map(str, range(int(max(largest())) + 1) if names is None else names))


def _largest(mask: NDArray[Any]) -> int:
    pixels = np.asarray(mask)
    return int(pixels[pixels != IGNORED].max(initial=0))


def _stacked(column: Column, values: Sequence[Any]) -> Any:
    """The values of a column as `data.columns` describes them."""
    if column.encoding == "encoded" or column.kind in ("tokens", "boxes"):
        return list(values)
    arrays = [np.asarray(value) for value in values]
    wrong = [array.shape for array in arrays if array.size != np.prod(column.shape or (1,))]
    if wrong and column.kind != "class":
        raise DataError(
            f"values of {column.name} have different shapes",
            given=wrong[0],
            allowed=column.shape,
        )
    flat = np.stack(arrays)
    if column.kind in ("image", "mask"):
        return flat.reshape(len(flat), -1).astype(np.uint8)
    if column.kind == "tensor":
        return flat.reshape(len(flat), *(column.shape or ()))
    return flat.astype(np.int64)
