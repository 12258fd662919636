"""Ranks that step apart and come together again: averaging, or DistNewton's quasi-Newton step.

Between two merges every rank takes its own optimizer steps on its own share of each batch, as the parts
of a network that has split would; only counters and normalisation statistics still travel. Which samples
are used does not change. Whoever looks at the model (an evaluation, a checkpoint, a resize) merges first,
so that nothing outlives a world but merged parameters (spec 4.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset, rank_slice
from elastic_kfac.optimizers.dist_newton import DistNewton, merge_ranks
from elastic_kfac.training.passes import Passes
from elastic_kfac.training.sync.exchange import Exchange

_TAG = "merge"


@dataclass(frozen=True)
class Merged:
    """How ranks came together."""

    workers: int
    rank: int = 0
    """Dimensions of the Newton part; 0 with averages."""
    sigma: float = 0.0
    """σ̂: a lower bound of the largest singular value of the Hessian."""


class StepsApart:
    """Whether the ranks of a world are apart, and how they merge."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        passes: Passes,
        dataset: Dataset,
    ) -> None:
        self._config = config
        self._model, self._optimizer = model, optimizer
        self._passes, self._dataset = passes, dataset
        self._steps = 0
        self._newest_batch = (0, 0, 0)
        self.newest: Merged | None = None

    @property
    def apart(self) -> bool:
        """Whether ranks have stepped since they were together."""
        return self._steps > 0

    @property
    def due(self) -> bool:
        """Whether they have stepped apart for as long as configured."""
        return self._steps >= self._config.elastic.merge_every_steps

    def stepped(self, epoch: int, first: int, count: int) -> None:
        """Notes a step that every rank took on its own share of a batch."""
        self._steps += 1
        self._newest_batch = (epoch, first, count)

    def columns(self) -> dict[str, float]:
        """What a metric row says about the newest merge."""
        newest = self.newest
        if newest is None:
            return {}
        return {
            "merged_workers": newest.workers,
            "merge_newton_rank": newest.rank,
            "merge_sigma": newest.sigma,
        }

    def forget(self) -> None:
        """The ranks hold equal parameters again, from a checkpoint or a peer."""
        self._steps = 0

    @torch.no_grad()
    def merge(self, communicator: Communicator, exchange: Exchange, lr: float) -> None:
        """Gives every rank the merged parameters and the mean of the optimizer's state. Collective.

        `exchange` is borrowed for gradients between two steps; `lr` is τ where none is configured.
        """
        self._steps = 0
        if communicator.world_size == 1:
            return
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        theta = torch.cat([p.detach().reshape(-1) for p in parameters])
        if self._config.elastic.merge == "average":
            communicator.all_reduce(theta, tag=_TAG).wait()
            merged = theta.div_(communicator.world_size)
            self.newest = Merged(communicator.world_size)
        else:
            with torch.enable_grad():
                own = self._gradient(communicator, exchange)
            found = merge_ranks(theta, own, self._options(lr), communicator)
            merged = found.parameters
            self.newest = Merged(found.workers, found.rank, found.sigma)
        sizes = [p.numel() for p in parameters]
        for parameter, values in zip(parameters, merged.split(sizes), strict=True):
            parameter.copy_(values.view(parameter.shape))
        self._average_state(communicator, parameters)

    def _gradient(self, communicator: Communicator, exchange: Exchange) -> Tensor:
        """This rank's mean gradient over the newest batch: the whole of it, or its share [n]."""
        epoch, first, count = self._newest_batch
        if not self._config.distnewton.common_batch:
            first, count = rank_slice(first, count, communicator.rank, communicator.world_size)
        samples = self._dataset.read(epoch, first, count) if count else None
        try:
            seen = self._passes.gradient(exchange, samples)
            return exchange.local_gradient(seen.count)
        finally:
            exchange.abandon_step()

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
