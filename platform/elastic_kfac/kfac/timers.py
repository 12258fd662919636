"""How long the parts of a step take on this rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("factors", "decompositions", "preconditioning")
"""Parts of `KFAC.step` that exclude each other; `products` is a part of `preconditioning`."""


class Timers:
    """Host time by part, s; a device may still be busy.

    Attributes:
        seconds: Since this object was built.
        last: Of the last time that each part ran.
        clock: What is read; `time.thread_time` leaves out what other processes take.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}
        self.clock = time.perf_counter

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = self.clock()
        yield
        self.last[part] = self.clock() - begin
        self.seconds[part] += self.last[part]
