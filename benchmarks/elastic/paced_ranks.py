"""Ranks whose steps take at least `STEP_S`, as on a device that computes while its processor waits.

Only the time of a step is prolonged: a reference run without it reaches the same bits much sooner.
Workers import this module by name before their loop asks its control for the first time, which it does
once per step.
"""

from __future__ import annotations

import time

from elastic_kfac.cluster.run import reporting
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import run_rank

STEP_S = 0.1

run = run_rank
member = run_member

_stop_reason = reporting.CoordinatorControl.stop_reason


def _paced(control: reporting.CoordinatorControl) -> str | None:
    time.sleep(STEP_S)
    return _stop_reason(control)


reporting.CoordinatorControl.stop_reason = _paced  # type: ignore[method-assign]
