"""Sources of image files: class folders, torchvision data sets, and ILSVRC2012 as downloaded.

These list their samples class by class, so a fixed shuffle goes before the cut into shards: then every
shard, and every block of an epoch, is a fair sample of the classes.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key
from elastic_kfac.data.sources import TORCHVISION_ROOT, Records, Source, check_class_labels
from elastic_kfac.errors import DataError

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
SPLIT_FOLDERS: Final = ("train", "test", "val", "valid", "validation")
_BATCH_ROWS: Final = 256


def fixed_shuffle(count: int) -> NDArray[np.int64]:
    """The order in which `count` listed samples are written; the same on every machine."""
    return permutation(stream_key(SOURCE_SHUFFLE, count), np.arange(count, dtype=np.int64))


# --- Class folders -----------------------------------------------------------------------------


def image_folder(root: Path, split: str | None) -> Source:
    """`PATH/<class>/*.jpg`, or `PATH/train/<class>/…` and `PATH/test/<class>/…`.

    Raises:
        DataError: If there is no such folder or it has no class folders.
    """
    if not root.is_dir():
        raise DataError("no such image folder", given=str(root))
    splits = {name: root / name for name in SPLIT_FOLDERS if (root / name).is_dir()}
    splits = splits or {split or "train": root}
    # One numbering for all splits, even where a split lacks a class.
    classes = sorted({p.name for folder in splits.values() for p in folder.iterdir() if p.is_dir()})
    if not classes:
        raise DataError("no class folders", given=str(root), allowed="PATH/<class>/<image>")
    return Source(
        f"imagefolder:{root.name}",
        {name: partial(FolderSplit, folder, classes) for name, folder in splits.items()},
    )


class FolderSplit:
    """Image files below one folder per class; the files' bytes are kept as they are."""

    raw_shape = None

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.class_names = tuple(classes)
        self._folder = folder
        self._paths: list[str] = []
        labels: list[int] = []
        total = 0
        digest = hashlib.sha256()
        for label, name in enumerate(classes):
            for path in sorted((folder / name).rglob("*")):
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                size = path.stat().st_size
                key = path.relative_to(folder).as_posix()
                digest.update(f"{key}\0{size}\n".encode())
                total += size
                self._paths.append(key)
                labels.append(label)
        self.num_samples = len(self._paths)
        self.bytes_per_sample = max(1.0, total / max(1, self.num_samples))
        self.fingerprint = digest.hexdigest()
        self._labels = np.asarray(labels, dtype=np.int64)
        self._order = fixed_shuffle(self.num_samples)

    def read(self, start: int, stop: int) -> Iterator[Records]:
        for chosen in _chunks(self._order[start:stop]):
            keys = [self._paths[i] for i in chosen]
            images = [(self._folder / key).read_bytes() for key in keys]
            yield Records(images, self._labels[chosen], keys)


# --- torchvision -------------------------------------------------------------------------------


def torchvision_source(text: str) -> Source:
    """`NAME[:ROOT]`: a class of `torchvision.datasets`, kept (or downloaded) below ROOT.

    Raises:
        DataError: If torchvision has no such data set.
    """
    import torchvision.datasets

    name, _, root = text.partition(":")
    kind = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(kind):
        known = sorted(n for n in dir(torchvision.datasets) if n[0].isupper())
        raise DataError("no such torchvision data set", given=name, allowed=", ".join(known))
    folder = Path(root or TORCHVISION_ROOT).expanduser()
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        choices: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in parameters:
        choices = {"train": {"split": "train"}, "test": {"split": "test"}}
    else:
        choices = {"train": {}}
    return Source(
        f"torchvision:{name}",
        {s: partial(TorchvisionSplit, kind, folder, options) for s, options in choices.items()},
    )


