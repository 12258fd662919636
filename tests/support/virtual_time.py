"""Virtual time below the membership protocol: one process, greenlets, a store whose calls take a moment.

Exactly one greenlet runs. Whoever sleeps goes on at its moment, and time jumps from one moment to the
next. `virtual_world` plays random schedules with it, `benchmarks/elastic/virtual_cluster.py` traces.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

from greenlet import getcurrent, greenlet

from elastic_kfac.training import membership as protocol

NETWORK_S = 0.001
"""One call to the store."""


class Clock:
    """Virtual time: `monotonic`, `time` and `sleep`, as of the module `time`."""

    def __init__(self, end: float = float("inf")) -> None:
        self.now, self.end = 0.0, end
        self._queue: list[tuple[float, float, greenlet]] = []
        self._numbers = itertools.count()
        self._killed: set[greenlet] = set()
        self._main = getcurrent()

    def start(
        self, work: Callable[[], None], at: float | None = None, order: float | None = None
    ) -> greenlet:
        process = greenlet(work, parent=self._main)
        self.wake(process, self.now if at is None else at, order)
        return process

    def wake(self, process: greenlet, at: float, order: float | None = None) -> None:
        """`order` decides who goes on first of those whose moments are equal."""
        order = next(self._numbers) if order is None else order
        heapq.heappush(self._queue, (at, order, process))

    def run(self) -> None:
        while self._queue and self._queue[0][0] < self.end:
            self.now, _, process = heapq.heappop(self._queue)
            if not process.dead and process not in self._killed:
                process.switch()

    def kill(self, process: greenlet) -> None:
        """It never goes on."""
        self._killed.add(process)

    def wait(self) -> None:
        """Until somebody wakes this one."""
        self._main.switch()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.wake(getcurrent(), self.now + seconds)
        self.wait()


class Store:
    """What the protocol uses of a `torch.distributed` store."""

    def __init__(self, clock: Clock, *, seconds: float = NETWORK_S) -> None:
        self._clock, self._seconds = clock, seconds
        self._values: dict[str, bytes] = {}

    def at_once(self) -> Store:
        """The same store as the process that hosts it sees it."""
        near = Store(self._clock, seconds=0.0)
        near._values = self._values
        return near

    def set(self, key: str, value: str) -> None:
        self._travel()
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._travel()
        while key not in self._values:
            self._clock.sleep(0.01)
        return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        self._travel()
        return all(key in self._values for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self._travel()
        if self._values.get(key, b"") == expected.encode():
            self._values[key] = value.encode()
        return self._values[key]

    def _travel(self) -> None:
        if self._seconds:
            self._clock.sleep(self._seconds)


@contextmanager
def virtual(clock: Clock, *others: ModuleType) -> Iterator[None]:
    """Puts the clock below the protocol and `others`, and stores without prefixes below the protocol."""
    timed = (protocol, *others)
    real = [module.time for module in timed], protocol.dist  # type: ignore[attr-defined]
    for module in timed:
        module.time = clock  # type: ignore[attr-defined]
    protocol.dist = SimpleNamespace(PrefixStore=lambda _, store: store)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, its_time in zip(timed, real[0], strict=True):
            module.time = its_time  # type: ignore[attr-defined]
        protocol.dist = real[1]  # type: ignore[attr-defined]
