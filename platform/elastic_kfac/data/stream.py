"""Random access to the samples of a split: any positions of any epoch, with no rank inside.

A batch is a pure function of (manifest, seed, epoch, positions). The training loop decides which rank
reads which positions, so a resize needs nothing from the stream, and resuming reads no skipped data.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from elastic_kfac.data.augment import check_augmentation
from elastic_kfac.data.batch import Batch, collate, outputs_for
from elastic_kfac.data.cache import ReadAhead, ShardCache
from elastic_kfac.data.columns import Column
from elastic_kfac.data.decode import MAX_PIXELS
from elastic_kfac.data.loading import SampleLoader
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.order import SampleOrder
from elastic_kfac.errors import DataError


class SampleStream:
    """Random access to the samples of a shard set in the order of an epoch.

    Args:
        shard_set: What to read.
        seed: Seed of order and augmentation.
        augment: `none`, `crop_flip` or `random_resized_crop`.
        image_size: Height and width of the result; None keeps the stored size, which encoded images
            must then share. Without augmentation, images that differ in size are cropped to the
            centred 7/8 square first.
        decode_threads: Threads that decode one batch; 0 and 1 decode in the reading thread.
        prefetch_batches: Batches to prepare ahead; 0 makes `prefetch` do nothing.
        bad_records: `raise`, or `skip`: an undecodable image or a corrupt shard gives zeros with
            weight 0, and a line in the quarantine file.
        cache_dir: Node-local folder of the memory-mapped shards; None is the user's cache directory.
        cache_gib: Maximum size of that folder, GiB.
        shuffle: False reads in id order.
        max_bad_records: Distinct bad records that `skip` tolerates.
        max_image_pixels: Bound on height * width of an encoded image; a larger one is bad.

    Raises:
        DataError: If an option is impossible for this set.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        seed: int,
        augment: str = "none",
        image_size: int | None = None,
        decode_threads: int = 1,
        prefetch_batches: int = 2,
        bad_records: str = "raise",
        cache_dir: str | None = None,
        cache_gib: float = 32.0,
        shuffle: bool = True,
        max_bad_records: int = 1000,
        max_image_pixels: int = MAX_PIXELS,
    ) -> None:
        check_augmentation(augment)
        for key, given in (("augment", augment), ("image_size", image_size)):
            if shard_set.image is None and given not in (None, "none"):
                raise DataError(
                    f"data.{key} is for images; {shard_set.uri} has none",
                    given=given,
                    change=f"leave data.{key} out",
                )
        self.shard_set = shard_set
        self.seed = seed
        self.shuffle = shuffle
        self._augment = augment
        self._cache = ShardCache(cache_dir, int(cache_gib * 2**30))
        self._cache.check_fits(shard_set)
        self._readahead = ReadAhead(self._cache, shard_set)
        self._loader = SampleLoader(
            shard_set,
            self._cache,
            seed=seed,
            image_size=image_size,
            decode_threads=decode_threads,
            bad_records=bad_records,
            max_bad_records=max_bad_records,
            max_image_pixels=max_image_pixels,
        )
        self._prefetch_batches = prefetch_batches
        self._background: ThreadPoolExecutor | None = None
        self._ahead: OrderedDict[tuple[int, int, int], Future[Batch]] = OrderedDict()
        self._orders: OrderedDict[int, SampleOrder] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._stall_s = 0.0

    @property
    def num_samples(self) -> int:
        return self.shard_set.num_samples

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.shard_set.columns

    @property
    def num_outputs(self) -> int:
        """See `outputs_for`."""
        return outputs_for(self.columns)

    @property
    def sha256(self) -> str:
        """Hash of the manifest."""
        return self.shard_set.manifest_sha256

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample: (channels, height, width) of its image as delivered, else of its first input."""
        if self.shard_set.image is not None:
            return self._loader.image_shape
        column = next(column for column in self.columns if column.role == "input")
        return (column.longest,) if column.kind == "tokens" else column.shape or ()

    @property
    def normalization(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Per-channel (mean, std), float32 [channels], for pixels scaled to 0..1."""
        image = self.shard_set.image
        if image is None:
            return None
        mean = torch.tensor(image.mean, dtype=torch.float32)
        # A constant channel has std 0; dividing by 1 keeps it finite.
        std = torch.tensor([s or 1.0 for s in image.std], dtype=torch.float32)
        return mean, std

    @property
    def quarantined(self) -> int:
        """Number of distinct bad records skipped so far."""
        return self._loader.quarantined

    @property
    def counts(self) -> dict[str, float]:
        """Cache hits and misses, bytes read from storage, bad records, seconds that `read` blocked."""
        return {**self._cache.counts, "quarantined": self.quarantined, "stall_s": self._stall_s}

    def order(self, epoch: int) -> SampleOrder:
        """The order of an epoch."""
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                order = self.shard_set.order(self.seed, epoch, shuffle=self.shuffle)
                self._orders[epoch] = order
                while len(self._orders) > 2:  # This epoch and the one prefetched into.
                    self._orders.popitem(last=False)
            return order

    def read(self, epoch: int, first_position: int, count: int) -> Batch:
        """Samples at positions [first_position, first_position + count) of an epoch.

        Raises:
            DataError: If the positions leave the epoch, or the data is bad and `bad_records` is
                `raise`.
        """
        self._check_open()
        begin = time.perf_counter()
        with self._lock:
            ready = self._ahead.pop((epoch, first_position, count), None)
        batch = self._load(epoch, first_position, count) if ready is None else ready.result()
        self._stall_s += time.perf_counter() - begin
        return batch

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        """Starts preparing what a later `read` with the same arguments will return.

        Unused batches (after a resize moved the positions) make room for newer ones.
        """
        self._check_open()
        if self._prefetch_batches <= 0 or count <= 0 or not 0 <= first_position < self.num_samples:
            return
        key = (epoch, first_position, min(count, self.num_samples - first_position))
        with self._lock:
            if key in self._ahead:
                return
            while len(self._ahead) >= self._prefetch_batches:
                self._ahead.popitem(last=False)[1].cancel()
            self._ahead[key] = self._executor().submit(self._load, *key)

    def close(self) -> None:
        """Stops the threads and unmaps the files; may be called again."""
        self._closed = True
        with self._lock:
            self._ahead.clear()
            background, self._background = self._background, None
        if background is not None:
            background.shutdown(wait=True, cancel_futures=True)
        self._readahead.close()
        self._loader.close()
        self._cache.close()

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DataError("the sample stream is closed", given=self.shard_set.uri)

    def _executor(self) -> ThreadPoolExecutor:
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="sample-prefetch")
        return self._background

    def _load(self, epoch: int, first_position: int, count: int) -> Batch:
        order = self.order(epoch)
        ids = order.ids(first_position, count)
        self._readahead.want(order.upcoming_shards(first_position).tolist())
        values, weights = self._loader.load(ids, epoch, self._augment)
        return collate(self.columns, values, ids, weights)
