"""Asynchronous DistNewton on Ray: one actor keeps the newest contribution of every worker and merges.

Workers never wait for each other: each hands in its parameters and gradient, and takes the merged
parameters of the newest version. A worker that joins starts there; what a worker left behind when it
went takes part until it is too old (spec 4.2, 4.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from elastic_kfac.optimizers.dist_newton import AsyncTable, Contribution, DistNewton


@dataclass(frozen=True)
class Merged:
    """Parameters that workers go on from."""

    version: int
    """Merges so far; a contribution names the version that it began at."""
    parameters: Tensor
    """[n]."""
    workers: int
    """Contributions in the newest merge; 0 before the first."""
    rank: int
    """Dimensions of its Newton part."""


class MergeServer:
    """What the actor runs: a table, and the parameters of its newest version.

    Args:
        parameters: Where all workers start [n].
        options: How to merge.
        max_staleness: Merges after which a contribution is forgotten.
        merge_every: Contributions that make a merge.
    """

    def __init__(
        self,
        parameters: Tensor,
        options: DistNewton,
        *,
        max_staleness: int = 4,
        merge_every: int = 1,
    ) -> None:
        self._table = AsyncTable(max_staleness)
        self._options = options
        self._merge_every = merge_every
        self._since_merge = 0
        self._merged = Merged(0, parameters, 0, 0)

    def newest(self) -> Merged:
        """Where a worker that joins starts."""
        return self._merged

    def hand_in(self, worker: str, version: int, parameters: Tensor, gradient: Tensor) -> Merged:
        """Takes a contribution; returns what the worker goes on from.

        Raises:
            UsageError: If it began at a version that does not exist yet.
            NumericalError: If nothing that is fresh is finite.
        """
        self._table = self._table.put(worker, Contribution(version, parameters, gradient))
        self._since_merge += 1
        if self._since_merge >= self._merge_every:
            self._since_merge = 0
            self._table, merge = self._table.merge(self._options)
            self._merged = Merged(self._table.version, merge.parameters, merge.workers, merge.rank)
        return self._merged


class AsyncMerge:
    """A worker's side of the actor.

    Args:
        actor: From `start`.
        worker: This worker's name; the newest contribution under a name counts.
    """

    def __init__(self, actor: Any, worker: str) -> None:
        self._actor = actor
        self._worker = worker
        self._version = 0

    @staticmethod
    def start(
        parameters: Tensor,
        options: DistNewton,
        *,
        max_staleness: int = 4,
        merge_every: int = 1,
        **ray_options: Any,
    ) -> Any:
        """Starts the actor; `ray_options` say where it runs and what it takes."""
        actor = ray.remote(MergeServer).options(**ray_options)
        return actor.remote(
            parameters, options, max_staleness=max_staleness, merge_every=merge_every
        )

    def join(self) -> Tensor:
        """The parameters to start from [n]."""
        return self._take(ray.get(self._actor.newest.remote()))

    def merge(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Hands in θ and the gradient there; returns the parameters to go on from [n]."""
        merged = self._actor.hand_in.remote(
            self._worker, self._version, parameters.detach(), gradient.detach()
        )
        return self._take(ray.get(merged))

    def _take(self, merged: Merged) -> Tensor:
        self._version = merged.version
        # What Ray hands over is read-only memory.
        return merged.parameters.clone()
