"""The splits of a run as the training loop sees them: batches by epoch and position, and no ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, Protocol

from torch import Tensor

from elastic_kfac.config import Config
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.columns import Column
from elastic_kfac.data.manifest import ShardSet, open_named_split
from elastic_kfac.data.stream import SampleStream
from elastic_kfac.errors import DataError


class Dataset(Protocol):
    """Random access to a split by (epoch, position); `SampleStream` implements it."""

    @property
    def num_samples(self) -> int: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def num_outputs(self) -> int:
        """Classes, elements of a target tensor, or tokens of the vocabulary (see `outputs_for`)."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample: (channels, height, width) of its image, else of its first input: (features,),
        (tokens,)."""

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
        DataError: If a split is missing or damaged, or the two do not belong together.
    """
    check_splits(config)
    data = config.data
    return Datasets(
        train=open_split(config, data.train_split, augment=data.augment),
        evaluation=open_split(config, data.eval_split, shuffle=False),
    )


def check_splits(config: Config) -> None:
    """Checks from the manifests that both configured splits exist, with the same columns and classes.

    Raises:
        DataError: If a split is missing, columns differ, classes have other names, or samples are
            evaluated whose class has none to train on.
    """
    data = config.data
    train = open_named_split(data.shards, data.train_split, "data.train_split")
    test = open_named_split(data.shards, data.eval_split, "data.eval_split")
    ours, theirs = ([_described(column) for column in part.columns] for part in (train, test))
    if ours != theirs:
        raise DataError(
            f"{test.split} has other columns than {train.split}",
            given=", ".join(theirs),
            allowed=", ".join(ours),
            change="make both splits from one source",
        )
    for number, (one, other) in enumerate(zip(train.class_names, test.class_names, strict=False)):
        if one != other:
            raise DataError(
                "the splits number their classes differently",
                given=f"class {number} is {one} in {train.split} and {other} in {test.split}",
                change="make both splits from one source",
            )
    counts = zip_longest(train.class_counts, test.class_counts, fillvalue=0)
    lacking = [number for number, (one, other) in enumerate(counts) if other and not one]
    if lacking:
        names = (test.class_names[number] for number in lacking[:5])
        raise DataError(
            f"{test.split} has samples of classes that {train.split} has none of",
            given=f"{', '.join(names)}{' …' if len(lacking) > 5 else ''}",
            change="make both splits from one source, or leave these samples out",
        )


def _described(column: Column) -> str:
    """What a column must have in common in both splits."""
    of = {"tokens": column.vocabulary, "tensor": f"{column.dtype} {column.shape}"}.get(column.kind)
    return f"{column.name} ({column.role}: {column.kind}{'' if of is None else f' {of}'})"


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
        _padded_alike(config, open_named_split(data.shards, split, _key(config, split))),
        seed=config.train.seed,
        augment=augment,
        image_size=data.image_size,
        decode_threads=data.decode_threads,
        prefetch_batches=data.prefetch_batches,
        bad_records=data.bad_records,
        max_image_pixels=data.max_image_pixels,
        cache_dir=data.cache_dir,
        cache_gib=data.cache_gib,
        shuffle=shuffle,
    )


def _padded_alike(config: Config, shard_set: ShardSet) -> ShardSet:
    """The set with its sequences padded to the longest of both configured splits: they feed one model."""
    if all(column.kind not in ("tokens", "boxes") for column in shard_set.columns):
        return shard_set
    data = config.data
    both = [
        open_named_split(data.shards, name, _key(config, name))
        for name in (data.train_split, data.eval_split)
    ]
    columns = []
    for column in shard_set.columns:
        same = [each for part in both for each in part.columns if each.name == column.name]
        shortest, longest = min(c.shortest for c in same), max(c.longest for c in same)
        columns.append(replace(column, shortest=shortest, longest=longest))
    return replace(shard_set, columns=tuple(columns))


def _key(config: Config, split: str) -> str:
    return "data.eval_split" if split == config.data.eval_split else "data.train_split"


def rank_slice(first: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first position, count) of a rank's slice of a range; slices differ by at most one sample."""
    begin = rank * count // world_size
    end = (rank + 1) * count // world_size
    return first + begin, end - begin
