"""Lets Gloo's threads drop Python's tensors before Python ends.

A collective is complete for its caller before the thread that ran it has dropped its tensors. Dropping a
tensor that Python knows takes the interpreter's lock; a thread that asks for the lock while Python shuts
down is unwound out of a destructor, which aborts the process ("terminate called without an active
exception", exit code 134).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

_NAME = "pt_gloo_runloop"
"""Of the threads, as torch's ProcessGroupGloo sets it."""


def settle(seconds: float = 10.0) -> None:
    """Returns when Gloo's threads are idle, at the latest after `seconds`."""
    end = time.monotonic() + seconds
    before: dict[str, tuple[str, str]] | None = None
    while time.monotonic() < end:
        now = _threads()
        # One that has slept in between may have waited for the lock, which it gets while this one sleeps.
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now
        if now:
            time.sleep(0.001)


def _threads() -> dict[str, tuple[str, str]]:
    """(state, voluntary context switches) by thread."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            text = (thread / "status").read_text()
            fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            if fields["Name"] == _NAME:
                found[thread.name] = fields["State"][0], fields["voluntary_ctxt_switches"]
    return found
