"""One sum of gradients and counters over all ranks, or its halves where owners sum the gradients.

rank 0  g₀ | counters ─┐
rank 1  g₁ | counters ─┼─ all-reduce ─> Σg | Σcounters on every rank
rank 2  g₂ | counters ─┘
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elastic_kfac.communication.allreduce import Topology, allreduce, nodes_by_name
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.compression import CompressedAllReduce
from elastic_kfac.communication.wire_formats import wire_format
from elastic_kfac.config import Config
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.order import id_hash
from elastic_kfac.training.sync.exchange import Exchange, Totals
from elastic_kfac.training.sync.synchronisation import Passes, Span, Synchronisation

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC

_TAG = "gradients"


class MicroBatches(Synchronisation):
    """Modes whose ranks cut their slice into micro-batches."""

    def __init__(self, vector: Exchange, config: Config) -> None:
        super().__init__(vector)
        self._micro_batch_size = config.train.micro_batch_size
        self._sync_batch_norm = config.train.sync_batch_norm

    def accumulate(
        self, passes: Passes, samples: Batch | None, span: Span, loss_scale: float
    ) -> Totals:
        # Before the step begins: an attack needs the averages of the running statistics.
        inputs = None if samples is None else passes.inputs(samples, span)
        self.vector.begin_step()
        together = self._sync_batch_norm and self.communicator.world_size > 1
        if inputs is None:
            if not together:
                return Totals()
            inputs = passes.no_inputs()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.vector.flat.device)
        correct, terms = torch.zeros_like(loss_sum), 0
        longest = len(inputs.targets)
        size = self._micro_batch_size or max(longest, 1)
        if together:
            # Every rank makes as many passes as the one with the largest slice.
            longest = max(self.share_sizes(span.count))
            size = self._micro_batch_size or longest
        for start in range(0, longest, size):
            targets = inputs.targets[start : start + size]
            if len(targets):
                # Not the state of a generator: the same samples have the same dropout in every world.
                passes.seed(span.step, int(inputs.ids[start]))
            self.vector.begin_pass()
            part = inputs.inputs[start : start + size]
            passed = passes.backward(part, targets, loss_scale, self.kfac)
            self.vector.end_pass(len(targets))
            loss_sum += passed.loss
            correct += passed.correct
            terms += passed.terms
        return Totals(
            loss_sum=float(loss_sum),
            correct=float(correct),
            count=len(inputs.targets),
            terms=terms,
            id_hash=0 if samples is None else id_hash(samples.ids),
        )


class GlobalSum(MicroBatches):
    """The vector is summed natively, by a ring or tree of ranks, or compressed."""

    part = "compression"

    def __init__(self, vector: Exchange, config: Config) -> None:
        super().__init__(vector, config)
        self._communication = config.communication
        self._seed = config.train.seed
        self._topology: Topology | None = None
        self._compressed: CompressedAllReduce | None = None

    def join(self, communicator: Communicator, kfac: KFAC | None) -> None:
        super().join(communicator, kfac)
        given = self._communication
        if given.algorithm == "hierarchical":
            hosts = communicator.all_gather_object(socket.gethostname(), tag="topology")
            self._topology = nodes_by_name(hosts)
        if given.wire_format != "fp32":
            self._compressed = CompressedAllReduce(
                communicator,
                wire_format(given.wire_format, topk_ratio=given.topk_ratio),
                error_feedback=given.error_feedback,
                seed=self._seed,
            )

    def close(self) -> None:
        super().close()
        self._topology = self._compressed = None

    @property
    def holds_everything(self) -> bool:
        return self._communication.wire_format == "fp32"  # else residuals differ by rank

    def reduce(self, local: Totals, step: int) -> Totals:
        if self._communication.algorithm == "native" and self._compressed is None:
            return self.vector.reduce(self.communicator, local)
        return self.vector.reduce(
            self.communicator, local, reduce_gradients=lambda flat: self._sum(flat, step)
        )

    def _sum(self, flat: Tensor, step: int) -> None:
        if self._compressed is not None:
            self._compressed.all_reduce(flat, step=step, tag=_TAG)
        else:
            algorithm, topology = self._communication.algorithm, self._topology
            allreduce(self.communicator, flat, algorithm, topology=topology, tag=_TAG)

    def state_dict(self) -> Mapping[str, Tensor] | None:
        """The residual of the compression, summed over ranks."""
        return None if self._compressed is None else self._compressed.state_dict()

    def load_state_dict(self, state: Any) -> None:
        if self._compressed is not None and state is not None:
            self._compressed.load_state_dict(dict(state))


class ShardedByOwner(MicroBatches):
    """Gradients stay local here: `KFAC.step` reduce-scatters them to the owners of their layers, and
    gathers weights or preconditioned gradients from them (Osawa et al. 2019)."""

    @property
    def holds_everything(self) -> bool:
        return False

    def reduce(self, local: Totals, step: int) -> Totals:
        return self.vector.reduce(self.communicator, local, reduce_gradients=lambda flat: None)
