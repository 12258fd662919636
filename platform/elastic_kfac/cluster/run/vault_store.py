"""Where rank 0 keeps states: often in vaults, at a coarser interval and at every end on disk."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from elastic_kfac.cluster.run.vault import Note, VaultPlace
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import StateError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState

_RAY_CPU_S = 0.02
_RAY_CPU_S_PER_BYTE = 2.5e-9
"""CPU time of a snapshot that no clock of ours sees: Ray's object store, transfer between nodes and
messages (benchmarks/vault_cost.py, on a machine that is slow at them)."""


class VaultStore:
    """A `StateStore` of vaults in front of durable checkpoints.

    A snapshot is safe once one vault has it: rank 0 itself is the second place. Without any vault
    that answers, every snapshot is a durable checkpoint.
    """

    def __init__(
        self,
        durable: CheckpointStore,
        places: Callable[[], Sequence[VaultPlace]],
        *,
        attempt: int,
        checkpoint_interval_s: float,
        on_warning: Callable[[str], None] = lambda line: None,
        on_restore: Callable[[str, int], None] = lambda source, step: None,
        on_rescue: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
        on_kept: Callable[[], None] = lambda: None,
        timeout_s: float = 30.0,
    ) -> None:
        """Wraps `durable`.

        Args:
            durable: The checkpoints of the run.
            places: The vaults there are now.
            attempt: Number of this worker group; vaults refuse what older groups send later.
            checkpoint_interval_s: At least this long between two checkpoints.
            on_warning: Is told what could not be kept or read.
            on_restore: Is told where the restored state came from, and its step.
            on_rescue: Is given the metric rows of a rescued state.
            on_kept: Is told when a state has reached a vault.
            timeout_s: How long a vault may take to answer.
        """
        self._durable = durable
        self._places = places
        self._attempt = attempt
        self._checkpoint_interval_s = checkpoint_interval_s
        self._warn = on_warning
        self._on_restore = on_restore
        self._on_rescue = on_rescue
        self._on_kept = on_kept
        self._timeout_s = timeout_s
        self.snapshot_cpu_s = 0.0
        """CPU time in s of the newest copy: here, in the vaults and in Ray."""
        self._checkpointed = time.monotonic()
        self._sender: ThreadPoolExecutor | None = None
        self._pending: Future[bool] | None = None
        self._sent: dict[str, Any] = {}
        """The newest answer that each vault owes, by node."""

    @property
    def storage(self) -> Storage:
        """The run's folder."""
        return self._durable.storage

    def save(self, state: TrainingState) -> None:
        """To disk, and meanwhile to the vaults.

        Raises:
            OSError: If the storage refuses.
        """
        self.wait()
        copying = self._in_background(self._copy, state)
        self._durable.save(state)
        copying.result()

    def rescue(self, state: TrainingState, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """To the vaults, from any rank whose peers are lost."""
        self.wait()
        with contextlib.suppress(OSError):
            state.ledger.write_segments(self._durable.storage)
            self._copy(state, rescued=True)
            self._on_rescue(rows)

    def save_async(self, state: TrainingState) -> Future[bool] | None:
        """To the vaults; also to disk when the last checkpoint is old enough."""
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
        """The newest state that verifies, from a vault or from disk.

        Raises:
            StateError: If there are checkpoints but nothing can be read.
        """
        copies = list(self._notes())
        candidates: list[tuple[int, VaultPlace | None, Note | None]] = [
            (note.step, place, note) for place, note in copies
        ]
        if copies:
            candidates += [(step, None, None) for step in self._durable.steps()]
        # Where both have a step the vault is nearer.
        candidates.sort(key=lambda entry: (entry[0], entry[1] is not None), reverse=True)
        for step, place, note in candidates:
            try:
                if place is None or note is None:
                    state, source = self._durable.load(step), "disk"
                else:
                    state, source = self._fetch(place, note), f"vault on node {place.node_id[:8]}"
                    if note.rescued:
                        source = f"a survivor, by way of the {source}"
            except (StateError, OSError, ray.exceptions.RayError) as error:
                line = error.line() if isinstance(error, StateError) else str(error)
                self._warn(f"a state of step {step} was skipped: {line.splitlines()[0]}")
                continue
            self._on_restore(source, step)
            return state
        found = self._durable.load_latest()
        if found is not None:
            self._on_restore("disk", found.progress.step)
        return found

    # ---- inside ----------------------------------------------------------------------------

    def _in_background(
        self, work: Callable[[TrainingState], bool], state: TrainingState
    ) -> Future[bool]:
        if self._sender is None:
            self._sender = ThreadPoolExecutor(1, thread_name_prefix="vault")
        return self._sender.submit(work, state)

    def _keep(self, state: TrainingState) -> bool:
        try:
            # First: a state in a vault may name segments whose content it does not hold any more.
            state.ledger.write_segments(self._durable.storage)
        except Exception as error:
            self._warn(f"ledger rows of step {state.progress.step} were not written: {error}")
            return False
        in_vault = self._copy(state)
        age = time.monotonic() - self._checkpointed
        if in_vault and age < self._checkpoint_interval_s:
            return True
        self._checkpointed = time.monotonic()
        writing = self._durable.save_async(state)
        # A slow disk must not hold up the next snapshot while there are vaults.
        return in_vault or (writing is not None and writing.result())

    def _copy(self, state: TrainingState, *, rescued: bool = False) -> bool:
        """Sends a copy to every vault that is not busy; returns when the first one has it."""
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
            step = state.progress.step
            note = Note(self._attempt, step, digest.hexdigest(), num_bytes, rescued)
            # Arrays go into the object store and out of it without a copy of their own.
            shared = ray.put(buffers)
            self._sent = {
                **self._sent,
                **{place.node_id: place.vault.put.remote(note, shared) for place in places},
            }
            waiting = [self._sent[place.node_id] for place in places]
            deadline = time.monotonic() + self._timeout_s
            while waiting and time.monotonic() < deadline:
                ready, waiting = ray.wait(waiting, timeout=self._timeout_s)
                # The driver replaces a vault that is gone.
                with contextlib.suppress(ray.exceptions.RayError):
                    taken = [cpu_s for cpu_s in ray.get(ready) if cpu_s is not None]
                    if taken:
                        # The others take as long as the first one.
                        in_vaults = len(places) * taken[0]
                        in_ray = _RAY_CPU_S + num_bytes * _RAY_CPU_S_PER_BYTE
                        self.snapshot_cpu_s = time.thread_time() - begin + in_vaults + in_ray
                        self._on_kept()
                        return True
        except Exception as error:
            self._warn(f"step {state.progress.step} did not reach the vaults: {error}")
            return False
        self._warn(f"none of {len(places)} vaults took the state of step {state.progress.step}")
        return False

    def _free_places(self) -> list[VaultPlace]:
        # A vault that is slow (it may still be starting) must not hold up the others.
        places = self._places()
        known = {place.node_id: place for place in places}
        self._sent = {node: answer for node, answer in self._sent.items() if node in known}
        if self._sent:
            everybody_is_busy = len(self._sent) == len(known)
            done, _ = ray.wait(
                list(self._sent.values()),
                num_returns=1 if everybody_is_busy else len(self._sent),
                timeout=self._timeout_s if everybody_is_busy else 0,
            )
            self._sent = {n: answer for n, answer in self._sent.items() if answer not in done}
        return [place for node, place in known.items() if node not in self._sent]

    def _notes(self) -> Iterator[tuple[VaultPlace, Note]]:
        places = self._places()
        asked = {place.vault.notes.remote(self._attempt): place for place in places}
        ready, late = (
            ray.wait(list(asked), num_returns=len(asked), timeout=10.0)
            if asked
            else (
                [],
                [],
            )
        )
        for answer in ready:
            try:
                notes = ray.get(answer)
            except ray.exceptions.RayError:
                continue
            yield from ((asked[answer], note) for note in notes)
        if late:
            self._warn(f"{len(late)} of {len(places)} vaults did not answer")

    def _fetch(self, place: VaultPlace, note: Note) -> TrainingState:
        content = ray.get(place.vault.get.remote(note.sha256), timeout=self._timeout_s)
        if content is None or hashlib.sha256(content.data).hexdigest() != note.sha256:
            raise StateError("a copy in a vault is gone or damaged (its hash differs)")
        state = TrainingState.from_bytes(content.data)
        state.ledger.rows(self._durable.storage)
        return state
