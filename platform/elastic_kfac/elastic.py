"""Elastic building blocks for custom training loops.

    state = ElasticState(model, optimizer, kfac, folder="run")     # resumes from the last checkpoint
    for epoch, first, count in state.batches(num_samples, batch_size, epochs):
        ...                                                        # read, backward, step
        state.commit(epoch, first, count)
        state.save()                                               # or every few batches

A restarted script, with any number of ranks, resumes after the last batch that was saved. The other
exported names are the trainer's own building blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.dataset import rank_slice
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.order import SampleOrder, id_hash
from elastic_kfac.data.stream import SampleStream
from elastic_kfac.errors import UsageError
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import Ledger
from elastic_kfac.state.state import (
    Progress,
    capture,
    restore_model,
    restore_optimizer,
)
from elastic_kfac.state.state_transfer import share_state
from elastic_kfac.training.sync.exchange import Exchange, Totals

__all__ = [
    "KFAC",
    "CheckpointStore",
    "Communicator",
    "ElasticState",
    "Exchange",
    "Progress",
    "SampleOrder",
    "SampleStream",
    "ShardSet",
    "Totals",
    "id_hash",
    "rank_slice",
]


class ElasticState:
    """State of a loop (model, optimizer, K-FAC, position) in checkpoints without a world size."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kfac: KFAC | None = None,
        *,
        folder: str | Path,
        communicator: Communicator | None = None,
    ) -> None:
        """Restores the newest checkpoint in `folder`, if there is one. Collective.

        Raises:
            StateError: If it belongs to another model, or no checkpoint is readable.
        """
        self.progress = Progress()
        self._model, self._optimizer, self._kfac = model, optimizer, kfac
        self._communicator = communicator or Communicator.world()
        self._store = CheckpointStore(folder)
        self._ledger = Ledger()
        device = next(model.parameters()).device
        state = share_state(self._communicator, self._store.load_latest, device=device)
        if state is not None:
            restore_model(model, state)
            restore_optimizer(model, optimizer, state.part("optimizer") or {})
            if kfac is not None and state.part("kfac") is not None:
                kfac.load_state_dict(state.part("kfac"))
            self._ledger = Ledger(state.ledger)
            self.progress = state.progress

    def batches(
        self, num_samples: int, batch_size: int, epochs: int
    ) -> Iterator[tuple[int, int, int]]:
        """Yields (epoch, first position, count) of each uncommitted global batch.

        Raises:
            UsageError: If the previous batch was not committed.
        """
        while self.progress.epoch < epochs:
            first, step = self.progress.consumed, self.progress.step
            if first == num_samples:
                self.progress = replace(self.progress, epoch=self.progress.epoch + 1, consumed=0)
                continue
            yield self.progress.epoch, first, min(batch_size, num_samples - first)
            if self.progress.step == step:
                raise UsageError(
                    "the previous batch was not committed",
                    change="call commit(epoch, first, count) after updating the weights",
                )

    def commit(self, epoch: int, first: int, count: int, ids_hash: int = 0) -> None:
        """Records that the weights include a batch; `ids_hash` goes into the ledger."""
        step = self.progress.step + 1
        self._ledger.append(
            step=step,
            epoch=epoch,
            first_position=first,
            num_samples=count,
            world_size=self._communicator.world_size,
            id_hash=ids_hash,
        )
        committed = self.progress.samples_committed + count
        self.progress = replace(
            self.progress, step=step, consumed=first + count, samples_committed=committed
        )

    def save(self) -> str:
        """Saves a checkpoint on rank 0 and returns the SHA-256 of the state. Collective."""
        parts: dict[str, Any] = {}
        if self._kfac is not None:
            parts["kfac"] = self._kfac.collect_state()
        self._ledger.seal()
        state = capture(
            model=self._model,
            optimizer=self._optimizer,
            parts=parts,
            progress=self.progress,
            ledger=self._ledger.value(),
            seed=0,
            data_sha256="",
            config={},
        )
        if self._communicator.rank == 0:
            self._store.save(state)
        self._communicator.barrier(tag="saved")
        return state.sha256()
