"""The splits of a run as the training loop sees them: batches by epoch and position, and no ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from elastic_kfac.config import Config
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.storage import join_uri
from elastic_kfac.data.stream import Batch, SampleStream


class Dataset(Protocol):
    """Random access to a split by (epoch, position); `SampleStream` implements it."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    @property
    def sha256(self) -> str:
        """Hash of the split's manifest; with seed and epoch it determines the order."""

    @property
    def normalization(self) -> tuple[Tensor, Tensor] | None:
        """Per-channel (mean, std) of pixels scaled to 0..1, for uint8 images."""

    def read(self, epoch: int, first_position: int, count: int) -> Batch:
        """The samples at `count` positions of an epoch's order."""

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        """Prepares what a later `read` with the same arguments returns."""

    def close(self) -> None:
        """Stops threads and closes files."""


@dataclass(frozen=True)
class Datasets:
    """The two splits of a run."""

    train: Dataset
    evaluation: Dataset | None

    def close(self) -> None:
        self.train.close()
        if self.evaluation is not None:
            self.evaluation.close()


def open_datasets(config: Config) -> Datasets:
    """Opens the configured splits: the training split shuffled and augmented, the other in id order.

    Raises:
        DataError: If a split is missing or damaged.
    """
    data = config.data
    return Datasets(
        train=open_split(config, data.train_split, augment=data.augment),
        evaluation=open_split(config, data.eval_split, shuffle=False),
    )


def open_split(
    config: Config,
    split: str,
    *,
    augment: Literal["none", "crop_flip", "random_resized_crop"] = "none",
    shuffle: bool = True,
) -> SampleStream:
    """Opens one split with the reading options of `config.data`.

    Raises:
        DataError: If the split is missing or damaged.
    """
    data = config.data
    return SampleStream(
        ShardSet.open(join_uri(data.shards, split)),
        seed=config.train.seed,
        augment=augment,
        image_size=data.image_size,
        decode_threads=data.decode_threads,
        prefetch_batches=data.prefetch_batches,
        bad_records=data.bad_records,
        cache_dir=data.cache_dir,
        cache_gib=data.cache_gib,
        shuffle=shuffle,
    )


def rank_slice(first: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first position, count) of a rank's slice of a range; slices differ by at most one sample."""
    begin = rank * count // world_size
    end = (rank + 1) * count // world_size
    return first + begin, end - begin
