"""Ranks whose steps take `STEP_S`, be they one or two: the processor's time is a part of it.

So the capacity that is lost with a rank is left out, and what remains is the cost of the changes. Time
that a rank waits, for others or for a decision, comes on top.
Workers import this module by name before their loop asks its control for the first time, which it does
once per step.
"""

from __future__ import annotations

import time

from elastic_kfac.cluster.run import reporting
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import run_rank

STEP_S = 0.3

run = run_rank
member = run_member

_stop_reason = reporting.CoordinatorControl.stop_reason
_computed = time.process_time()


def _paced(control: reporting.CoordinatorControl) -> str | None:
    global _computed
    computed = time.process_time()
    time.sleep(max(0.0, STEP_S - (computed - _computed)))
    _computed = time.process_time()
    return _stop_reason(control)


reporting.CoordinatorControl.stop_reason = _paced  # type: ignore[method-assign]
