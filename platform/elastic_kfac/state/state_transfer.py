"""Broadcasts the training state from one rank and verifies what arrived."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError, ElasticKfacError
from elastic_kfac.state.state import TrainingState

_CHUNK_BYTES = 64 * 2**20


def share_state(
    communicator: Communicator,
    load: Callable[[], TrainingState | None],
    *,
    device: torch.device,
    src: int = 0,
) -> TrainingState | None:
    """Rank `src` loads a state; every rank returns the same one. Collective.

    Raises:
        ElasticKfacError: On every rank, if `load` raised it on rank `src`.
        CommunicationError: If the ranks received different bytes.
    """
    state: TrainingState | None = None
    failure: ElasticKfacError | None = None
    content = bytearray()
    if communicator.rank == src:
        try:
            state = load()
        except ElasticKfacError as error:
            failure = error
        if state is not None and communicator.world_size > 1:
            content = state.to_bytes()
    found = communicator.broadcast_object(
        (failure, state is not None, len(content)), src, tag="state"
    )
    failure, exists, size = found
    if failure is not None:
        raise failure
    if not exists or communicator.world_size == 1:
        return state
    received = _broadcast_bytes(communicator, content, size, src, device)
    hashes = communicator.all_gather_object(hashlib.sha256(received).hexdigest(), tag="state")
    if len(set(hashes)) > 1:
        wrong = [rank for rank, value in enumerate(hashes) if value != hashes[src]]
        raise CommunicationError(f"ranks {wrong} received a damaged training state")
    return state if communicator.rank == src else TrainingState.from_bytes(received)


def state_held_by_all(communicator: Communicator, held: TrainingState) -> TrainingState | None:
    """The state that every rank already holds; None if any bit of the tensors differs. Collective.

    Clocks and counters become those of rank 0.
    """
    if communicator.world_size == 1:
        return held
    digests = communicator.all_gather_object(held.sha256(), tag="state")
    if len(set(digests)) > 1:
        return None
    rest = communicator.broadcast_object(replace(held, tensors={}), 0, tag="state")
    return replace(rest, tensors=held.tensors)


def _broadcast_bytes(
    communicator: Communicator, content: bytearray, size: int, src: int, device: torch.device
) -> bytearray:
    whole = content if communicator.rank == src else bytearray(size)
    for begin in range(0, size, _CHUNK_BYTES):
        view = torch.frombuffer(
            whole, dtype=torch.uint8, offset=begin, count=min(_CHUNK_BYTES, size - begin)
        )
        chunk = view.to(device)
        communicator.broadcast(chunk, src, tag="state").wait()
        if communicator.rank != src:
            view.copy_(chunk)
    return whole
