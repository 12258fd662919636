"""The eigenvalue that drives the batch, measured after each epoch, and what K-FAC says beside it.

Samples are fixed for the run and not augmented; products are summed over ranks, weighted by samples; and
start vectors are functions of the seed: every world size measures the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from elastic_kfac.analysis.hessian import Hessian, SumOverRanks, last_layer_parameters
from elastic_kfac.analysis.spectrum import top_eigenvalues
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset, open_split, rank_slice
from elastic_kfac.tasks.losses import Task
from elastic_kfac.tasks.preprocessing import Preprocessor

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC

# Yao et al. (2018): loose, because only a fall by a factor matters.
POWER_ITERATIONS = 10
POWER_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Measured:
    """The eigenvalues after an epoch; NaN is one that could not be measured."""

    driving: float
    """What the batch policy is told."""
    hessian: float | None
    """Of the Hessian or its last-layer block; None where it was not asked for."""
    kfac: float | None
    """max(d_A)·max(d_G) of the factors; None without K-FAC."""
    correlation: float | None
    """Spearman's, of the two over the epochs so far; None while there are fewer than 3."""
    time_s: float
    """What the measurement took."""

    def columns(self) -> dict[str, float]:
        """What a metric row says about it."""
        named = {
            "hessian_eigenvalue": self.hessian,
            "kfac_eigenvalue": self.kfac,
            "eigenvalue_correlation": self.correlation,
            "hessian_time_s": self.time_s,
        }
        return {k: v for k, v in named.items() if v is not None and math.isfinite(v)}


class EigenvalueWatch:
    """Measures eigenvalues; remembers the pairs that the correlation is taken over."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: Config,
        dataset: Dataset,
        preprocess: Preprocessor,
    ) -> None:
        self._model, self._task, self._config = model, task, config
        self._preprocess = preprocess
        self._dataset = dataset
        self._pairs: list[tuple[float, float]] = []

    def measure(self, communicator: Communicator, kfac: KFAC | None) -> Measured:
        """Collective."""
        batch = self._config.batch

        def add(tensor: Tensor) -> None:
            communicator.all_reduce(tensor, tag="eigenvalue").wait()

        begin = time.perf_counter()
        free = None
        # Without eigenvectors the factors would have to be decomposed for it.
        is_free = self._config.kfac.method == "eigen"
        if kfac is not None and (is_free or batch.eigenvalue == "kfac" or batch.report_both):
            from elastic_kfac.analysis.spectral_estimates import kfac_eigenvalue

            free = kfac_eigenvalue(
                kfac,
                rank=communicator.rank,
                world_size=communicator.world_size,
                sum_over_ranks=add,
            )
        hessian = None
        if batch.eigenvalue != "kfac" or batch.report_both:
            hessian = self._top_of_hessian(communicator, add)
        if hessian is not None and free is not None and math.isfinite(hessian + free):
            self._pairs.append((abs(hessian), free))
        driving = free if batch.eigenvalue == "kfac" else hessian
        return Measured(
            math.nan if driving is None else driving,
            hessian,
            free,
            self._correlation(),
            time.perf_counter() - begin,
        )

    def _top_of_hessian(self, communicator: Communicator, add: SumOverRanks) -> float:
        batch = self._config.batch
        only = last_layer_parameters(self._model) if batch.eigenvalue == "last_layer" else None
        operator = Hessian(
            self._model,
            self._task.loss,
            self._samples(communicator),
            parameters=only,
            sum_over_ranks=add,
        )
        found = top_eigenvalues(
            operator,
            seed=self._config.train.seed,
            max_iterations=POWER_ITERATIONS,
            tolerance=POWER_TOLERANCE,
        )
        return found.values[0]

    def _samples(self, communicator: Communicator) -> list[tuple[Tensor, Tensor]]:
        """This rank's share of the samples in chunks: the first ones of the first epoch's order."""
        dataset = self._dataset
        if self._config.data.augment != "none":
            dataset = open_split(self._config, self._config.data.train_split)
        count = min(self._config.batch.hessian_samples, dataset.num_samples)
        first, own = rank_slice(0, count, communicator.rank, communicator.world_size)
        size = self._config.train.micro_batch_size or max(own, 1)
        result = []
        try:
            for start in range(first, first + own, size):
                samples = dataset.read(0, start, min(size, first + own - start))
                inputs = self._preprocess(samples)
                result.append((inputs.images, inputs.labels))
        finally:
            if dataset is not self._dataset:
                dataset.close()
        return result

    def _correlation(self) -> float | None:
        if len(self._pairs) < 3:
            return None
        first, second = zip(*self._pairs, strict=True)
        if len(set(first)) == 1 or len(set(second)) == 1:
            return None
        return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])

    def state_dict(self) -> dict[str, Any]:
        """World-size-free."""
        return {"pairs": [list(pair) for pair in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Goes on from `state_dict()`; an empty one starts afresh."""
        self._pairs = [(pair[0], pair[1]) for pair in state.get("pairs", ())]


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return ranks
