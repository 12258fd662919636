"""What a survivor can save: the state of the last committed step, when a peer is lost in the next one.

A replica that is still whole is a place where a committed step exists. A run whose processes all end
with the group hands it to the store first, so that the loss of a worker costs no committed step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Datasets, open_datasets
from elastic_kfac.errors import CommunicationError
from elastic_kfac.state.checkpoint import StateStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callback, Control
from elastic_kfac.training.loop import Outcome, RunLoop
from elastic_kfac.training.rank import RankTrainer

RESCUERS = 3
"""Only the lowest ranks rescue: all of them would send the same bytes."""


class RescueStore(StateStore, Protocol):
    """A store that any rank may hand a state to."""

    def rescue(self, state: TrainingState, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the state of a survivor and the metric rows that led to it, of which a lost rank 0
        may have reported only some; returns quickly, whether or not it worked."""
        ...


def run_rank_with_rescue(
    config: Config,
    communicator: Communicator,
    *,
    store: RescueStore,
    callback: Callback,
    control: Control,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> Outcome:
    """`run_rank`; a rank that loses a peer gives its last committed state to `store` before it fails.

    Raises:
        ElasticKfacError: As `run_rank`.
    """
    opened = datasets or open_datasets(config)
    try:
        trainer = RankTrainer(config, communicator, opened, device=device, callback=callback)
        loop = RunLoop(trainer, store)
        try:
            loop.continue_from_newest()
            return loop.until_parked_or_finished(control)
        except CommunicationError:
            if trainer.is_committed and communicator.rank < RESCUERS and trainer.holds_everything:
                # A decomposition may still be on its way from the lost peer.
                with contextlib.suppress(CommunicationError):
                    store.rescue(trainer.capture(), list(loop.recent_rows))
            raise
    finally:
        if datasets is None:
            opened.close()
