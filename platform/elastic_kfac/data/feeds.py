"""The samples of a run as the loop sees them: positions of a global order, and no ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elastic_kfac.config import Config
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.order import SampleOrder
from elastic_kfac.data.storage import join_uri
from elastic_kfac.data.stream import SampleStream


class Samples(Protocol):
    """What a feed returns for a range of positions."""

    @property
    def images(self) -> Tensor:
        """[n, channels, height, width], uint8 or floating point."""
        ...

    @property
    def labels(self) -> Tensor:
        """[n], int64."""
        ...

    @property
    def ids(self) -> npt.NDArray[np.uint64]:
        """[n]: the ids of exactly these samples."""
        ...

    @property
    def weights(self) -> Tensor:
        """[n]: 1, or 0 for a bad record that keeps its place."""
        ...


class Feed(Protocol):
    """Random access to a split by (epoch, position)."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def sha256(self) -> str:
        """The hash of the split's manifest: what the order is a function of."""
        ...

    @property
    def normalization(self) -> tuple[Tensor, Tensor] | None:
        """Per-channel (mean, std) of pixels scaled to 0..1, for uint8 images."""
        ...

    def read(self, epoch: int, first_position: int, count: int) -> Samples:
        """The samples at `count` positions of an epoch's order."""
        ...

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        """Says what will be read next."""
        ...

    def close(self) -> None:
        """Ends threads and lets go of files."""
        ...


@dataclass(frozen=True)
class Feeds:
    """The two splits of a run."""

    train: Feed
    evaluation: Feed | None

    def close(self) -> None:
        self.train.close()
        if self.evaluation is not None:
            self.evaluation.close()


def share(first: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first position, count) of a rank's part of a range; parts differ by at most one sample."""
    begin = rank * count // world_size
    end = (rank + 1) * count // world_size
    return first + begin, end - begin


@dataclass(frozen=True)
class SomeSamples:
    """A part of what was read."""

    images: Tensor
    labels: Tensor
    ids: npt.NDArray[np.uint64]
    weights: Tensor


def samples_in(samples: Samples, part: slice) -> SomeSamples:
    """The samples at some places of what was read (views)."""
    return SomeSamples(
        samples.images[part], samples.labels[part], samples.ids[part], samples.weights[part]
    )


class StreamFeed:
    """A split of a shard set behind the loop's protocol."""

    def __init__(self, shards: ShardSet, stream: SampleStream) -> None:
        self.num_samples = shards.num_samples
        self.num_classes = shards.num_classes
        self.sha256 = shards.manifest_sha256
        self.image_shape = stream.image_shape
        self.normalization = stream.normalization
        self._stream = stream
        self._stall_s = 0.0

    def read(self, epoch: int, first_position: int, count: int) -> Samples:
        begin = time.perf_counter()
        samples = self._stream.read(epoch, first_position, count)
        self._stall_s += time.perf_counter() - begin
        return samples

    def counts(self) -> dict[str, float]:
        """What the stream has counted, and the time that reading has held up its callers."""
        return {**self._stream.counts, "stall_s": self._stall_s}

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        self._stream.prefetch(epoch, first_position, count)

    def close(self) -> None:
        self._stream.close()


def open_feeds(config: Config) -> Feeds:
    """Opens the configured splits.

    Raises:
        DataError: If a split is missing or damaged.
    """
    return Feeds(train=_open(config, training=True), evaluation=_open(config, training=False))


class ShardOrder:
    """Which ids stand at which positions of a split: what `audit` compares a ledger with."""

    def __init__(self, shards: ShardSet, seed: int) -> None:
        self.num_samples = shards.num_samples
        self._shards = shards
        self._seed = seed
        self._current: tuple[int, SampleOrder] | None = None

    def ids(self, epoch: int, first_position: int, count: int) -> npt.NDArray[np.int64]:
        """The sample ids at `count` positions of an epoch."""
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, self._shards.order(self._seed, epoch))
        return self._current[1].ids(first_position, count)


def open_order(config: Config) -> ShardOrder:
    """The order of a run's training split.

    Raises:
        DataError: If the split is missing or damaged.
    """
    shards = ShardSet.open(join_uri(config.data.shards, config.data.train_split))
    return ShardOrder(shards, config.train.seed)


def _open(config: Config, *, training: bool) -> Feed:
    data = config.data
    shards = ShardSet.open(join_uri(data.shards, data.train_split if training else data.eval_split))
    stream = SampleStream(
        shards,
        seed=config.train.seed,
        augment=data.augment if training else "none",
        image_size=data.image_size,
        decode_threads=data.decode_threads,
        prefetch_batches=data.prefetch_batches,
        bad_records=data.bad_records,
        cache_dir=data.cache_dir,
        cache_gib=data.cache_gib,
        shuffle=training,
    )
    return StreamFeed(shards, stream)
