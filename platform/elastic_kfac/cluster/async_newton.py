"""Asynchronous DistNewton on Ray: an actor merges the newest contribution of every worker.

    server = AsyncMerge.start(parameters, DistNewton(lr=1.0, gradient_lr=0.1))   # once
    merger = AsyncMerge(server, "worker-3")                                      # in every worker
    theta = merger.join()
    while training:
        theta = local_steps(theta)
        theta = merger.merge(theta, gradient(theta))

Workers never wait for each other. A worker that joins starts at the newest merged parameters; the last
contribution of one that left takes part until it is too old. `docs/examples/async_distnewton.py` is a
complete run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.optimizers.dist_newton import DistNewton, merge

__all__ = ["AsyncMerge", "DistNewton", "MergeServer", "Merged"]


@dataclass(frozen=True)
class Merged:
    """The newest merged parameters."""

    version: int
    """Number of merges so far."""
    parameters: Tensor
    """[n]."""
    workers: int
    """Contributions in the newest merge; 0 before the first."""
    rank: int
    """Dimensions of its Newton part."""


class MergeServer:
    """The actor's class: the newest contribution of every worker, and the newest merge.

    Args:
        parameters: Where all workers start [n].
        options: How to merge.
        max_staleness: Merges after which a contribution no longer takes part.
        merge_every: Contributions per merge.

    Raises:
        ConfigError: If `max_staleness` is negative or `merge_every` not positive.
    """

    def __init__(
        self,
        parameters: Tensor,
        options: DistNewton,
        *,
        max_staleness: int = 4,
        merge_every: int = 1,
    ) -> None:
        if max_staleness < 0 or merge_every < 1:
            raise ConfigError(
                "asynchronous merging out of range",
                given=f"max_staleness {max_staleness}, merge_every {merge_every}",
                allowed="max_staleness >= 0, merge_every >= 1",
            )
        self._options = options
        self._max_staleness = max_staleness
        self._merge_every = merge_every
        self._since_merge = 0
        self._contributions: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._merged = Merged(0, parameters, 0, 0)

    def newest(self) -> Merged:
        """Where a worker that joins starts."""
        return self._merged

    def hand_in(self, worker: str, version: int, parameters: Tensor, gradient: Tensor) -> Merged:
        """Records a worker's contribution and returns the parameters to continue from.

        Args:
            worker: Its name; only the newest contribution under a name takes part.
            version: Version of the merged parameters that the worker started from.
            parameters: θ [n].
            gradient: The gradient there [n].

        Raises:
            UsageError: If the version does not exist yet.
            NumericalError: If no contribution is finite.
        """
        if version > self._merged.version:
            raise UsageError(
                "a contribution from a version that does not exist yet",
                given=version,
                allowed=f"0 to {self._merged.version}",
            )
        if version >= self._contributions.get(worker, (0,))[0]:
            self._contributions[worker] = version, parameters, gradient
        self._since_merge += 1
        if self._since_merge >= self._merge_every:
            self._since_merge = 0
            self._merge()
        return self._merged

    def _merge(self) -> None:
        oldest = self._merged.version - self._max_staleness
        self._contributions = {
            worker: contribution
            for worker, contribution in sorted(self._contributions.items())
            if contribution[0] >= oldest
        }
        if self._contributions:
            _, parameters, gradients = zip(*self._contributions.values(), strict=True)
            merged = merge(parameters, gradients, self._options)
            self._merged = Merged(
                self._merged.version + 1, merged.parameters, merged.workers, merged.rank
            )


class AsyncMerge:
    """A worker's side of the actor.

    Args:
        server: The actor from `start`.
        worker: This worker's name.
    """

    def __init__(self, server: Any, worker: str) -> None:
        self._server = server
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
        """Starts the actor; see `MergeServer`. `ray_options` are those of a Ray actor."""
        return (
            ray.remote(MergeServer)
            .options(**ray_options)
            .remote(parameters, options, max_staleness=max_staleness, merge_every=merge_every)
        )

    def join(self) -> Tensor:
        """The parameters to start from [n]."""
        return self._take(ray.get(self._server.newest.remote()))

    def merge(self, parameters: Tensor, gradient: Tensor) -> Tensor:
        """Hands in θ and the gradient there; returns the parameters to continue from [n]."""
        merged = self._server.hand_in.remote(
            self._worker, self._version, parameters.detach(), gradient.detach()
        )
        return self._take(ray.get(merged))

    def _take(self, merged: Merged) -> Tensor:
        self._version = merged.version
        # Tensors from Ray's object store are read-only.
        return merged.parameters.clone()
