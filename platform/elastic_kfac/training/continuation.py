"""Continuing a run on other ranks: survivors keep their state, or every rank restores the same one.

    resize    survivors keep their state; K-FAC re-plans and moves only what the new plan assigns to a
              rank that lacks it; newcomers, and survivors that missed the last commit, receive the rest
              from one survivor
    restore   every rank restores the newest state in any rank's memory, otherwise the durable one

A resize requires survivors whose live models are the newest committed one, bit for bit, and that hold
the whole state between them. After the loss of the only rank that held a part of it, all restore.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.state.state import TrainingState
from elastic_kfac.state.state_transfer import share_state, state_held_by_all
from elastic_kfac.training.step import StepTrainer


@dataclass(frozen=True)
class Continued:
    """Result on one rank."""

    state: TrainingState | None
    """The newest state in this rank's memory; None without one."""
    resized: bool
    moved_bytes: int
    """Tensors received over all ranks together."""


@dataclass(frozen=True)
class _Standing:
    """A rank's state before the change."""

    step: int
    """Step of the state in its memory; -1 without one."""
    sha256: str | None
    """Hash of that state if the live model is at the same committed step, otherwise None."""
    holds_everything: bool
    left_world_size: int
    """Size of the world that it left."""


def continue_on(
    trainer: StepTrainer,
    held: TrainingState | None,
    load_latest: Callable[[], TrainingState | None],
) -> Continued:
    """Continues on the ranks of `trainer`'s new communicator and sets up K-FAC there. Collective.

    Raises:
        ElasticKfacError: If no state can be read, or it does not belong to this run.
        CommunicationError: If a peer left.
    """
    live = held is not None and trainer.is_committed and trainer.progress.step == held.progress.step
    own = _Standing(
        -1 if held is None else held.progress.step,
        held.sha256() if live and held is not None else None,
        trainer.holds_everything,
        trainer.left_world_size,
    )
    trainer.is_committed = False
    standings: Sequence[_Standing] = trainer.communicator.all_gather_object(own, tag="state")
    newest = max(standing.step for standing in standings)
    front = [rank for rank, standing in enumerate(standings) if standing.step == newest]
    if newest >= 0 and _can_resize([standings[rank] for rank in front]):
        continued = _resize(trainer, held, front)
        if continued is not None:
            return continued
    trainer.build_preconditioner()
    return restore_newest(trainer, held, load_latest)


def _can_resize(front: Sequence[_Standing]) -> bool:
    whole = all(one.holds_everything for one in front) or len(front) == front[0].left_world_size
    return whole and front[0].sha256 is not None and len({one.sha256 for one in front}) == 1


def _resize(
    trainer: StepTrainer, held: TrainingState | None, front: Sequence[int]
) -> Continued | None:
    """Returns None if a part of K-FAC's state was lost with the only rank that held it. Collective."""
    communicator = trainer.communicator
    behind = [rank for rank in range(communicator.world_size) if rank not in front]
    is_behind = communicator.rank in behind
    if is_behind:
        trainer.build_preconditioner(Communicator.solo())
    moved_bytes = trainer.resize_preconditioner()
    if moved_bytes is None:
        return None
    rest = held
    if behind:
        # In a separate group: the other survivors need none of it.
        group = communicator.subgroup(sorted([front[0], *behind]))
        if group is not None:
            source = sorted([front[0], *behind]).index(front[0])
            rest = share_state(
                group,
                lambda: None if held is None else _without_kfac(held),
                device=trainer.device,
                src=source,
            )
            assert rest is not None
            moved_bytes += len(behind) * sum(tensor.nbytes for tensor in rest.tensors.values())
        moved_bytes = communicator.broadcast_object(moved_bytes, front[0], tag="state")
    assert rest is not None
    if is_behind:
        trainer.restore_all_but_kfac(rest)
    else:
        trainer.sync.load_state_dict(rest.part(trainer.sync.part) if trainer.sync.part else None)
    # Clocks and counters, on which no tensor depends, are taken from one rank.
    trainer.progress = communicator.broadcast_object(trainer.progress, front[0], tag="state")
    trainer.is_committed = True
    if is_behind:
        held = None
    if behind and trainer.holds_everything:
        # Needs no communication; otherwise newcomers hold a state only after the next snapshot.
        if is_behind:
            held = trainer.capture()
        else:
            trainer.join_capture()
    return Continued(held, True, moved_bytes)


def _without_kfac(state: TrainingState) -> TrainingState:
    tensors = {name: t for name, t in state.tensors.items() if not name.startswith("kfac/")}
    skeleton = {name: part for name, part in state.skeleton.items() if name != "kfac"}
    return replace(state, tensors=tensors, skeleton=skeleton)


def restore_newest(
    trainer: StepTrainer,
    held: TrainingState | None,
    load_latest: Callable[[], TrainingState | None],
) -> Continued:
    """Restores the newest state in any rank's memory, otherwise the durable one. Collective.

    Without any state the run starts from the beginning.
    """
    communicator = trainer.communicator
    steps = communicator.all_gather_object(-1 if held is None else held.progress.step, tag="state")
    state, moved_bytes = None, 0
    if held is not None and min(steps) == max(steps):
        state = state_held_by_all(communicator, held)
    if state is None:
        load = (lambda: held) if max(steps) >= 0 else load_latest
        source = steps.index(max(steps))
        state = share_state(communicator, load, device=trainer.device, src=source)
        if state is not None:
            size = sum(tensor.nbytes for tensor in state.tensors.values())
            moved_bytes = size * (communicator.world_size - 1)
    if state is not None:
        trainer.restore(state)
    return Continued(state, False, moved_bytes)
