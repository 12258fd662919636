"""Data sets that need no files, one for each kind of task: text of Python's standard library, scenes of
scikit-learn's digits, and its tables."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.columns import Column
from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key
from elastic_kfac.data.sources.generated import digit_images
from elastic_kfac.data.sources.source import ColumnSplit, Source, fixed_shuffle
from elastic_kfac.errors import DataError

# -- text ----------------------------------------------------------------------------------------

MODULES: Final = {
    "train": (
        *("argparse", "configparser", "csv", "difflib", "ftplib", "functools", "gettext"),
        *("http.client", "optparse", "pprint", "shutil", "threading", "uuid"),
    ),
    "test": ("calendar", "fileinput", "heapq", "random", "textwrap"),
}
"""Modules whose source is the text; whole modules are held out."""
BLOCK: Final = 128
"""Characters of a sample, unless the source says otherwise."""
ASCII: Final = 128


def stdlib_text(length: str = "") -> Source:
    """Source text of modules of the running Python, in blocks of `length` characters (128 if empty).

    Characters are ASCII, others become `?`. Minor releases of Python change the text; the name of the
    source has the release, and shards have the hash of what they were made from.

    Raises:
        DataError: If the length is no whole number from 2 to 4096.
    """
    block = int(length) if length.isdecimal() else 0 if length else BLOCK
    if not 2 <= block <= 4096:
        raise DataError("bad length of stdlib_text", given=length, allowed="2 to 4096")
    release = ".".join(platform.python_version_tuple()[:2])
    name = "stdlib_text" if block == BLOCK else f"stdlib_text:{block}"
    return Source(
        f"{name} (Python {release})", {split: partial(_text, split, block) for split in MODULES}
    )


def _text(split: str, block: int) -> ColumnSplit:
    parts = [module_text(name) for name in MODULES[split]]
    text = np.frombuffer("\n".join(parts).encode("ascii", "replace"), dtype=np.uint8)
    blocks = text[: len(text) // block * block].reshape(-1, block)
    return _split(
        f"stdlib_text/{split}",
        (Column("tokens", "tokens", "input", vocabulary=ASCII),),
        {"tokens": blocks},
    )


def module_text(name: str) -> str:
    """The source of a module of the standard library.

    Raises:
        DataError: If this Python comes without it.
    """
    spec = importlib.util.find_spec(name)
    try:
        if spec is None or spec.origin is None:
            raise FileNotFoundError(name)
        return Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(
            "stdlib_text: this Python has no source of one of its modules",
            given=name,
            change="use a Python with its .py files, or text of your own (`text:PATH`)",
        ) from None


# -- scenes --------------------------------------------------------------------------------------

SIDE: Final = 48
"""Height and width of a scene, pixels."""
SCENES: Final = {"train": 2000, "test": 400}
MOST_DIGITS: Final = 4


class Scenes(NamedTuple):
    """Pictures of digits, and where which one is."""

    images: NDArray[np.uint8]
    """[n, SIDE, SIDE]."""
    masks: NDArray[np.uint8]
    """[n, SIDE, SIDE]: 0 for the background, else 1 + the digit."""
    boxes: list[NDArray[np.float32]]
    """Per scene [m, 5]: left, top, right, bottom, digit."""


def digit_scenes(kind: str) -> Source:
    """Scenes of one to four digits of scikit-learn, at their own or twice their size, on a noisy
    background; `masks` has a label map per scene, `boxes` the digits' boxes.

    Raises:
        DataError: If the kind is unknown.
    """
    if kind not in ("masks", "boxes"):
        raise DataError(
            "unknown kind of digit_scenes", given=kind or "none", allowed="masks, boxes"
        )
    return Source(
        f"digit_scenes:{kind}", {split: partial(_scenes, split, kind) for split in SCENES}
    )


def _scenes(split: str, kind: str) -> ColumnSplit:
    scenes = make_scenes(split)
    names = tuple(str(digit) for digit in range(10))
    image = Column("image", "image", "input", shape=(1, SIDE, SIDE))
    if kind == "masks":
        target = Column(
            "mask", "mask", "target", shape=(SIDE, SIDE), class_names=("background", *names)
        )
        values: dict[str, Any] = {"mask": scenes.masks}
    else:
        target = Column("boxes", "boxes", "target", class_names=names)
        values = {"boxes": scenes.boxes}
    return _split(
        f"digit_scenes/{split}",
        (image, target),
        {"image": scenes.images.reshape(-1, SIDE**2), **values},
    )


@lru_cache(maxsize=2)
def make_scenes(split: str) -> Scenes:
    """The scenes of a split, of the digits of the same split."""
    pictures, labels = digit_images(split)
    # The legacy generator's streams are frozen; those of the newer ones may change with numpy.
    random = np.random.RandomState({"train": 0, "test": 1}[split])
    count = SCENES[split]
    level = random.randint(0, 40, (count, 1, 1))
    images = (level + random.randint(0, 32, (count, SIDE, SIDE))).astype(np.uint8)
    masks = np.zeros_like(images)
    boxes = []
    for image, mask in zip(images, masks, strict=True):
        found: list[tuple[int, int, int, int, int]] = []
        wanted = random.randint(1, MOST_DIGITS + 1)
        while len(found) < wanted:
            index, scale = random.randint(len(pictures)), random.randint(1, 3)
            picture = np.kron(pictures[index], np.ones((scale, scale), dtype=np.uint8))
            rows, columns = (np.flatnonzero(picture.any(axis=axis)) for axis in (1, 0))
            picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            height, width = picture.shape
            top, left = random.randint(SIDE - height + 1), random.randint(SIDE - width + 1)
            box = (left, top, left + width, top + height)
            if any(
                box[0] < x1 and x0 < box[2] and box[1] < y1 and y0 < box[3]
                for x0, y0, x1, y1, _ in found
            ):
                continue
            place = (slice(top, top + height), slice(left, left + width))
            image[place] = np.maximum(image[place], picture)
            mask[place][picture > 0] = 1 + labels[index]
            found.append((*box, int(labels[index])))
        boxes.append(np.array(found, dtype=np.float32))
    return Scenes(images, masks, boxes)


# -- tables --------------------------------------------------------------------------------------

TABLES: Final = ("diabetes", "breast_cancer", "wine")


def sklearn_table(name: str) -> Source:
    """A table of scikit-learn: diabetes (10 features, one number to predict), breast_cancer (30, two
    classes) or wine (13, three classes); a fixed fifth is the test split.

    Raises:
        DataError: If the name is none of them.
    """
    if name not in TABLES:
        raise DataError("unknown table of scikit-learn", given=name, allowed=", ".join(TABLES))
    return Source(
        f"sklearn:{name}", {split: partial(_table, name, split) for split in ("train", "test")}
    )


def _table(name: str, split: str) -> ColumnSplit:
    import sklearn.datasets

    load: Callable[[], Any] = getattr(sklearn.datasets, f"load_{name}")
    bunch = load()
    inputs = bunch.data.astype(np.float32)
    order = permutation(stream_key(SOURCE_SHUFFLE), np.arange(len(inputs)))
    cut = round(len(inputs) / 5)
    chosen = order[:cut] if split == "test" else order[cut:]
    features = Column("features", "tensor", "input", dtype="float32", shape=inputs.shape[1:])
    if name == "diabetes":
        target = Column("target", "tensor", "target", dtype="float32", shape=(1,))
        targets = bunch.target.astype(np.float32)[:, None]
    else:
        names = tuple(str(one) for one in bunch.target_names)
        target = Column("label", "class", "target", class_names=names)
        targets = bunch.target.astype(np.int64)
    values = {"features": inputs[chosen], target.name: targets[chosen]}
    return _split(f"sklearn:{name}/{split}", (features, target), values)


# -- all -----------------------------------------------------------------------------------------


def _split(name: str, columns: tuple[Column, ...], values: Mapping[str, Any]) -> ColumnSplit:
    """A split of values in memory, shuffled."""
    digest = hashlib.sha256()
    for part in values.values():
        for one in part if isinstance(part, list) else [part]:
            digest.update(np.ascontiguousarray(one).tobytes())
    count = len(next(iter(values.values())))
    total = sum(
        one.nbytes
        for part in values.values()
        for one in (part if isinstance(part, list) else [part])
    )

    def load(chosen: NDArray[np.int64]) -> dict[str, Any]:
        return {
            key: [part[i] for i in chosen] if isinstance(part, list) else part[chosen]
            for key, part in values.items()
        }

    return ColumnSplit(
        columns=columns,
        load=load,
        key=(name + "/{}").format,
        order=fixed_shuffle(count),
        bytes_per_sample=total / count,
        fingerprint=digest.hexdigest(),
    )
