"""Training that survives changes of the world inside living processes.

To admit a newcomer, all members stop at the same step boundary and one of them sends it the state.
After a loss, the survivors regroup and roll back to the newest state that any of them holds in memory
(captured at the same boundary), so the interrupted step is computed again, never skipped. Only if no
survivor holds one do they restore the durable checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import sys

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Datasets, open_datasets
from elastic_kfac.errors import CommunicationError
from elastic_kfac.state.checkpoint import StateStore
from elastic_kfac.training.callbacks import Callback, Control
from elastic_kfac.training.loop import Outcome, RunLoop
from elastic_kfac.training.membership import Departed, Membership
from elastic_kfac.training.rank import RankTrainer

_CHANGE = "the world changes"


def run_member(
    config: Config,
    membership: Membership,
    *,
    store: StateStore,
    callback: Callback,
    control: Control,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
    repeat_rows: bool = False,
) -> Outcome:
    """Trains as a member of a world that changes, until the run ends or drains.

    A member that leaves (`Membership.leave_at_next_boundary`) returns with the status `left`.

    Every member passes its own `store` and `callback`, since any of them may become rank 0; all stores
    write to the same place. With `repeat_rows` a new rank 0 reports the newest rows again, in case the
    lost one reported only some of them; the callback must drop duplicates.

    Raises:
        ElasticKfacError: As `run_rank`, except for the loss of peers, which is handled here.
    """
    opened = datasets or open_datasets(config)
    # Everything allocated so far stays alive: spare it the collection at every change of the world.
    gc.collect()
    gc.freeze()
    try:
        # Built with a solo communicator, so members and newcomers then call the same collectives.
        trainer = RankTrainer(config, Communicator.solo(), opened, device=device, callback=callback)
        loop = RunLoop(trainer, store, keep_newest=True)
        world = membership.join()
        while True:
            outcome: Outcome | None = None
            try:
                trainer.enter(membership.connect(world))
                loop.continue_on_other_ranks()
                loop.drop_rows_of_lost_steps()
                if repeat_rows:
                    loop.report_rows_again()
                outcome = loop.run_until_stopped(
                    _ControlOfMember(control, membership), durable=_ends_processes
                )
            except CommunicationError:
                pass
            if outcome is None:
                loop.note_costs()
            if outcome is None and trainer.is_committed and trainer.holds_everything:
                # Newer than the last snapshot, so no step is computed again.
                with contextlib.suppress(CommunicationError):
                    loop.keep_live_state()
            # Outside the handler, whose traceback references the group: its connections close, and
            # wake the peers that still wait in it, only once the last reference is gone.
            if outcome is not None and (
                outcome.status == "finished" or any(map(_ends_processes, outcome.reasons))
            ):
                return outcome
            trainer.leave()
            membership.disconnect(lost=outcome is None)
            try:
                world = membership.next_world(world)
            except Departed:
                return loop.departed()
    finally:
        # Nothing is left of the world unless the run has ended, or ends with an error.
        membership.disconnect(lost=sys.exc_info()[0] is not None)
        gc.unfreeze()
        if datasets is None:
            opened.close()


def _ends_processes(reason: str) -> bool:
    """Whether the processes end after a stop for this reason, so that the state must be saved."""
    return reason != _CHANGE


class _ControlOfMember:
    """Also requests a stop when the membership is about to change."""

    def __init__(self, control: Control, membership: Membership) -> None:
        self._control = control
        self._membership = membership

    def stop_reason(self) -> str | None:
        reason = self._control.stop_reason()
        if reason is None and self._membership.change_is_wanted():
            return _CHANGE
        return reason
