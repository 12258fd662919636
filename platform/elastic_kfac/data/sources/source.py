"""A source of samples: named splits, each readable from any position.

Any range of a split can be read by any process at any time, so shards can be made in any order and again
after an interruption. Raw pixels are uint8 in [channels, height, width] order; encoded images keep their
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.columns import Column, image_columns
from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key
from elastic_kfac.errors import DataError

Images = NDArray[np.uint8] | list[bytes]
"""Pixels [n, channels * height * width], or encoded images."""

HIDDEN: Final = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
"""Folders that operating systems and file servers leave behind."""
BATCH_ROWS: Final = 512
"""Samples that a source reads at once."""


@dataclass(frozen=True)
class Records:
    """Consecutive samples."""

    values: Mapping[str, Any]
    """By column, as `data.columns` describes them."""
    keys: list[str]


class SourceSplit(Protocol):
    """One split of a source."""

    @property
    def num_samples(self) -> int: ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """Without what is measured when shards are made."""

    @property
    def bytes_per_sample(self) -> float: ...

    @property
    def fingerprint(self) -> str:
        """Changes with the content; an interrupted `make` resumes only if it is the same."""

    @property
    def quick_fingerprint(self) -> str:
        """Changes with names, sizes and labels; every task compares it."""

    def read(self, start: int, stop: int) -> Iterator[Records]:
        """Samples [start, stop) in pieces."""


@dataclass(frozen=True)
class Source:
    """A parsed source: its display name, and how to open each split."""

    name: str
    openers: dict[str, Callable[[], SourceSplit]]

    def split(self, name: str) -> SourceSplit:
        """Opens a split.

        Raises:
            DataError: If the source has no such split.
        """
        if name not in self.openers:
            raise DataError(
                f"source {self.name} has no such split",
                given=name,
                allowed=", ".join(self.openers),
            )
        return self.openers[name]()


@dataclass(frozen=True)
class ColumnSplit:
    """A split whose samples are loaded by index, written in the order `order`."""

    columns: tuple[Column, ...]
    load: Callable[[NDArray[np.int64]], Mapping[str, Any]]
    """Indices to values by column."""
    key: Callable[[int], str]
    order: NDArray[np.int64]
    bytes_per_sample: float
    fingerprint: str

    @property
    def num_samples(self) -> int:
        return len(self.order)

    @property
    def quick_fingerprint(self) -> str:
        return self.fingerprint

    def read(self, start: int, stop: int) -> Iterator[Records]:
        for low in range(start, stop, BATCH_ROWS):
            chosen = self.order[low : min(low + BATCH_ROWS, stop)]
            keys = [self.key(index) for index in chosen.tolist()]
            yield Records(self.load(chosen), keys)


def image_split(
    *,
    load: Callable[[NDArray[np.int64]], Images],
    key: Callable[[int], str],
    labels: NDArray[np.int64],
    order: NDArray[np.int64],
    class_names: tuple[str, ...],
    bytes_per_sample: float,
    fingerprint: str,
    raw_shape: tuple[int, int, int] | None = None,
) -> ColumnSplit:
    """A split of images and their classes."""
    return ColumnSplit(
        columns=image_columns(raw_shape, class_names),
        load=lambda chosen: {"image": load(chosen), "label": labels[chosen]},
        key=key,
        order=order,
        bytes_per_sample=bytes_per_sample,
        fingerprint=fingerprint,
    )


def fixed_shuffle(count: int) -> NDArray[np.int64]:
    """A permutation of `count` samples, the same on every machine.

    Sources that list their samples class by class are shuffled before they are cut into shards, so that
    every shard, and every block of an epoch, is a fair sample of the classes.
    """
    return permutation(stream_key(SOURCE_SHUFFLE, count), np.arange(count, dtype=np.int64))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data's: its name begins with a dot, or is in HIDDEN."""
    return name.startswith(".") or name in HIDDEN
