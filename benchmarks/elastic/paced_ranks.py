"""Ranks that wait in every step, as for a device that computes meanwhile.

They wait `STEP_S`, or, where the environment variable `AT_LEAST_S` is set, for what the processor time
of the last step leaves of so many seconds: then a step takes the same time whatever the processor has to
do in it, as long as that is less. A change of the world takes almost no processor time, so that no part
of it passes for a step. Nothing else changes: a reference run without it reaches the same bits much
sooner. Workers import this module by name before their loop asks its control for the first time, which
it does once per step.
"""

from __future__ import annotations

import os
import time

from elastic_kfac.cluster.run import reporting
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import run_rank

STEP_S = 0.1
AT_LEAST_S = "BENCHMARK_STEP_AT_LEAST_S"

run = run_rank
member = run_member

_stop_reason = reporting.CoordinatorControl.stop_reason
_last = 0.0


def _paced(control: reporting.CoordinatorControl) -> str | None:
    global _last
    at_least = os.environ.get(AT_LEAST_S)
    wait = STEP_S if at_least is None else _last + float(at_least) - time.process_time()
    time.sleep(max(0.0, wait))
    _last = time.process_time()
    return _stop_reason(control)


reporting.CoordinatorControl.stop_reason = _paced  # type: ignore[method-assign]