class TorchvisionSplit:
    """A torchvision data set: raw pixels where it holds one array, lossless PNG otherwise.

    Raises:
        DataError: If it cannot be opened or downloaded, or does not classify images.
    """

    def __init__(self, kind: type[Any], folder: Path, options: dict[str, Any]) -> None:
        self._data = _open_torchvision(kind, folder, options)
        labels = next(
            (
                getattr(self._data, attribute)
                for attribute in ("targets", "labels", "_labels")
                if hasattr(self._data, attribute)
            ),
            None,
        )
        if labels is None:
            raise DataError("not a data set of labelled images", given=kind.__name__)
        self._labels = np.asarray(labels).astype(np.int64)
        self.num_samples = len(self._labels)
        names = getattr(self._data, "classes", None) or range(int(self._labels.max()) + 1)
        self.class_names = tuple(map(str, names))
        check_class_labels(self._labels, len(self.class_names), kind.__name__)
        self._pixels = _planar(getattr(self._data, "data", None))
        digest = hashlib.sha256(self._labels.tobytes())
        self.raw_shape: tuple[int, int, int] | None = None
        if self._pixels is not None:
            channels, height, width = self._pixels.shape[1:]
            self.raw_shape = (channels, height, width)
            self.bytes_per_sample = float(channels * height * width)
            digest.update(np.ascontiguousarray(self._pixels).tobytes())
        else:
            probe = [len(self._png(i)) for i in range(min(16, self.num_samples))]
            self.bytes_per_sample = float(np.mean(probe))
            digest.update(f"{kind.__name__} {options} {probe}".encode())
        self.fingerprint = digest.hexdigest()
        self._order = fixed_shuffle(self.num_samples)

    def read(self, start: int, stop: int) -> Iterator[Records]:
        for chosen in _chunks(self._order[start:stop]):
            keys = [str(i) for i in chosen]
            if self._pixels is not None:
                rows = np.ascontiguousarray(self._pixels[chosen]).reshape(len(chosen), -1)
                yield Records(rows, self._labels[chosen], keys)
            else:
                images = [self._png(int(i)) for i in chosen]
                yield Records(images, self._labels[chosen], keys)

    def _png(self, index: int) -> bytes:
        image = self._data[index][0]
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG", compress_level=1)
        return out.getvalue()


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


def open_image_source(kind: str, rest: str, split: str | None) -> Source:
    """`imagefolder:PATH`, `torchvision:NAME[:ROOT]` or `ilsvrc:DIR`.

    Raises:
        DataError: If its files are not there.
    """
    if kind == "imagefolder":
        return image_folder(Path(rest).expanduser(), split)
    if kind == "torchvision":
        return torchvision_source(rest)
    from elastic_kfac.data.ilsvrc import ilsvrc_source

    return ilsvrc_source(Path(rest).expanduser())


def _chunks(order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for low in range(0, len(order), _BATCH_ROWS):
        yield order[low : low + _BATCH_ROWS]


class FileRanges:
    """Samples that are byte ranges of one big file (an uncompressed tar), read by position."""

    raw_shape = None

    def __init__(
        self,
        path: Path,
        class_names: Sequence[str],
        offsets: Sequence[int],
        sizes: Sequence[int],
        labels: Sequence[int],
        keys: Sequence[str],
    ) -> None:
        self.class_names = tuple(class_names)
        self.num_samples = len(keys)
        self._path = path
        self._offsets = np.asarray(offsets, dtype=np.int64)
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._labels = np.asarray(labels, dtype=np.int64)
        self._keys = list(keys)
        self._order = fixed_shuffle(self.num_samples)
        self.bytes_per_sample = max(1.0, float(self._sizes.mean())) if keys else 1.0
        digest = hashlib.sha256("\n".join(self._keys).encode())
        for part in (self._offsets, self._sizes, self._labels):
            digest.update(part.tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Records]:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            for chosen in _chunks(self._order[start:stop]):
                images = [self._bytes(descriptor, int(i)) for i in chosen]
                yield Records(images, self._labels[chosen], [self._keys[i] for i in chosen])
        finally:
            os.close(descriptor)

    def _bytes(self, descriptor: int, index: int) -> bytes:
        size = int(self._sizes[index])
        data = os.pread(descriptor, size, int(self._offsets[index]))
        if len(data) != size:
            raise DataError(
                f"{self._path.name} is truncated at {self._keys[index]}",
                given=f"{len(data)} bytes",
                allowed=f"{size} bytes",
                change="download it again",
            )
        return data
