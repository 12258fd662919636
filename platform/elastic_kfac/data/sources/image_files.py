"""Class folders and torchvision data sets, written in a fixed shuffle."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.columns import check_class_labels
from elastic_kfac.data.sources.source import (
    ColumnSplit,
    Images,
    Source,
    fixed_shuffle,
    image_split,
    is_hidden,
)
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

IMAGE_SUFFIXES: Final = tuple(
    ".jpg .jpeg .png .webp .bmp .ppm .pgm .tif .tiff .gif .jp2".split()  # noqa: SIM905
)
SPLIT_FOLDERS: Final = {
    **{name: name for name in ("train", "test", "val", "valid", "validation")},
    "training": "train",
    "testing": "test",
}
"""Name of a folder in lower case -> split."""
OTHER_SUFFIXES: Final = tuple(
    ".txt .csv .tsv .json .xml .yaml .yml .md .html .log .db .ini .py .zip .tar .gz".split()  # noqa: SIM905
)
"""Files that people keep beside images: left out without a word."""
TORCHVISION_ROOT: Final = "data/torchvision"


def image_folder(root: Path, split: str | None) -> Source:
    """`PATH/<class>/*.jpg`, or `PATH/train/<class>/…` and `PATH/test/<class>/…`.

    Raises:
        DataError: If there is no such folder or it has no class folders.
    """
    if not root.is_dir():
        raise DataError("no such image folder", given=str(root))
    splits = _splits_below(root) or {split or "train": root}
    # One numbering for all splits, even where a split lacks a class.
    folders = (path for folder in splits.values() for path in folder.iterdir() if path.is_dir())
    classes = sorted({path.name for path in folders if not is_hidden(path.name)})
    if not classes:
        raise DataError("no class folders", given=str(root), allowed="PATH/<class>/<image>")
    return Source(
        f"imagefolder:{root.name}",
        {name: partial(_folder_split, folder, classes) for name, folder in splits.items()},
    )


def _splits_below(root: Path) -> dict[str, Path]:
    splits: dict[str, Path] = {}
    others = []
    for path in sorted(root.iterdir()):
        if is_hidden(path.name) or not path.is_dir():
            continue
        split = SPLIT_FOLDERS.get(path.name.lower())
        if split is None:
            others.append(path.name)
        elif split in splits:
            raise DataError(
                f"two folders of the split {split}", given=f"{splits[split].name}, {path.name}"
            )
        else:
            splits[split] = path
    if splits and others:
        warnings.warn(
            f"{root}: left out {', '.join(others[:5])}, which are no splits "
            f"({', '.join(SPLIT_FOLDERS)})",
            stacklevel=3,
        )
    return splits


def _folder_split(folder: Path, classes: Sequence[str]) -> ColumnSplit:
    names: list[str] = []
    labels: list[int] = []
    total = 0
    digest = hashlib.sha256()
    others: Counter[str] = Counter()
    without = []
    for label, class_name in enumerate(classes):
        images = sorted(_images_below(folder / class_name, others))
        if not images and (folder / class_name).is_dir():
            without.append(class_name)
        for path in images:
            name = path.relative_to(folder).as_posix()
            try:
                size = path.stat().st_size
                digest.update(f"{name}\0{size}\n".encode())
            except (OSError, UnicodeEncodeError) as error:
                raise DataError(
                    "unusable image file",
                    given=ascii(str(path)),
                    change="give it a name in UTF-8"
                    if isinstance(error, ValueError)
                    else str(error),
                ) from None
            total += size
            names.append(name)
            labels.append(label)
    if without:
        listed = ", ".join(map(repr, without[:5]))
        warnings.warn(f"{folder}: no images of the classes {listed}", stacklevel=3)
    if others:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(5))
        warnings.warn(f"{folder}: left out files that are no images: {listed}", stacklevel=3)
    return image_split(
        load=lambda chosen: [(folder / names[i]).read_bytes() for i in chosen],
        key=names.__getitem__,
        labels=np.asarray(labels, dtype=np.int64),
        order=fixed_shuffle(len(names)),
        class_names=tuple(classes),
        bytes_per_sample=max(1.0, total / max(1, len(names))),
        fingerprint=digest.hexdigest(),
    )


def _images_below(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """Image files at any depth; folders behind links are included once.

    Args:
        others: Receives the suffixes of other files.
    """
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            if is_hidden(name):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(where, name)
            elif not name.lower().endswith(OTHER_SUFFIXES):
                others[Path(name).suffix.lower() or name] += 1


def torchvision_names() -> list[str]:
    """Classes of `torchvision.datasets`; none where torchvision is not installed."""
    try:
        import torchvision.datasets
    except ImportError:
        return []
    return sorted(name for name in dir(torchvision.datasets) if name[0].isupper())


def torchvision_data(text: str) -> Source:
    """`NAME[:ROOT]`: a class of `torchvision.datasets`, kept in (or downloaded to) ROOT.

    Raises:
        DataError: If torchvision has no such data set.
    """
    import torchvision.datasets

    name, _, root = text.partition(":")
    kind = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(kind):
        known = torchvision_names()
        close = [each for each in known if each.lower() == name.lower()]
        close = close or difflib.get_close_matches(name, known, n=1)
        raise DataError(
            "no such torchvision data set",
            given=name,
            allowed=", ".join(known),
            change=f"did you mean {close[0]}?" if close else None,
        )
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        choices: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in parameters:
        choices = {"train": {"split": "train"}, "test": {"split": "test"}}
    else:
        choices = {"train": {}}
    folder = user_path(root or TORCHVISION_ROOT)
    return Source(
        f"torchvision:{name}",
        {s: partial(_torchvision_split, kind, folder, options) for s, options in choices.items()},
    )


def _torchvision_split(kind: type[Any], folder: Path, options: dict[str, Any]) -> ColumnSplit:
    """Raw pixels where the data set holds one array, lossless PNG otherwise."""
    data = _open_torchvision(kind, folder, options)
    found = (getattr(data, name, None) for name in ("targets", "labels", "_labels"))
    listed = next((labels for labels in found if labels is not None), None)
    if listed is None:
        raise DataError("not a data set of labelled images", given=kind.__name__)
    labels = np.asarray(listed).astype(np.int64)
    names = getattr(data, "classes", None) or range(int(labels.max()) + 1)
    class_names = tuple(map(str, names))
    check_class_labels(labels, len(class_names), kind.__name__)
    digest = hashlib.sha256(labels.tobytes())

    def png(index: int) -> bytes:
        out = io.BytesIO()
        data[index][0].convert("RGB").save(out, "PNG", compress_level=1)
        return out.getvalue()

    def load(chosen: NDArray[np.int64]) -> Images:
        if pixels is None:
            return [png(index) for index in chosen.tolist()]
        return np.ascontiguousarray(pixels[chosen]).reshape(len(chosen), -1)

    pixels = _planar(getattr(data, "data", None))
    raw_shape: tuple[int, int, int] | None = None
    if pixels is not None:
        _, channels, height, width = pixels.shape
        raw_shape, size = (channels, height, width), float(channels * height * width)
        digest.update(np.ascontiguousarray(pixels).tobytes())
    else:
        probe = [len(png(index)) for index in range(min(16, len(labels)))]
        size = float(np.mean(probe))
        digest.update(f"{kind.__name__} {options} {probe}".encode())
    return image_split(
        load=load,
        key=str,
        labels=labels,
        order=fixed_shuffle(len(labels)),
        class_names=class_names,
        bytes_per_sample=size,
        fingerprint=digest.hexdigest(),
        raw_shape=raw_shape,
    )


def _open_torchvision(kind: type[Any], folder: Path, options: dict[str, Any]) -> Any:
    parameters = inspect.signature(kind).parameters
    arguments = {**({"root": str(folder)} if "root" in parameters else {}), **options}
    try:
        try:
            return kind(**arguments)
        except RuntimeError:
            if "download" not in parameters:
                raise
            return kind(**arguments, download=True)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot open torchvision's {kind.__name__}",
            given=f"root {folder}",
            change=str(error) or type(error).__name__,
        ) from None


def _planar(data: Any) -> NDArray[np.uint8] | None:
    """One uint8 array as [n, channels, height, width], None if it is something else."""
    if data is None or not hasattr(data, "dtype"):
        return None
    pixels: NDArray[np.uint8] = np.asarray(data)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        return None
    if pixels.ndim == 3:
        return pixels[:, None]
    channels_last = pixels.shape[3] in (1, 3) and pixels.shape[1] not in (1, 3)
    return pixels.transpose(0, 3, 1, 2) if channels_last else pixels
