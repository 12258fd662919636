"""Ending process groups whose collectives cannot end by themselves.

Gloo's collectives fail when a peer's connections close. NCCL's do not: the kernel spins on the device,
the host waits for the device, and nobody ever hears of the loss. Communicators must then be aborted
from another thread, which makes the kernels return. What they leave in memory is rubbish, so the
collective must raise: with NCCL's blocking wait it does, because the host waits in `wait()` and looks
at the communicator's state meanwhile. The watchdog must not handle errors itself, as it ends the
process.

    collective waits ─────────────── aborted ─> CommunicationError ─> regroup
    AbortWatch: is somebody lost? ... yes ──^
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableMapping

import torch.distributed as dist

_SURVIVES = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
POLL_S = 0.1
GRACE_S = 0.2
"""How long a loss must stand before groups are aborted: those who leave together, at the same boundary,
have ended the group themselves by then."""


def needs_abort(backend: str) -> bool:
    """Whether collectives of this backend outlast the loss of a peer."""
    return backend == "nccl"


def let_processes_survive(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes NCCL report errors instead of ending the process; call before its groups are made.

    Variables that a person has set stay.
    """
    for name, value in _SURVIVES.items():
        environment.setdefault(name, value)


def abort_groups() -> None:
    """Aborts all process groups of this process and forgets them; never waits for a peer."""
    if not dist.is_initialized():
        return
    # Public under this name in no release so far.
    public = getattr(dist, "abort_process_group", None)
    (public or dist.distributed_c10d._abort_process_group)()


class AbortWatch:
    """A thread that aborts the process groups of this process once `is_lost` has held for a moment.

    Args:
        is_lost: Whether the present world has lost a member. Called in the thread.
        abort: Ends the groups.
    """

    def __init__(
        self,
        is_lost: Callable[[], bool],
        *,
        abort: Callable[[], None] = abort_groups,
        poll_s: float = POLL_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self._is_lost, self._abort = is_lost, abort
        self._poll_s, self._grace_s = poll_s, grace_s
        self._over = threading.Event()
        self._only_one_ends = threading.Lock()
        self.aborted = False
        """Whether the groups are gone, so that nobody else may destroy them."""
        self._thread = threading.Thread(target=self._watch, name="abort watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self._poll_s):
            if not self._is_lost() or self._over.wait(self._grace_s):
                continue
            with self._only_one_ends:
                if not self._over.is_set():
                    self.aborted = True
                    self._abort()
            return

    def stop(self) -> None:
        """Ends the watch; afterwards it aborts nothing any more. Waits for an abort under way."""
        with self._only_one_ends:
            self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
