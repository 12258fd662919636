"""In-memory replicas of the newest training state, in actors on several nodes, in front of the disk.

Objects of a worker die with it, so that replicas lie in the memory of actors of their own. One is on
the cluster's head, the most stable node there is, another one on the node of rank 0 (or of its
neighbour, where rank 0 is on the head). They belong to the driver, which ends them by handle, and die
with it: after the loss of driver or head the durable checkpoint counts.

A replica actor is a small process: this module imports torch and the state only where a rank needs them.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray

from elastic_kfac.errors import StateError

if TYPE_CHECKING:
    from elastic_kfac.data.storage import Storage
    from elastic_kfac.state.checkpoint import CheckpointStore
    from elastic_kfac.state.state import TrainingState

Memory = npt.NDArray[np.uint8]

_RAY_CPU_S = 0.02
_RAY_CPU_S_PER_BYTE = 2.5e-9
"""CPU time of a snapshot that no clock of ours sees: Ray's object store, transfer between nodes and
messages (benchmarks/vault_cost.py, on a machine that is slow at them)."""


@dataclass(frozen=True)
class ReplicaInfo:
    """A replica without its content."""

    attempt: int
    """Worker group that made it."""
    step: int
    sha256: str
    num_bytes: int
    rescued: bool = False
    """Whether a survivor of a lost group sent it."""


Places = Mapping[str, Any]
"""Handles of the replica actors by node, oldest first."""


class ReplicaActor:
    """The actor: keeps the `keep` newest replicas."""

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._attempt = 0
        self._replicas: dict[str, tuple[ReplicaInfo, Memory]] = {}

    def put(self, info: ReplicaInfo, buffers: Sequence[Memory]) -> float | None:
        """Keeps the concatenation of `buffers`.

        Returns:
            The CPU time in s that it took; None when the content arrived damaged or comes from a group
            that was replaced.
        """
        begin = time.process_time()
        digest = hashlib.sha256()
        for buffer in buffers:
            digest.update(buffer.data)
        if info.attempt < self._attempt or digest.hexdigest() != info.sha256:
            return None
        self._attempt = info.attempt
        self._replicas.pop(info.sha256, None)
        memory = np.empty(0, np.uint8)
        while len(self._replicas) >= self._keep:
            memory = self._replicas.pop(next(iter(self._replicas)))[1]
        # New memory costs several times what copying into used memory does.
        if not info.num_bytes <= len(memory) <= 2 * info.num_bytes:
            memory = np.empty(info.num_bytes + info.num_bytes // 8, np.uint8)
        at = 0
        for buffer in buffers:
            memory[at : at + len(buffer)] = buffer
            at += len(buffer)
        self._replicas[info.sha256] = (info, memory)
        return time.process_time() - begin

    def infos(self, attempt: int) -> list[ReplicaInfo]:
        """Lists the replicas; from now on only groups from `attempt` on may add to them."""
        self._attempt = max(self._attempt, attempt)
        return [info for info, _ in self._replicas.values()]

    def get(self, sha256: str) -> Memory | None:
        """The content of a replica that is still here."""
        found = self._replicas.get(sha256)
        return None if found is None else found[1][: found[0].num_bytes]


class ReplicaActors:
    """The driver's side: starts replica actors where they are needed, and ends them."""

    def __init__(
        self,
        home: str,
        *,
        create: Callable[[str], Any] | None = None,
        end: Callable[[Any], None] | None = None,
    ) -> None:
        """Starts with one actor on `home`, a node id; `create` and `end` are Ray's by default."""
        self._create = create or _create_actor
        self._end = end or _end_actor
        self._home = home
        self._actors: dict[str, Any] = {home: self._create(home)}

    @property
    def places(self) -> Places:
        """The present actors."""
        return dict(self._actors)

    def follow(self, rank_nodes: Mapping[int, str], usable: set[str]) -> bool:
        """Adapts to where the ranks are.

        Args:
            rank_nodes: Node of every rank; empty between two groups.
            usable: Nodes that are alive and not draining.

        Returns:
            Whether `places` has changed.
        """
        before = tuple(self._actors)
        buddies = [rank_nodes[rank] for rank in sorted(rank_nodes)]
        buddy = next((node for node in buddies if node != self._home and node in usable), None)
        if buddy is not None and buddy not in self._actors:
            self._actors[buddy] = self._create(buddy)
        for node in list(self._actors):
            # A former buddy stays until another one is there: it may hold the newest replica.
            superfluous = len(self._actors) > 2 and node not in (self._home, buddy)
            if node != self._home and (superfluous or node not in usable):
                self._end(self._actors.pop(node))
        return tuple(self._actors) != before

    def close(self) -> None:
        """Ends all actors."""
        for actor in self._actors.values():
            self._end(actor)
        self._actors.clear()


