"""The curvature eigenvalue that drives the batch size, measured after each epoch.

The result does not depend on the world size: samples are fixed for the run and not augmented, products
are summed over ranks and weighted by samples, and start vectors are functions of the seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic_kfac.analysis.hessian import Hessian, last_layer_parameters
from elastic_kfac.analysis.spectrum import top_eigenvalues
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.batch import Value
from elastic_kfac.data.dataset import Dataset, open_split, rank_slice
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.task import Task

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC

# As in Yao et al. (2018). Loose, because only a decrease by a factor matters.
POWER_ITERATIONS = 10
POWER_TOLERANCE = 1e-2
_TAG = "eigenvalue"


@dataclass(frozen=True)
class Measured:
    """Eigenvalues after an epoch; NaN if the measurement failed."""

    driving: float
    """The eigenvalue that the batch policy uses."""
    hessian: float | None
    """Top eigenvalue of the Hessian or of its last-layer block; None if not configured."""
    kfac: float | None
    """Maximum over layers of max(d_A)·max(d_G); None if not measured."""
    correlation: float | None
    """Spearman correlation of the two over the epochs so far; None for fewer than 3 epochs."""
    time_s: float
    """Duration of the measurement in seconds."""

    def columns(self) -> dict[str, float]:
        """Columns of a metrics row; values that are missing or not finite are left out."""
        named = {
            "hessian_eigenvalue": self.hessian,
            "kfac_eigenvalue": self.kfac,
            "eigenvalue_correlation": self.correlation,
            "hessian_time_s": self.time_s,
        }
        return {k: v for k, v in named.items() if v is not None and math.isfinite(v)}


class EigenvalueWatch:
    """Measures the eigenvalues after each epoch and keeps the history for their correlation."""

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
        """Measures the configured eigenvalues. Collective."""
        batch = self._config.batch

        begin = time.perf_counter()
        free = None
        # Free with eigendecompositions; other methods would have to decompose the factors for it.
        is_free = self._config.kfac.method in ("eigen", "ekfac")
        if kfac is not None and (is_free or batch.eigenvalue == "kfac" or batch.report_both):
            from elastic_kfac.analysis.spectral_estimates import kfac_eigenvalue

            free = kfac_eigenvalue(kfac, communicator=communicator, tag=_TAG)
        hessian = None
        if batch.eigenvalue != "kfac" or batch.report_both:
            hessian = self._top_of_hessian(communicator)
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

    def _top_of_hessian(self, communicator: Communicator) -> float:
        batch = self._config.batch
        only = last_layer_parameters(self._model) if batch.eigenvalue == "last_layer" else None
        operator = Hessian(
            self._model,
            self._task.loss,
            self._samples(communicator),
            parameters=only,
            communicator=communicator,
            tag=_TAG,
            terms=self._task.terms,
        )
        found = top_eigenvalues(
            operator,
            seed=self._config.train.seed,
            max_iterations=POWER_ITERATIONS,
            tolerance=POWER_TOLERANCE,
        )
        return found.values[0]

    def _samples(self, communicator: Communicator) -> list[tuple[Value, Value]]:
        """This rank's slice of the first `batch.hessian_samples` samples of epoch 0, in micro-batches."""
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
                result.append((inputs.inputs, inputs.targets))
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
        from scipy.stats import spearmanr  # type: ignore[import-untyped]

        return float(spearmanr(first, second).statistic)

    def state_dict(self) -> dict[str, Any]:
        """The history; independent of the world size."""
        return {"pairs": [list(pair) for pair in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Restores the history; an empty `state` clears it."""
        self._pairs = [(pair[0], pair[1]) for pair in state.get("pairs", ())]
