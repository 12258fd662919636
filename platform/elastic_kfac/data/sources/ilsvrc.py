"""ILSVRC2012 (ImageNet-1k) from the files as downloaded, without unpacking them.

    ILSVRC2012_img_train.tar    a tar of 1,000 tars, one per class: n01440764.tar, …
    ILSVRC2012_img_val.tar      50,000 images: ILSVRC2012_val_00000001.JPEG, …
    labels of the validation images, one of
      ILSVRC2012_devkit_t12.tar.gz                     the official kit
      LOC_val_solution.csv                             lines `ILSVRC2012_val_00000001,n01751748 …`
      imagenet_2012_validation_synset_labels.txt       the n-th line is the n-th image's class

Classes are numbered in the order of their WordNet ids, as torchvision and most checkpoints do.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.sources.source import ColumnSplit, Source, fixed_shuffle, image_split
from elastic_kfac.errors import DataError

TRAIN_TAR: Final = "ILSVRC2012_img_train.tar"
VALIDATION_TAR: Final = "ILSVRC2012_img_val.tar"
KIT: Final = "ILSVRC2012_devkit_t12.tar.gz"
SOLUTION: Final = "LOC_val_solution.csv"
SYNSET_LABELS: Final = "imagenet_2012_validation_synset_labels.txt"


def ilsvrc(folder: Path) -> Source:
    """The splits whose tar exists: `train`, and `test` for the validation images.

    Raises:
        DataError: If neither tar exists.
    """
    openers: dict[str, Any] = {}
    if (folder / TRAIN_TAR).is_file():
        openers["train"] = partial(_train, folder)
    if (folder / VALIDATION_TAR).is_file():
        openers["test"] = partial(_validation, folder)
    if not openers:
        raise DataError(
            "no ILSVRC2012 tar files", given=str(folder), allowed=f"{TRAIN_TAR}, {VALIDATION_TAR}"
        )
    return Source("ilsvrc", openers)


def _train(folder: Path) -> ColumnSplit:
    path = folder / TRAIN_TAR
    images: list[_Image] = []
    with path.open("rb") as file:
        archives = sorted(
            (Path(name).stem, offset, size)
            for name, offset, size in _members(path, file)
            if name.endswith(".tar")
        )
        for label, (wnid, start, length) in enumerate(archives):
            for name, offset, size in _members(path, _Section(file, start, length)):
                images.append((f"{wnid}/{Path(name).name}", label, start + offset, size))
    return _byte_ranges(path, [wnid for wnid, _, _ in archives], images)


def _validation(folder: Path) -> ColumnSplit:
    path = folder / VALIDATION_TAR
    with path.open("rb") as file:
        members = sorted(m for m in _members(path, file) if m[0].lower().endswith(".jpeg"))
    truth = _validation_classes(folder)
    names = [Path(name).stem for name, _, _ in members]
    without = [name for name in names if name not in truth]
    if without:
        raise DataError(
            "validation images without a label", given=f"{len(without)}, the first: {without[0]}"
        )
    classes = sorted(_train_classes(folder) or set(truth.values()))
    number = {wnid: label for label, wnid in enumerate(classes)}
    unknown = sorted({truth[name] for name in names} - number.keys())
    if unknown:
        raise DataError(
            "validation classes that the training tar lacks", given=", ".join(unknown[:5])
        )
    images = [
        (f"{name}.JPEG", number[truth[name]], offset, size)
        for name, (_, offset, size) in zip(names, members, strict=True)
    ]
    return _byte_ranges(path, classes, images)


_Image = tuple[str, int, int, int]
"""(key, label, offset of the content in the tar, bytes)."""


def _byte_ranges(path: Path, classes: Sequence[str], images: Sequence[_Image]) -> ColumnSplit:
    keys = [key for key, *_ in images]
    labels, offsets, sizes = (
        np.array([numbers for _, *numbers in images], dtype=np.int64).reshape(-1, 3).T.copy()
    )
    digest = hashlib.sha256("\n".join(keys).encode())
    for part in (offsets, sizes, labels):
        digest.update(part.tobytes())

    def load(chosen: NDArray[np.int64]) -> list[bytes]:
        with path.open("rb") as file:
            return [content(file.fileno(), index) for index in chosen.tolist()]

    def content(descriptor: int, index: int) -> bytes:
        size = int(sizes[index])
        data = os.pread(descriptor, size, int(offsets[index]))
        if len(data) != size:
            raise DataError(
                f"{path.name} is truncated at {keys[index]}",
                given=f"{len(data)} bytes",
                allowed=f"{size} bytes",
                change="download it again",
            )
        return data

    return image_split(
        load=load,
        key=keys.__getitem__,
        labels=labels,
        order=fixed_shuffle(len(keys)),
        class_names=tuple(classes),
        bytes_per_sample=max(1.0, float(sizes.mean())) if keys else 1.0,
        fingerprint=digest.hexdigest(),
    )


def _train_classes(folder: Path) -> set[str]:
    path = folder / TRAIN_TAR
    if not path.is_file():
        return set()
    with path.open("rb") as file:
        return {Path(name).stem for name, _, _ in _members(path, file) if name.endswith(".tar")}


def _validation_classes(folder: Path) -> dict[str, str]:
    """WordNet id per validation image name, from the first label file that exists."""
    if (folder / KIT).is_file():
        return _numbered(_kit_labels(folder / KIT))
    if (folder / SOLUTION).is_file():
        lines = (folder / SOLUTION).read_text(encoding="utf-8").splitlines()
        pairs = (re.match(r"(ILSVRC2012_val_\d+),(n\d{8})", line) for line in lines)
        return {pair[1]: pair[2] for pair in pairs if pair}
    if (folder / SYNSET_LABELS).is_file():
        return _numbered((folder / SYNSET_LABELS).read_text(encoding="utf-8").split())
    raise DataError(
        "no labels for the validation images",
        given=str(folder),
        allowed=f"{KIT}, {SOLUTION} or {SYNSET_LABELS}",
    )


def _numbered(wnids: list[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(wnids, start=1)}


def _kit_labels(path: Path) -> list[str]:
    loadmat: Any = importlib.import_module("scipy.io").loadmat  # Comes with scikit-learn.
    try:
        with tarfile.open(path) as kit:
            files = {Path(m.name).name: m for m in kit.getmembers() if m.isfile()}
            meta = kit.extractfile(files["meta.mat"])
            truth = kit.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            assert meta is not None and truth is not None
            synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            numbers = [int(line) for line in truth.read().split()]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets.ravel()}
        return [wnids[number] for number in numbers]
    except (tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise DataError(
            "unreadable development kit", given=str(path), change=f"{type(error).__name__}: {error}"
        ) from None


def _members(path: Path, file: Any) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, bytes) of every file of an uncompressed tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            archive: Any = opened
            while (member := archive.next()) is not None:
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                archive.members = []  # Otherwise it keeps an object per image.
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            "unreadable tar", given=str(path), change=f"{error}; download it again"
        ) from None


class _Section(io.RawIOBase):
    """A byte range of an open file, as a file object."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file = file
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data: bytes = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