def _create_actor(node_id: str) -> Any:
    from elastic_kfac.cluster.ray.nodes import start_actor

    return start_actor(ReplicaActor, node_id=node_id)


def _end_actor(actor: Any) -> None:
    # One that is gone already is fine.
    with contextlib.suppress(Exception):
        ray.kill(actor)


class StoreCallback:
    """Receives the events of a `ReplicatedStore`; every method does nothing unless overridden."""

    def on_warning(self, line: str) -> None:
        """Something could not be kept or read."""

    def on_restore(self, source: str, step: int) -> None:
        """A state of `step` was restored from `source`."""

    def on_rescue(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A survivor's checkpoint was saved; these metric rows led to it."""

    def on_replicated(self) -> None:
        """A state has reached a replica actor."""


class ReplicatedStore:
    """A `StateStore` of in-memory replicas in front of durable checkpoints.

    A snapshot is safe once one actor has it: rank 0 itself is the second place. Without any actor that
    answers, every snapshot is a durable checkpoint.
    """

    def __init__(
        self,
        durable: CheckpointStore,
        places: Callable[[], Places],
        *,
        attempt: int,
        checkpoint_interval_s: float,
        callback: StoreCallback | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Wraps `durable`.

        Args:
            attempt: Number of this worker group; actors refuse what older groups send later.
            checkpoint_interval_s: At least this long between two checkpoints.
            timeout_s: How long an actor may take to answer.
        """
        self._durable = durable
        self._places = places
        self._attempt = attempt
        self._checkpoint_interval_s = checkpoint_interval_s
        self._callback = callback or StoreCallback()
        self._timeout_s = timeout_s
        self.snapshot_cpu_s = 0.0
        """CPU time in s of the newest replication: here, in the actors and in Ray."""
        self._checkpointed = time.monotonic()
        self._sender: ThreadPoolExecutor | None = None
        self._pending: Future[bool] | None = None
        self._sent: dict[str, Any] = {}
        """The pending answer of each actor, by node."""

    @property
    def storage(self) -> Storage:
        """The run's folder."""
        return self._durable.storage

    def save(self, state: TrainingState) -> None:
        """Writes to disk and replicates concurrently.

        Raises:
            OSError: If the storage refuses.
        """
        self.wait()
        copying = self._in_background(self._replicate, state)
        self._durable.save(state)
        copying.result()

    def save_survivor(self, state: TrainingState, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Replicates the state of any rank whose peers are lost."""
        self.wait()
        with contextlib.suppress(OSError):
            state.ledger.write_segments(self._durable.storage)
            self._replicate(state, rescued=True)
            self._callback.on_rescue(rows)

    def save_async(self, state: TrainingState) -> Future[bool] | None:
        """Replicates; also writes to disk when the last checkpoint is old enough."""
        if self._pending is not None and not self._pending.done():
            return None
        self._pending = self._in_background(self._keep, state)
        return self._pending

    def wait(self) -> None:
        """Waits for what is being sent or written."""
        if self._pending is not None:
            self._pending.result()
        self._durable.wait()

    def close(self) -> None:
        """Waits, and ends the threads."""
        if self._sender is not None:
            self._sender.shutdown(wait=True)
            self._sender = None
        self._durable.close()

    def load_latest(self) -> TrainingState | None:
        """The newest state that verifies, from a replica or from disk.

        Raises:
            StateError: If there are checkpoints but nothing can be read.
        """
        replicas = list(self._infos())
        candidates: list[tuple[int, bool, str, Callable[[], TrainingState]]] = []
        for node, actor, info in replicas:
            source = f"replica on node {node[:8]}"
            if info.rescued:
                source = f"survivor's checkpoint ({source})"
            candidates.append((info.step, True, source, partial(self._fetch, actor, info)))
        for step in self._durable.steps() if replicas else ():
            candidates.append((step, False, "disk", partial(self._durable.load, step)))
        # Where both have a step the replica is nearer.
        for step, _, source, load in sorted(candidates, key=lambda c: c[:2], reverse=True):
            try:
                state = load()
            except (StateError, OSError, ray.exceptions.RayError) as error:
                line = error.line() if isinstance(error, StateError) else str(error)
                self._callback.on_warning(
                    f"a state of step {step} was skipped: {line.splitlines()[0]}"
                )
                continue
            self._callback.on_restore(source, step)
            return state
        found = self._durable.load_latest()
        if found is not None:
            self._callback.on_restore("disk", found.progress.step)
        return found

    # ---- inside ----------------------------------------------------------------------------

    def _in_background(
        self, work: Callable[[TrainingState], bool], state: TrainingState
    ) -> Future[bool]:
        if self._sender is None:
            self._sender = ThreadPoolExecutor(1, thread_name_prefix="replicas")
        return self._sender.submit(work, state)

    def _keep(self, state: TrainingState) -> bool:
        step = state.progress.step
        try:
            # First: a replicated state may name segments whose content it no longer holds.
            state.ledger.write_segments(self._durable.storage)
        except Exception as error:
            self._callback.on_warning(f"ledger rows of step {step} were not written: {error}")
            return False
        replicated = self._replicate(state)
        age = time.monotonic() - self._checkpointed
        if replicated and age < self._checkpoint_interval_s:
            return True
        self._checkpointed = time.monotonic()
        writing = self._durable.save_async(state)
        # A slow disk must not hold up the next snapshot while there are replicas.
        return replicated or (writing is not None and writing.result())

    def _replicate(self, state: TrainingState, *, rescued: bool = False) -> bool:
        """Sends a copy to every actor that is not busy; returns when the first one has it."""
        step = state.progress.step
        try:
            places = self._free_places()
            if not places:
                return False
            begin = time.thread_time()
            buffers = state.to_buffers()
            digest = hashlib.sha256()
            for buffer in buffers:
                digest.update(buffer.data)
            num_bytes = sum(map(len, buffers))
            info = ReplicaInfo(self._attempt, step, digest.hexdigest(), num_bytes, rescued)
            # Arrays enter and leave the object store without a copy of their own.
            shared = ray.put(buffers)
            for node, actor in places.items():
                self._sent[node] = actor.put.remote(info, shared)
            waiting = [self._sent[node] for node in places]
            deadline = time.monotonic() + self._timeout_s
            while waiting and time.monotonic() < deadline:
                ready, waiting = ray.wait(waiting, timeout=self._timeout_s)
                # The driver replaces an actor that is gone.
                with contextlib.suppress(ray.exceptions.RayError):
                    taken = [cpu_s for cpu_s in ray.get(ready) if cpu_s is not None]
                    if taken:
                        # The others take as long as the first one.
                        in_actors = len(places) * taken[0]
                        in_ray = _RAY_CPU_S + num_bytes * _RAY_CPU_S_PER_BYTE
                        self.snapshot_cpu_s = time.thread_time() - begin + in_actors + in_ray
                        self._callback.on_replicated()
                        return True
        except Exception as error:
            self._callback.on_warning(f"step {step} was not replicated: {error}")
            return False
        self._callback.on_warning(
            f"none of {len(places)} replica actors took the state of step {step}"
        )
        return False

    def _free_places(self) -> Places:
        # An actor that is slow (it may still be starting) must not hold up the others.
        known = self._places()
        self._sent = {node: answer for node, answer in self._sent.items() if node in known}
        if self._sent:
            all_busy = len(self._sent) == len(known)
            done, _ = ray.wait(
                list(self._sent.values()),
                num_returns=1 if all_busy else len(self._sent),
                timeout=self._timeout_s if all_busy else 0,
            )
            self._sent = {n: answer for n, answer in self._sent.items() if answer not in done}
        return {node: actor for node, actor in known.items() if node not in self._sent}

    def _infos(self) -> Iterator[tuple[str, Any, ReplicaInfo]]:
        asked = {
            actor.infos.remote(self._attempt): (n, actor) for n, actor in self._places().items()
        }
        if not asked:
            return
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=10.0)
        for answer in ready:
            try:
                infos = ray.get(answer)
            except ray.exceptions.RayError:
                continue
            yield from ((*asked[answer], info) for info in infos)
        if late:
            self._callback.on_warning(f"{len(late)} of {len(asked)} replica actors did not answer")

    def _fetch(self, actor: Any, info: ReplicaInfo) -> TrainingState:
        from elastic_kfac.state.state import TrainingState

        content = ray.get(actor.get.remote(info.sha256), timeout=self._timeout_s)
        if content is None or hashlib.sha256(content.data).hexdigest() != info.sha256:
            raise StateError("an in-memory replica is gone or damaged (its hash differs)")
        state = TrainingState.from_bytes(content.data)
        state.ledger.rows(self._durable.storage)
        return state
