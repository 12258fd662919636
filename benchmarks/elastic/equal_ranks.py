"""Ranks whose steps take `STEP_S`, be they one or two: the processor's time is a part of it.

So the capacity that is lost with a rank is left out, and what remains is the cost of the changes. Time
that a rank waits, for others or for a decision, comes on top. Processes of a node that comes have a low
priority (see `low_priority`) until they train: on a machine of its own its start takes no time from the
others.
Workers import this module by name before their loop asks its control for the first time, which it does
once per step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_kfac.cluster.run import reporting
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import run_rank

STEP_S = 0.3

NICE = 10


@contextlib.contextmanager
def low_priority() -> Iterator[None]:
    """Of the processes that this thread starts meanwhile."""
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        yield
    finally:
        _raise_priority(0)


def _raise_priority(thread: int) -> None:
    # Only with the right to: else everything goes on at the low one.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, 0)


def _all_threads() -> None:
    for task in Path("/proc/self/task").iterdir():
        _raise_priority(int(task.name))


def run(*arguments: Any, **options: Any) -> Any:
    """As the trainer's."""
    _all_threads()
    return run_rank(*arguments, **options)


def member(*arguments: Any, **options: Any) -> Any:
    """As that of a rank in place."""
    _all_threads()
    return run_member(*arguments, **options)


_stop_reason = reporting.CoordinatorControl.stop_reason
_computed = time.process_time()


def _paced(control: reporting.CoordinatorControl) -> str | None:
    global _computed
    computed = time.process_time()
    time.sleep(max(0.0, STEP_S - (computed - _computed)))
    _computed = time.process_time()
    return _stop_reason(control)


reporting.CoordinatorControl.stop_reason = _paced  # type: ignore[method-assign]
