"""The same samples of a split every time, without augmentation: what curvature is measured on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from elastic_kfac.analysis.hessian import Batch
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig, Config
from elastic_kfac.data.feeds import Feed, StreamFeed, share
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.storage import join_uri
from elastic_kfac.data.stream import SampleStream
from elastic_kfac.tasks.inputs import InputMaker

_KEPT_BYTES = 512 << 20
"""Samples that take more than this are read again for every product instead of being kept."""


class FixedSamples:
    """The same samples of a split every time, this rank's share of them in chunks."""

    def __init__(
        self, feed: Feed, model: nn.Module, request: AnalysisConfig, communicator: Communicator
    ) -> None:
        wanted = request.samples
        self.count = feed.num_samples if wanted is None else min(wanted, feed.num_samples)
        self._feed, self._seed, self._batch_size = feed, request.seed, request.batch_size
        parameter = next(model.parameters())
        self._make_inputs = InputMaker(feed, parameter.dtype, parameter.device)
        self._share = share(0, self.count, communicator.rank, communicator.world_size)
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Batch] | None = []
        size = 0
        first, count = self._share
        for start in range(first, first + count, self._batch_size):
            batch = self._read(start, min(self._batch_size, first + count - start))
            size += sum(part.numel() * part.element_size() for part in batch)
            kept = None if kept is None or size > _KEPT_BYTES else [*kept, batch]
            yield batch
        self._kept = kept

    def one(self, index: int) -> Batch:
        """A batch of one, whichever rank's share it is in; empty when its record is bad."""
        return self._read(index, 1)

    def _read(self, first: int, count: int) -> Batch:
        # The seed plays the epoch: each has an order of its own.
        inputs = self._make_inputs(self._feed.read(self._seed, first, count))
        return inputs.images, inputs.labels


def open_plain(config: Config, split: str) -> Feed:
    """A split without augmentation, in an order of its own per analysis seed.

    Raises:
        DataError: If the split is missing or damaged.
    """
    data = config.data
    shards = ShardSet.open(join_uri(data.shards, split))
    stream = SampleStream(
        shards,
        seed=config.train.seed,
        augment="none",
        image_size=data.image_size,
        decode_threads=data.decode_threads,
        prefetch_batches=data.prefetch_batches,
        bad_records=data.bad_records,
        cache_dir=data.cache_dir,
        cache_gib=data.cache_gib,
        shuffle=True,
    )
    return StreamFeed(shards, stream)
