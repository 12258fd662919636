"""Vaults: actors on several nodes that own copies of the newest training state.

What a worker owns dies with it; a vault's copy lies in the memory of the vault's own process. One
vault is on the cluster's head, which is the most stable node there is, another one on the node of
rank 0 (or of its neighbour, where rank 0 is on the head). They belong to the driver, which ends them
by handle, and die with it: after the loss of driver or head the durable checkpoint counts.

This module imports neither torch nor the training rooms: a vault is a small process.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Memory = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Note:
    """What a copy is, without its content."""

    attempt: int
    """Worker group that made it."""
    step: int
    sha256: str
    num_bytes: int
    rescued: bool = False
    """Whether a survivor of a lost group sent it."""


@dataclass(frozen=True)
class VaultPlace:
    """A vault and the node it is on."""

    node_id: str
    vault: Any
    """Handle of the actor."""


class Vault:
    """The actor: keeps the `keep` newest copies."""

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._attempt = 0
        self._copies: dict[str, tuple[Note, Memory]] = {}

    def put(self, note: Note, buffers: Sequence[Memory]) -> float | None:
        """Keeps a copy of `buffers`, one after the other.

        Returns:
            The CPU time in s that it took; None when the copy arrived damaged or comes from a group
            that was replaced.
        """
        begin = time.process_time()
        digest = hashlib.sha256()
        for buffer in buffers:
            digest.update(buffer.data)
        if note.attempt < self._attempt or digest.hexdigest() != note.sha256:
            return None
        self._attempt = note.attempt
        self._copies.pop(note.sha256, None)
        memory = np.empty(0, np.uint8)
        while len(self._copies) >= self._keep:
            memory = self._copies.pop(next(iter(self._copies)))[1]
        # New memory costs several times what copying into used memory does.
        if not note.num_bytes <= len(memory) <= 2 * note.num_bytes:
            memory = np.empty(note.num_bytes + note.num_bytes // 8, np.uint8)
        at = 0
        for buffer in buffers:
            memory[at : at + len(buffer)] = buffer
            at += len(buffer)
        self._copies[note.sha256] = (note, memory)
        return time.process_time() - begin

    def notes(self, attempt: int) -> list[Note]:
        """What is here; from now on only groups from `attempt` on may add to it."""
        self._attempt = max(self._attempt, attempt)
        return [note for note, _ in self._copies.values()]

    def get(self, sha256: str) -> Memory | None:
        """The content of a copy that is still here."""
        found = self._copies.get(sha256)
        return None if found is None else found[1][: found[0].num_bytes]


class VaultKeeper:
    """The driver's side: has vaults where they are wanted, and ends them."""

    def __init__(
        self,
        home: str,
        *,
        create: Callable[[str], Any] | None = None,
        end: Callable[[Any], None] | None = None,
    ) -> None:
        """Starts with one vault on `home`, a node id; `create` and `end` are Ray's by default."""
        self._create = create or create_vault
        self._end = end or end_vault
        self._home = home
        self._vaults: dict[str, Any] = {home: self._create(home)}

    @property
    def places(self) -> tuple[VaultPlace, ...]:
        """The vaults, oldest first."""
        return tuple(VaultPlace(node_id, vault) for node_id, vault in self._vaults.items())

    def follow(self, rank_nodes: Mapping[int, str], usable: set[str]) -> bool:
        """Adapts to where the ranks are.

        Args:
            rank_nodes: Node of every rank; empty between two groups.
            usable: Nodes that are alive and not about to leave.

        Returns:
            Whether `places` has changed.
        """
        before = tuple(self._vaults)
        buddies = [rank_nodes[rank] for rank in sorted(rank_nodes)]
        buddy = next((node for node in buddies if node != self._home and node in usable), None)
        if buddy is not None and buddy not in self._vaults:
            self._vaults[buddy] = self._create(buddy)
        for node in list(self._vaults):
            # A former buddy stays until another one is there: it may hold the newest copy.
            superfluous = len(self._vaults) > 2 and node not in (self._home, buddy)
            if node != self._home and (superfluous or node not in usable):
                self._end(self._vaults.pop(node))
        return tuple(self._vaults) != before

    def close(self) -> None:
        """Ends all vaults."""
        for vault in self._vaults.values():
            self._end(vault)
        self._vaults.clear()


def head_node() -> str | None:
    """Id of the cluster's head, if it is alive."""
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    return None


def create_vault(node_id: str) -> Any:
    """Starts a vault on a node; returns its handle at once."""
    return (
        ray.remote(Vault)
        .options(
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )


def end_vault(vault: Any) -> None:
    """Ends a vault; one that is gone is fine."""
    with contextlib.suppress(Exception):
        ray.kill(vault)
