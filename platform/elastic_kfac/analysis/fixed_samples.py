"""The fixed samples of a split that curvature is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from elastic_kfac.analysis.hessian import Batch
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig
from elastic_kfac.data.batch import Value, tensors_of
from elastic_kfac.data.dataset import Dataset, rank_slice
from elastic_kfac.tasks.preprocessing import Preprocessor

_KEPT_BYTES = 512 << 20
"""Larger sets of samples are read again for every product instead of being kept."""


class FixedSamples:
    """The same samples of a split every time; iteration yields this rank's slice in chunks."""

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocessor,
        request: AnalysisConfig,
        communicator: Communicator,
        terms: Callable[[Value], int] = len,
    ) -> None:
        self.terms = terms
        """The number of terms in the loss of some targets."""
        wanted = request.samples
        self.count = dataset.num_samples if wanted is None else min(wanted, dataset.num_samples)
        self._dataset, self._seed, self._batch_size = dataset, request.seed, request.batch_size
        self._preprocess = preprocess
        self._slice = rank_slice(0, self.count, communicator.rank, communicator.world_size)
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Batch] | None = []
        size = 0
        first, count = self._slice
        for start in range(first, first + count, self._batch_size):
            batch = self._read(start, min(self._batch_size, first + count - start))
            size += sum(t.nbytes for value in batch for t in tensors_of(value))
            kept = None if kept is None or size > _KEPT_BYTES else [*kept, batch]
            yield batch
        self._kept = kept

    def one(self, index: int) -> Batch:
        """A batch of one, in any rank's slice; empty if its record is bad."""
        return self._read(index, 1)

    def _read(self, first: int, count: int) -> Batch:
        # The seed takes the place of the epoch: every seed has its own order.
        inputs = self._preprocess(self._dataset.read(self._seed, first, count))
        return inputs.inputs, inputs.targets
