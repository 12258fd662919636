"""Local steps between merges: parameter averaging, or DistNewton's quasi-Newton step.

Between two merges only counters and normalisation statistics travel. Which samples are used does not
change. An evaluation, a checkpoint or a resize merges first, so that only merged parameters outlive a
set of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.optimizers.dist_newton import DistNewton, merge_ranks
from elastic_kfac.training.sync.exchange import Exchange, Totals
from elastic_kfac.training.sync.global_sum import MicroBatches
from elastic_kfac.training.sync.synchronisation import Passes, Span

_TAG = "merge"


class LocalSteps(MicroBatches):
    """Every rank steps on its own slice of each batch; every k steps, and before anyone looks at the
    model, parameters and momenta are merged.

        rank 0  θ ─ step ─ step ─┐             ┌─ θ' ─ step ─ …
        rank 1  θ ─ step ─ step ─┼─ merge(θᵣ) ─┼─ θ' ─ step ─ …
        rank 2  θ ─ step ─ step ─┘             └─ θ' ─ step ─ …
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        passes: Passes,
        dataset: Dataset,
    ) -> None:
        super().__init__(Exchange(model, counts_terms=passes.counts_terms), config)
        self._config = config
        self._model, self._optimizer = model, optimizer
        self._passes, self._dataset = passes, dataset
        self._steps = 0
        self._newest_span = (0, 0, 0)
        self._newest_lr = config.optimizer.lr
        self._metrics: dict[str, float] = {}

    @property
    def holds_everything(self) -> bool:
        return False

    def reduce(self, local: Totals, step: int) -> Totals:
        return self.vector.reduce(self.communicator, local, reduce_gradients=lambda flat: None)

    def publish(self, totals: Totals, local: Totals, divisor: int, scale: float) -> bool:
        # The mean over this rank's samples only; a rank without any keeps its parameters.
        self.vector.publish_gradients(max(local.terms, 1) / divisor)
        return local.count > 0

    def committed(self, span: Span, lr: float) -> bool:
        self._steps += 1
        self._newest_span, self._newest_lr = (span.epoch, span.first, span.count), lr
        return self._steps >= self._config.elastic.merge_every_steps

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def load_state_dict(self, state: Any) -> None:
        self._steps = 0  # ranks that restore hold equal parameters

    @torch.no_grad()
    def settle(self) -> bool:
        """Merges parameters and the optimizer's state, if ranks have stepped since the last merge."""
        if not self._steps:
            return False
        self._steps = 0
        communicator = self.communicator
        if communicator.world_size == 1:
            return True
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        theta = torch.cat([p.detach().reshape(-1) for p in parameters])
        if self._config.elastic.merge == "average":
            communicator.all_reduce(theta, tag=_TAG).wait()
            merged = theta.div_(communicator.world_size)
            workers, rank, sigma = communicator.world_size, 0, 0.0
        else:
            with torch.enable_grad():
                own = self._gradient()
            found = merge_ranks(theta, own, self._options(self._newest_lr), communicator)
            merged = found.parameters
            workers, rank, sigma = found.workers, found.rank, found.sigma
        self._metrics = {"merged_workers": workers, "merge_newton_rank": rank, "merge_sigma": sigma}
        sizes = [p.numel() for p in parameters]
        for parameter, values in zip(parameters, merged.split(sizes), strict=True):
            parameter.copy_(values.view(parameter.shape))
        self._average_state(communicator, parameters)
        return True

    def _gradient(self) -> Tensor:
        """This rank's mean gradient [n] over the newest batch: the whole of it, or its slice."""
        epoch, first, count = self._newest_span
        if not self._config.distnewton.common_batch:
            first, count = self.slice(first, count)
        samples = self._dataset.read(epoch, first, count) if count else None
        try:
            self.vector.begin_step()
            seen = 0
            if samples is not None:
                inputs = self._passes.preprocess(samples)
                count = len(inputs.targets)
                size = self._micro_batch_size or max(count, 1)
                for start in range(0, count, size):
                    targets = inputs.targets[start : start + size]
                    self.vector.begin_pass()
                    part = inputs.inputs[start : start + size]
                    seen += self._passes.backward(part, targets, 1.0, None).terms
                    self.vector.end_pass(len(targets))
            return self.vector.local_gradient(seen)
        finally:
            self.vector.abandon_step()

    def _options(self, lr: float) -> DistNewton:
        given = self._config.distnewton
        return DistNewton(
            lr=given.lr or lr,
            gradient_lr=given.gradient_lr,
            ratio=given.ratio,
            mode=given.mode,
            cap=given.cap,
        )

    def _average_state(self, communicator: Communicator, parameters: list[nn.Parameter]) -> None:
        """Momenta are averaged; counters of steps take the largest value.

        A rank that had no samples yet has no state; it takes part with zeros.
        """
        states = [self._optimizer.state[p] for p in parameters]
        known = communicator.all_gather_object(
            [{key: _plain(value) for key, value in state.items()} for state in states], tag=_TAG
        )
        averaged: list[Tensor] = []
        for index, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            for key in sorted({key for rank in known for key in rank[index]}):
                values = [rank[index][key] for rank in known if key in rank[index]]
                counts = [value for value in values if value is not None]
                if not counts:
                    averaged.append(state.setdefault(key, torch.zeros_like(parameter)))
                elif isinstance(state.get(key), Tensor):
                    state[key].fill_(max(counts))
                else:
                    state[key] = max(counts)
        if averaged:
            flat = torch.cat([tensor.reshape(-1) for tensor in averaged])
            communicator.all_reduce(flat, tag=_TAG).wait()
            flat.div_(communicator.world_size)
            for tensor, values in zip(
                averaged, flat.split([tensor.numel() for tensor in averaged]), strict=True
            ):
                tensor.copy_(values.view(tensor.shape))


def _plain(value: Any) -> float | int | None:
    """A number as it is, and None for a tensor of the parameter's shape."""
    if isinstance(value, Tensor):
        return float(value) if value.dim() == 0 else None
    return None if value is None else float(value)
